"""Builds the CUDA kernels for the host, with the emulated device, as the module `emulated_cuda`."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = ["F32", "Tf32", "Bf16", "F16"]
FLAGS = shlex.split(
    "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra "
    "-Wno-unknown-pragmas -Wno-clobbered -U_FORTIFY_SOURCE"
)


def build(folder: Path) -> Path:
    """Compile what has changed into `folder` and return the module's file."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    csrc, here = ROOT / "csrc", ROOT / "tests/emulation"
    python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    units = [(csrc / "cuda" / f"{name}.cpp", name, []) for name in ("plan", "kernels")]
    emulated = ("emulated_device", "emulated_launch")
    units += [(here / f"{name}.cpp", name, []) for name in emulated]
    units += [(csrc / "cuda/bindings.cpp", "bindings", ["-DFASTRNN_MODULE=emulated_cuda", *python])]
    units += [
        (csrc / "cuda/kernels.cu", f"kernels_{p}", ["-x", "c++", f"-DFASTRNN_PRECISION={p}"])
        for p in PRECISIONS
    ]
    library = folder / f"emulated_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    lines = [
        "rule compile",
        f"  command = {shlex.join([*compiler, *FLAGS])} -I{csrc} -I{here} -MMD -MF $out.d "
        "$flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join(compiler)} -shared $in -o $out",
    ]
    for source, name, flags in units:
        lines += [f"build {name}.o: compile {source}", f"  flags = {shlex.join(flags)}"]
    lines.append(f"build {library.name}: link {' '.join(f'{name}.o' for _, name, _ in units)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes may come at the same time
        result = subprocess.run(
            [sys.executable, "-m", "ninja", "-C", str(folder)], capture_output=True, text=True
        )
    if result.returncode:
        raise RuntimeError(result.stdout + result.stderr)
    return library


def load(folder: Path) -> ModuleType:
    """Build and import the module."""
    spec = importlib.util.spec_from_file_location("emulated_cuda", build(folder))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build(ROOT / "build/emulation"))
