"""How many cores this process may use: what its affinity leaves it, and what its quota pays for.

torch counts neither a container's quota nor an affinity that changes after the start, and threads
that share a core wait for each other. The kernels of the CPU use no more threads than
`usable_cores()`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

try:
    # By affinity, or, where OpenMP binds every thread to a place of its own (OMP_PROC_BIND), those
    # of all places.
    from ._C import available_cores
except ImportError:

    def available_cores() -> int:
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1


# What tells a control group's quota and its period, both in microseconds, by the type of the file
# system: of version 2 of control groups, and of version 1.
_FILES = {"cgroup2": ("cpu.max",), "cgroup": ("cpu.cfs_quota_us", "cpu.cfs_period_us")}


def usable_cores() -> int:
    """The cores that this process may keep busy, at least 1.

    The affinity is that of the moment, of the calling thread; the quota is read once a process.
    """
    limit = quota()
    return available_cores() if limit is None else min(available_cores(), limit)


@functools.cache
def quota(root: Path = Path("/")) -> int | None:
    """The cores that the quotas of this process's control groups pay for, a fraction as a whole
    one; None where there is no quota.

    The least counts, of the process's own group and of all groups around it, in version 1 and 2
    of Linux' control groups (cgroups(7), and cpu.max and cpu.cfs_quota_us in the kernel's
    documentation). `root` is where the file system begins, which tests replace.
    """
    limits = [_limit(folder, files) for folder, files in _groups(root)]
    return min((limit for limit in limits if limit is not None), default=None)


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The folders of the process's groups, from the outermost inwards, and their files."""
    own = _own_groups(root)
    # parent root mount-point options [fields ...] - type source options; see proc(5)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = (part.split() for part in line.partition(" - "))
        if len(left) < 5 or len(right) < 3:
            continue
        controller = "" if right[0] == "cgroup2" else "cpu"
        if right[0] not in _FILES or (controller and controller not in right[2].split(",")):
            continue
        group, top = own.get(controller, PurePosixPath("/")), left[3]
        inner = group.relative_to(top).parts if group.is_relative_to(top) else ()
        mount = root / left[4].lstrip("/")
        for depth in range(len(inner) + 1):
            yield mount.joinpath(*inner[:depth]), _FILES[right[0]]


def _own_groups(root: Path) -> dict[str, PurePosixPath]:
    """The process's group by controller; that of version 2, which has one for all, by ""."""
    # number:controller,controller:path; see cgroups(7)
    lines = _text(root / "proc/self/cgroup").splitlines()
    fields = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    return {name: PurePosixPath(path) for _, names, path in fields for name in names.split(",")}


def _limit(folder: Path, files: tuple[str, ...]) -> int | None:
    """None where the folder has no quota: "max" or -1, or none of the files."""
    try:
        microseconds, period = map(int, " ".join(_text(folder / name) for name in files).split())
    except ValueError:
        return None
    return -(-microseconds // period) if microseconds > 0 and period > 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
