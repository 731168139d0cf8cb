"""A training step over a long sequence with recompute=: its memory and its time.

Each setting runs in a process of its own, whose peak of resident memory is read before and after.
Input and incoming gradient are there before; the growth holds the output, all that is kept for the
backward pass, and the gradients of input and weights."""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastrnn
from benchmarks.run import DISTURBANCE
from fastrnn.cores import usable_cores
from fastrnn.machine import cpu_name
from fastrnn.timing import Subject, alternate

T, B, H = 4096, 8, 256
EVERY = (0, 32, 64, 128, 256, 512)
CELLS = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU}
LESS, SLOWER = 3.0, 1.4  # what is asked for: memory at least so many times less, time at most


def step(layer: torch.nn.Module, x: Tensor, dy: Tensor) -> None:
    torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], dy)


def tensors() -> tuple[Tensor, Tensor]:
    return torch.randn(T, B, H).requires_grad_(), torch.randn(T, B, H)


def peak() -> int:
    """Bytes. getrusage's would be the parent's too, whose memory a child has until it is another
    program."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024


def growth(cell: str, every: int) -> int:
    """Of this process's peak by one training step; threads and workspaces exist before it."""
    layer = CELLS[cell](H, H, recompute=every)
    x, dy = tensors()
    short = x.detach()[: max(2 * every, 16)].requires_grad_()
    step(layer, short, dy[: len(short)])
    before = peak()
    step(layer, x, dy)
    return peak() - before


def kept(cell: str, every: int) -> int:
    """Bytes held between forward and backward, the user's own input and weights not counted."""
    layer: Any = CELLS[cell](H, H, recompute=every)
    x, _ = tensors()
    owned = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(sizes.values())


def measured_apart(cell: str, every: int) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", "--growth", cell, str(every)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each setting")
    parser.add_argument("--growth", nargs=2, metavar=("CELL", "EVERY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    if options.growth:
        cell, every = options.growth
        print(growth(cell, int(every)))
        return 0
    print(f"{cpu_name()}, {torch.get_num_threads()} threads; T={T} B={B} I=H={H}, float32")
    print(f"{'':<18}{'ms':>8}{'time':>7}{'peak MB':>9}{'less':>7}{'kept MB':>9}{'less':>7}")
    met = True
    for cell, layer in CELLS.items():
        x, dy = tensors()
        subjects: dict[str, Subject] = {
            str(every): functools.partial(step, layer(H, H, recompute=every), x, dy)
            for every in EVERY
        }
        timings = alternate(subjects, options.seconds)
        peaks = {every: measured_apart(cell, every) for every in EVERY}
        held = {every: kept(cell, every) for every in EVERY}
        good = False
        for every in EVERY:
            time = timings[str(every)].best / timings["0"].best
            less, less_held = peaks[0] / peaks[every], held[0] / held[every]
            good |= time <= SLOWER and less >= LESS
            disturbed = "  (disturbed)" if timings[str(every)].others > DISTURBANCE else ""
            print(
                f"{cell} recompute={every:<4}{timings[str(every)].best * 1e3:>8.1f}{time:>7.2f}"
                f"{peaks[every] / 1e6:>9.1f}{less:>7.2f}{held[every] / 1e6:>9.1f}{less_held:>7.2f}"
                f"{disturbed}"
            )
        met &= good
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
