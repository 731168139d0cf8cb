"""What ``python -m fastrnn check`` and ``tune`` have found out about this machine.

One JSON file a device, in the folder that FASTRNN_CACHE names, else in $XDG_CACHE_HOME/fastrnn or
~/.cache/fastrnn. It says which kernels are wrong and which are right (`check`), and how long every
backend takes at the points of a grid (`tune`); :func:`fastrnn.backends.choose` goes by it. It is
read once a process, when the first layer on the device asks. A file that is broken, or that another
machine or build wrote, is ignored with a warning that names it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import statistics
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import machine

FORMAT = 1


class Kernel(NamedTuple):
    """What computes one cell in one dtype."""

    backend: str
    isa: str  # the instruction set that it is compiled for; "" where there is but one
    cell: str
    dtype: str  # as "float32"


class Times(NamedTuple):
    """Seconds that backends took for the same layer call, at one point of the grid."""

    cell: str
    dtype: str
    training: bool
    H: int
    B: int
    seconds: dict[str, float]  # by backend


class Measured(NamedTuple):
    """What a record says about the times of a call."""

    date: str
    H: int
    B: int | None  # None for all B together
    seconds: dict[str, float]  # by backend, the fastest first

    def tells(self, backend: str, others: Iterable[str]) -> str | None:
        """Why the backend is chosen rather than the best of the others; None if not for this."""
        slower = [(self.seconds[name], name) for name in others if name in self.seconds]
        if backend not in self.seconds or not slower:
            return None
        seconds, name = min(slower)
        ratio = seconds / self.seconds[backend]
        point = f"H={self.H}" + ("" if self.B is None else f" B={self.B}")
        return f"by the record of {self.date}: {ratio:.1f} times as fast as {name} at {point}"


@dataclass
class Record:
    """A file's content, as far as it holds for this device."""

    path: Path
    checked: str | None = None  # the date of the last check
    wrong: dict[Kernel, str] = field(default_factory=dict)  # and what was wrong
    right: set[Kernel] = field(default_factory=set)
    tuned: str | None = None
    isa: str = ""  # the instruction set in use when times were taken
    times: list[Times] = field(default_factory=list)
    timed: set[tuple[str, str, str]] = field(default_factory=set)  # backend, cell and dtype

    def nearest(
        self, cell: str, dtype: str, training: bool, H: int, B: int | None
    ) -> Measured | None:
        """The times at the grid's point that is nearest in log H and log B, or those at the nearest
        H, the geometric mean over all B; None if the cell was not measured in this dtype."""
        points = [t for t in self.times if t[:3] == (cell, dtype, training)]
        if not points or self.tuned is None or self.isa != machine.instruction_set():
            return None
        if B is not None:
            best = min(points, key=lambda t: math.hypot(_log(t.H, H), _log(t.B, B)))
            return Measured(self.tuned, best.H, best.B, _sorted(best.seconds))
        width = min(points, key=lambda t: abs(_log(t.H, H))).H
        rows = [t.seconds for t in points if t.H == width]
        names = set.intersection(*map(set, rows))
        means = {name: statistics.geometric_mean([s[name] for s in rows]) for name in names}
        return Measured(self.tuned, width, None, _sorted(means))


def _log(a: int, b: int) -> float:
    return math.log(a / max(b, 1))


