"""Show versions, instruction sets, cores, GPUs, backends with their reasons, and the record."""

from __future__ import annotations

import argparse
import platform

import torch

import fastrnn

from .. import machine, record
from ..backends import BACKENDS, refusal
from ..cores import usable_cores
from ..validation import Case, as_problem, make_inputs
from .options import devices

EXAMPLE = Case(16, 8, 64, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(options: argparse.Namespace) -> int:
    print(f"fastrnn {fastrnn.__version__}, build {machine.build()}")
    print(f"torch {torch.__version__}, triton {machine.version('triton') or 'is not installed'}")
    print(f"python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"cpu: {machine.cpu_name()}")
    print(f"  usable cores: {usable_cores()}, threads of torch: {torch.get_num_threads()}")
    print(f"  instruction set in use: {machine.instruction_set() or 'none, there is no extension'}")
    print(f"  supported: {', '.join(machine.instruction_sets()) or 'none'}")
    for device in devices()[1:]:
        about = ", ".join(f"{name} {value}" for name, value in machine.hardware(device).items())
        print(f"{device}: {about}, driver {machine.gpu_driver()}")
    if len(devices()) == 1:
        print("gpu: torch sees none")
    for device in devices():
        show_backends(device)
        show_record(device)
    return 0


def show_backends(device: torch.device) -> None:
    """In their order, whether they would serve a plain layer and why not."""
    problem, _ = as_problem("lstm", EXAMPLE, make_inputs("lstm", EXAMPLE, torch.float32))
    problem = problem._replace(device=device)
    print(f"backends for a float32 LSTM on {device}, {EXAMPLE}, in training:")
    for backend in BACKENDS:
        reason = refusal(backend, problem)
        print(f"  {backend.name}: {'can serve' if reason is None else f'refuses: {reason}'}")


def show_record(device: torch.device) -> None:
    if not record.has_folder():
        print(f"record of {device}: there is no home directory: set FASTRNN_CACHE to a folder")
        return
    path = record.path_of(device)
    found = record.of(device)
    if found is None:
        state = "does not hold here" if path.exists() else "there is none"
        print(f"record of {device}: {path}: {state}")
        return
    print(f"record of {device}: {path}")
    if found.checked is None:
        print("  not checked")
    else:
        print(f"  checked on {found.checked}: {len(found.right)} right, {len(found.wrong)} wrong")
    for kernel, wrong in found.wrong.items():
        print(f"  WRONG: {' '.join(filter(None, kernel))}: {wrong}")
    if found.tuned is None:
        print("  not tuned")
    else:
        print(f"  tuned on {found.tuned}: {len(found.times)} points")
