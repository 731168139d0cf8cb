"""Time each backend that is right here, and write down which is fastest where.

For every cell, dtype and mode (inference, training), over a grid of H and B, the backends that can
serve take turns, a layer of 16 steps with as many inputs as hidden units. The times go into the
device's record: a call takes the backend that was fastest at the grid's nearest point. Kernels that
serve only once they are validated are timed where `python -m fastrnn check` has found them right.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch

from .. import record
from ..backends import BACKENDS, Backend, Problem, backend, refusal
from ..timing import Others, Subject, alternate, sample
from ..validation import Case, as_function, as_problem, make_inputs
from .options import DTYPES, add_selection

T = 16
MODES = ("inference", "training")
CPU_GRID, GPU_GRID = ((32, 128, 512), (1, 8, 32)), ((64, 256, 1024), (1, 16, 128))  # of H, of B
LEAST = 3  # samples of a backend at a point
OUT = 3.0  # times as slow as the fastest at first, a backend is not timed again


class Point(NamedTuple):
    cell: str
    dtype: str
    mode: str
    H: int
    B: int

    @property
    def training(self) -> bool:
        return self.mode == "training"

    def __str__(self) -> str:
        return f"{self.cell} {self.dtype} {self.mode} H={self.H} B={self.B}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--hidden", nargs="+", type=int, metavar="H", help=_grid_help(0))
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help=_grid_help(1))
    parser.add_argument(
        "--seconds", type=float, default=80.0, help="for each device (default: %(default)s)"
    )


def _grid_help(axis: int) -> str:
    cpu, gpu = (" ".join(map(str, grid[axis])) for grid in (CPU_GRID, GPU_GRID))
    return f"(default: {cpu} on a CPU, {gpu} on a GPU)"


def run(options: argparse.Namespace) -> int:
    for device in options.device:
        hidden, batch = CPU_GRID if device.type == "cpu" else GPU_GRID
        axes = (options.mode, options.hidden or hidden, options.batch or batch)
        grid = [Point(*point) for point in product(options.cell, options.dtype, *axes)]
        contests = {point: names for point in grid if len(names := contestants(point, device)) > 1}
        if not contests:
            print(f"{device}: at no point more than one backend can serve: nothing to tune")
            continue
        others = Others()
        times = list(timed(contests, device, options.seconds))
        if (complaint := others.complaint("tune")) is not None:
            print(complaint)
        show(times)
        print(f"written: {record.write_tuned(device, times)}")
    return 0


def contestants(point: Point, device: torch.device) -> list[str]:
    """The backends whose kernels may serve the point's call; plain torch, step by step, is left
    out: it serves what nothing else does."""
    cell, dtype = point.cell, DTYPES[point.dtype]
    small = Case(1, 1, 1, 1)
    problem, _ = as_problem(cell, small, make_inputs(cell, small, dtype))
    problem = problem._replace(
        device=device, T=T, B=point.B, I=point.H, H=point.H, grad=point.training
    )
    return [b.name for b in BACKENDS if not b.differentiable and _may_serve(b, problem)]


def _may_serve(candidate: Backend, problem: Problem) -> bool:
    with backend(candidate.name):
        if refusal(candidate, problem) is not None:
            return False
    kernel = candidate.name, problem.cell.name, problem.dtype, problem.device
    return candidate.on_request is None or record.is_right(*kernel)


def timed(
    contests: dict[Point, list[str]], device: torch.device, seconds: float
) -> Iterator[record.Times]:
    """The points' times as they come, all together in about so many seconds."""
    end = time.perf_counter() + seconds
    for k, (point, names) in enumerate(contests.items()):
        show_progress(f"{device}: {k + 1} of {len(contests)}: {point}")
        each = max(0.0, end - time.perf_counter()) / (len(contests) - k) / len(names)
        best = best_times(subjects(point, device, names), each)
        yield record.Times(point.cell, point.dtype, point.training, point.H, point.B, best)
    show_progress("")


def best_times(calls: dict[str, Subject], seconds: float) -> dict[str, float]:
    """Seconds of a call, the best of those taken in about so many seconds for each. Backends that
    are far behind after one call, and all where there are no seconds left, keep the time of that
    one."""
    best = {}
    for name, call in calls.items():
        call()  # the first allocates, packs and compiles
        best[name] = sample(call, 1)
    close = {name: call for name, call in calls.items() if best[name] <= OUT * min(best.values())}
    if len(close) > 1 and seconds > 0:
        timings = alternate(close, seconds, LEAST)
        best |= {name: timing.best for name, timing in timings.items()}
    return best


def subjects(point: Point, device: torch.device, names: Sequence[str]) -> dict[str, Subject]:
    """The same call by each backend; on a GPU it lasts until the results are there."""
    dtype, case = DTYPES[point.dtype], Case(T, point.B, point.H, point.H, hx=False)
    inputs = make_inputs(point.cell, case, dtype).to(dtype, device)
    leaves, layer = as_function(point.cell, case, inputs)
    dy = inputs.grads[0]

    def call(name: str) -> None:
        with backend(name), torch.inference_mode(not point.training):
            y, *_ = layer(*leaves)
        if point.training:
            torch.autograd.grad(y, leaves, dy)
        if device.type != "cpu":
            torch.cuda.synchronize(device)

    return {name: functools.partial(call, name) for name in names}


def show_progress(text: str) -> None:
    """On one line of a terminal, in place of the last."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def show(times: Sequence[record.Times]) -> None:
    """A line for each cell, dtype and mode: which backend is fastest at how many points."""
    print(f"{'cell':<10}{'dtype':<10}{'mode':<11}fastest at so many points")
    for cell, dtype, training in dict.fromkeys(t[:3] for t in times):
        group = [t.seconds for t in times if t[:3] == (cell, dtype, training)]
        wins = Counter(min(seconds, key=lambda name: seconds[name]) for seconds in group)
        text = ", ".join(f"{name} {count}" for name, count in wins.most_common())
        print(f"{cell:<10}{dtype:<10}{MODES[training]:<11}{text}")
