"""Times over torch.nn's with more threads than cores, as where affinity or a quota leave few."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch

from benchmarks.cases import LIBRARIES, Setup
from benchmarks.check import verify
from benchmarks.run import DISTURBANCE
from benchmarks.shapes import MODES, Case, Shape
from fastrnn.machine import cpu_name
from fastrnn.timing import alternate

SETTINGS = ((2, 3), (2, 8), (2, 16), (1, 1), (1, 2), (1, 4))  # cores, threads
CELLS = ("lstm", "gru")
SHAPES = (Shape(100, 1, 256, 256), Shape(100, 8, 256, 256))
SAMPLES = 15
TARGET = 1.0


@contextmanager
def pinned(cores: int) -> Iterator[None]:
    """This thread, and the processes that it starts, on the first of the cores that it has."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(case: Case) -> bool:
    """Prints medians; whether fastrnn's is the smaller one."""
    setup = Setup(case)
    verify(setup)
    subjects = {name: setup.subject(name) for name in LIBRARIES}
    times = alternate(subjects, seconds=0, least=SAMPLES)
    ours, theirs = times["fastrnn"].median, times["torch"].median
    others = times["fastrnn"].others
    disturbed = f"   others used {others:.1f} cores" if others > DISTURBANCE else ""
    print(
        f"  {case!s:<38}{ours * 1e3:>9.2f}{theirs * 1e3:>9.2f}{theirs / ours:>7.2f}{disturbed}",
        flush=True,
    )
    return theirs >= TARGET * ours


def measure_all(cells: list[str], threads: int) -> int:
    """In a process of its own: OpenMP counts the cores when it is loaded."""
    torch.set_num_threads(threads)
    cases = [Case(c, m, "fp32", s) for c, m, s in product(cells, MODES, SHAPES)]
    met = [measure(case) for case in cases]
    return 0 if all(met) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--cores", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        return measure_all(options.cell, options.threads)
    print(f"{cpu_name()}; medians of {SAMPLES}, ms: fastrnn, torch, ratio (target {TARGET})")
    met = True
    for cores, threads in SETTINGS:
        if cores not in options.cores:
            continue
        print(f"{cores} cores, {threads} threads", flush=True)
        command = [sys.executable, "-m", "benchmarks.threads", f"--threads={threads}"]
        with pinned(cores):
            met &= subprocess.run([*command, "--cell", *options.cell]).returncode == 0
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