def _sorted(seconds: dict[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def folder() -> Path:
    """Where records lie.

    Raises:
        RuntimeError: neither of the two variables is set, and the user has no home directory.
    """
    own, cache = os.environ.get("FASTRNN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    return (Path(cache) if cache else Path.home() / ".cache") / "fastrnn"


def has_folder() -> bool:
    """Whether there is a place for records at all."""
    try:
        folder()
    except RuntimeError:
        return False
    return True


def path_of(device: torch.device) -> Path:
    """The file of a device; its name has a hash of the hardware, so that machines may share a
    folder."""
    hardware = json.dumps(machine.hardware(device), sort_keys=True)
    return folder() / f"{device.type}-{hashlib.sha256(hardware.encode()).hexdigest()[:12]}.json"


def read(device: torch.device) -> Record | None:
    """The record of a device, None if there is none.

    Raises:
        ValueError: there is a file, but it is broken or does not hold for this device and build.
        OSError: the file cannot be read.
    """
    path = path_of(device)
    if not path.is_file():
        return None
    try:
        return _parsed(path, _valid(device, json.loads(path.read_text())))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it is no record of fastrnn: {error!r}") from error


def _valid(device: torch.device, content: dict[str, Any]) -> dict[str, Any]:
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']}, not {FORMAT}")
    for ours, theirs in (
        (machine.hardware(device), content["hardware"]),
        (machine.software(device), content["software"]),
    ):
        differences = machine.differences(ours, theirs)
        if differences:
            raise ValueError(f"it was written with {', '.join(differences)}")
    return content


def _parsed(path: Path, content: dict[str, Any]) -> Record:
    record = Record(path)
    checked, tuned = content.get("checked"), content.get("tuned")
    if checked is not None:
        record.checked = checked["date"]
        for *names, wrong in checked["kernels"]:
            kernel = Kernel(*names)
            if wrong is None:
                record.right.add(kernel)
            else:
                record.wrong[kernel] = wrong
    if tuned is not None:
        record.tuned, record.isa = tuned["date"], tuned["isa"]
        record.times = [Times(*point) for point in tuned["times"]]
        record.timed = {(name, t.cell, t.dtype) for t in record.times for name in t.seconds}
    return record


def write_checked(device: torch.device, verdicts: dict[Kernel, str | None]) -> Path:
    """Put into the device's record which kernels were checked and what, if anything, is wrong with
    them; kernels that an earlier check has judged keep that. The answer is the file."""
    old = _or_none(device)
    known: dict[Kernel, str | None] = {}
    if old is not None:
        known = dict.fromkeys(old.right) | old.wrong
    kernels = [[*kernel, wrong] for kernel, wrong in sorted((known | verdicts).items())]
    return _write(device, "checked", {"date": _today(), "kernels": kernels})


def write_tuned(device: torch.device, times: list[Times]) -> Path:
    """Put times into the device's record, in place of all that are there. The answer is the
    file."""
    section = {"date": _today(), "isa": machine.instruction_set(), "times": times}
    return _write(device, "tuned", section)


def _or_none(device: torch.device) -> Record | None:
    """The record, None also where it does not hold."""
    try:
        return read(device)
    except (OSError, ValueError):
        return None


def _write(device: torch.device, section: str, value: dict[str, Any]) -> Path:
    """Replace one section of the file, and the file at once, as other processes may read it."""
    path = path_of(device)
    content = json.loads(path.read_text()) if _or_none(device) is not None else {}
    content |= {
        "format": FORMAT,
        "hardware": machine.hardware(device),
        "software": machine.software(device),
        section: value,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(content, indent=1))
    part.replace(path)
    forget()
    return path


def _today() -> str:
    return date.today().isoformat()


_in_use = True


@contextmanager
def ignored() -> Iterator[None]:
    """Choose backends as if there were no records; for all threads."""
    global _in_use
    _in_use = False
    forget()
    try:
        yield
    finally:
        _in_use = True
        forget()


@functools.cache
def of(device: torch.device) -> Record | None:
    """The record that choices on the device go by: read once, with a warning if it is unfit."""
    if not _in_use or not machine.is_present(device) or not has_folder():
        return None
    try:
        return read(device)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"fastrnn ignores the record {path_of(device)}: {error}. `python -m fastrnn check` and "
            "`python -m fastrnn tune` write it anew",
            stacklevel=2,
        )
        return None


@functools.lru_cache(maxsize=4096)
def measured(
    cell: str, dtype: torch.dtype, device: torch.device, training: bool, H: int, B: int | None
) -> Measured | None:
    """What the device's record says about the times of a call: see :meth:`Record.nearest`."""
    record = of(device)
    return None if record is None else record.nearest(cell, _name(dtype), training, H, B)


# The dictionaries that `choices` has made.
_choices: list[dict[Any, Any]] = []


def choices() -> dict[Any, Any]:
    """A dictionary in which another module may remember who serves a call: emptied whenever records
    are to be read anew, as the choice goes by them."""
    remembered: dict[Any, Any] = {}
    _choices.append(remembered)
    return remembered


def forget() -> None:
    """Read records anew when they are asked for next, and forget what was chosen by them."""
    of.cache_clear()
    measured.cache_clear()
    for remembered in _choices:
        remembered.clear()


def has_times(device: torch.device) -> bool:
    """Whether `tune` has measured the device."""
    record = of(device)
    return record is not None and bool(record.times)


def fastest(
    cell: str, dtype: torch.dtype, device: torch.device, training: bool, H: int, B: int | None
) -> tuple[str, ...]:
    """Names of the backends that were measured, the fastest first."""
    found = measured(cell, dtype, device, training, H, B)
    return () if found is None else tuple(found.seconds)


def is_wrong(backend: str, cell: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `check` found this backend's kernel wrong."""
    record = of(device)
    return record is not None and _kernel(backend, cell, dtype) in record.wrong


def is_right(backend: str, cell: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `check` found this backend's kernel right."""
    record = of(device)
    return record is not None and _kernel(backend, cell, dtype) in record.right


def is_timed(backend: str, cell: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `tune` has measured this backend's kernel."""
    record = of(device)
    return record is not None and (backend, cell, _name(dtype)) in record.timed


# Dynamo takes what they answer for constants (see fastrnn.backends.asked).
for _function in (has_times, fastest, is_wrong, is_right, is_timed):
    _function._dynamo_marked_constant = True  # type: ignore[union-attr]


def _kernel(backend: str, cell: str, dtype: torch.dtype) -> Kernel:
    return Kernel(backend, isa_of(backend), cell, _name(dtype))


def isa_of(backend: str) -> str:
    """The instruction set that a backend's kernels use now; "" if there is but one for them."""
    return machine.instruction_set() if backend in ("cpu", "widened") else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
