"""Where and with what a result was measured."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import fastrnn
from fastrnn import _C
from fastrnn.cores import usable_cores
from fastrnn.machine import cpu_name, version

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str:
    """The short hash, with a + where tracked files differ from it; "unknown" outside a clone."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def fma_peak(threads: int, seconds: float = 0.5) -> float:
    """The machine's float32 multiply-add rate on that many threads, GF/s, best of four."""
    return max(float(_C.fma_peak(threads, seconds / 4)) for _ in range(4))


def describe() -> dict[str, object]:
    packages = ("torch", "numpy", "onnx", "onnxruntime", "openvino")
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "fastrnn": fastrnn.__version__,
        "commit": commit(),
        "versions": {name: found for name in packages if (found := version(name))},
    }
