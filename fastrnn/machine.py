"""What this machine is, as far as it decides which kernels are right and fast on it: the key of
what :mod:`fastrnn.record` keeps."""

from __future__ import annotations

import functools
import hashlib
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from .cores import usable_cores

try:
    from . import _C
except ImportError:
    _C = None  # type: ignore[assignment]

PACKAGE = Path(__file__).resolve().parent
Identity = dict[str, str]


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"model name", "Hardware", "cpu model"}:
            return value.strip()
    return platform.machine()


def instruction_sets() -> list[str]:
    """Those that the extension has and this CPU supports, the best first."""
    return [] if _C is None else _C.isas()


def instruction_set() -> str:
    """The one in use; "" without the extension."""
    return "" if _C is None else _C.isa()


def use_instruction_set(name: str) -> None:
    """Let this process compute with one of :func:`instruction_sets`."""
    _C.use_isa(name)


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def gpu_driver() -> str:
    """The version of the kernel's GPU driver, NVIDIA's or AMD's, or "unknown"."""
    nvidia, amd = Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")
    if nvidia.exists():
        match = re.search(r"\b\d+\.\d+(\.\d+)?\b", nvidia.read_text())
        return match.group() if match else "unknown"
    return amd.read_text().strip() if amd.exists() else "unknown"


@functools.cache
def build() -> str:
    """A hash of all that computes: the extensions and the backends' own source."""
    found = hashlib.sha256()
    for path in sorted([*PACKAGE.glob("*.so"), *PACKAGE.glob("backends/**/*.py")]):
        found.update(path.relative_to(PACKAGE).as_posix().encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def is_present(device: torch.device) -> bool:
    """Whether it is a CPU, or a GPU that torch can use: no meta device, nor one that torch makes
    believe."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())


def hardware(device: torch.device) -> Identity:
    """The device itself: what a record's file is named after."""
    if device.type == "cpu":
        return {
            "cpu": cpu_name(),
            "instruction sets": " ".join(instruction_sets()),
            "usable cores": str(usable_cores()),
        }
    properties = torch.cuda.get_device_properties(device)
    return {"gpu": properties.name, "processors": str(properties.multi_processor_count)}


def software(device: torch.device) -> Identity:
    """What runs on the device: a record is old where it was written with another."""
    found = {
        "torch": torch.__version__,
        "triton": version("triton") or "none",
        "fastrnn build": build(),
    }
    if device.type != "cpu":
        found["driver"] = gpu_driver()
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found


def differences(ours: Mapping[str, str], theirs: Mapping[str, object]) -> list[str]:
    """In words, where `theirs` is another than `ours`."""
    return [
        f"{name} {theirs.get(name, 'missing')} instead of {value}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
