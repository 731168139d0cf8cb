"""A training step with one core kept busy by another process, over its quiet time."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.cases import LIBRARIES, Setup
from benchmarks.check import verify
from benchmarks.run import DISTURBANCE
from benchmarks.shapes import CELLS, VARIANT_SHAPE, Case
from fastrnn.cores import usable_cores
from fastrnn.machine import cpu_name
from fastrnn.timing import Timing, alternate

TARGET = 2.5
SETTLE_SECONDS = 0.3


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process that never rests; the system moves it between cores as it likes."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(SETTLE_SECONDS)
        yield
    finally:
        process.kill()
        process.wait()


def measure(setup: Setup, seconds: float) -> tuple[dict[str, Timing], dict[str, Timing]]:
    subjects = {name: setup.subject(name) for name in LIBRARIES}
    quiet = alternate(subjects, seconds)
    with busy_core():
        disturbed = alternate(subjects, seconds)
    return quiet, disturbed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each layer, quiet and busy")
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    print(f"{cpu_name()}, {torch.get_num_threads()} threads; medians, ms a training step")
    print(f"{'':<28}{'quiet':>9}{'busy':>9}{'ratio':>7}   target for fastrnn: {TARGET}")
    met = True
    for cell in options.cell:
        setup = Setup(Case(cell, "training", "fp32", VARIANT_SHAPE))
        verify(setup)
        quiet, disturbed = measure(setup, options.seconds)
        others = quiet["fastrnn"].others
        if others > DISTURBANCE:
            print(f"{cell}: the quiet part was not: other processes used {others:.1f} cores")
        for name in LIBRARIES:
            before, after = quiet[name].median * 1e3, disturbed[name].median * 1e3
            print(f"{cell:<12}{name:<16}{before:>9.2f}{after:>9.2f}{after / before:>7.2f}")
        met &= disturbed["fastrnn"].median <= TARGET * quiet["fastrnn"].median
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
