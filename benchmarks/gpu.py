"""The GPU table: fastrnn's backends against cuDNN and against plain PyTorch, eager and compiled.

    python -m benchmarks.gpu --cell lstm --dtype bf16 --seconds 0.2

Every time is that of a whole layer, the input's matrix product included, over random inputs that
take turns, so that none is found in a cache. It lies between two events, and is a CUDA graph's
where the subject can be captured, marked g, else that of calls on the stream; the median counts,
and the subjects take turns too. fastrnn's results are checked against float64 before any is timed,
by the budget that the CPU's have. Everything goes into a JSON file under benchmarks/results/gpu/.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import fastrnn
from benchmarks import machine
from benchmarks.cases import Results
from benchmarks.check import compare
from benchmarks.results import FOLDER
from fastrnn.backends import BACKENDS
from fastrnn.cells import CELLS
from fastrnn.machine import gpu_driver, version
from fastrnn.validation import TF32_EPS

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
MODES = ("inference", "training")
SEED = 2
INPUTS = 4  # that take turns
WARM_UP = 3
OPPONENTS = ("cudnn", "eager", "compiled")


class Shape(NamedTuple):
    """T timesteps, B rows, H inputs and hidden units."""

    T: int
    B: int
    H: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


SHAPES = (
    Shape(512, 1, 128),
    Shape(512, 64, 128),
    Shape(512, 64, 130),
    Shape(512, 64, 256),
    Shape(512, 64, 512),
    Shape(512, 32, 1024),
    Shape(1000, 256, 64),
    Shape(128, 7, 300),
)


class Case(NamedTuple):
    cell: str
    mode: str
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.cell} {self.mode} {self.dtype} ({self.shape})"

    @property
    def target(self) -> float | None:
        """The quotient of cuDNN's time and ours that is asked for."""
        if self.shape.H <= 128:
            return 1.5
        return 2.0 if self.dtype == "bf16" and self.shape.H in (256, 512) else None


@dataclass
class Row:
    case: Case
    ms: dict[str, float] = field(default_factory=dict)  # median, by subject
    captured: dict[str, bool] = field(default_factory=dict)
    error_share: dict[str, float] = field(default_factory=dict)  # of the budget, at most 1
    absent: dict[str, str] = field(default_factory=dict)  # subjects that could not run, and why
    wrong: dict[str, str] = field(default_factory=dict)  # backends whose results are

    @property
    def best(self) -> str | None:
        """The fastest of fastrnn's backends."""
        ours = [name for name in own_backends() if name in self.ms]
        return min(ours, key=lambda name: self.ms[name]) if ours else None

    @property
    def ratio(self) -> float | None:
        best = self.best
        return None if best is None or "cudnn" not in self.ms else self.ms["cudnn"] / self.ms[best]


Run = Callable[[Tensor], Any]  # x -> (y, states), as a layer


def own_backends() -> list[str]:
    return [b.name for b in BACKENDS if b.name != "cpu" and not b.differentiable]


@contextmanager
def precision(name: str) -> Iterator[None]:
    """One setting for torch's products, for cuDNN's and for our kernels'."""
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.rnn
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    cudnn_before = cudnn.fp32_precision  # type: ignore[attr-defined]
    cudnn.fp32_precision = "tf32" if name == "tf32" else "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        cudnn.fp32_precision = cudnn_before  # type: ignore[attr-defined]


class Setup:
    """One layer's weights and inputs on the device, and every way to run it."""

    def __init__(self, case: Case) -> None:
        self.case, self.training = case, case.mode == "training"
        torch.manual_seed(SEED)
        T, B, H = case.shape
        name, _, nonlinearity = case.cell.partition("_")
        options: dict[str, Any] = {"nonlinearity": nonlinearity} if nonlinearity else {}
        dtype = DTYPES[case.dtype]
        # cuDNN takes bfloat16, but torch leaves its weights apart, to be copied in every call.
        torch.backends.cudnn.CUDNN_TENSOR_DTYPES.add(dtype)
        self.theirs: nn.RNNBase = getattr(nn, name.upper())(H, H, **options).to("cuda", dtype)
        self.ours: nn.RNNBase = getattr(fastrnn, name.upper())(H, H, **options).to("cuda", dtype)
        self.ours.load_state_dict(self.theirs.state_dict())
        self.inputs = [
            torch.randn(T, B, H).to("cuda", dtype).requires_grad_(self.training)
            for _ in range(INPUTS)
        ]
        self.dy = torch.randn(T, B, H).to("cuda", dtype)

    def runs(self) -> dict[str, tuple[nn.RNNBase, Run]]:
        """By name: whose weights a subject reads, and the subject."""
        found: dict[str, tuple[nn.RNNBase, Run]] = {
            name: (self.ours, self._forced(name)) for name in own_backends()
        }
        found["cudnn"] = (self.theirs, self.theirs)
        found["eager"] = (self.ours, self._loop(CELLS[self.case.cell].step))
        found["compiled"] = (self.ours, self._loop(torch.compile(CELLS[self.case.cell].step)))
        return found

    def _forced(self, backend: str) -> Run:
        def run(x: Tensor) -> Any:
            with fastrnn.backend(backend):
                return self.ours(x)

        return run

    def _loop(self, step: Callable[..., tuple[Tensor, ...]]) -> Run:
        """The loop over the steps that one writes by hand."""
        w_ih, w_hh, b_ih, b_hh = self.ours.parameters()

        def run(x: Tensor) -> Any:
            states = (x.new_zeros(x.shape[1], self.case.shape.H),) * CELLS[self.case.cell].states
            outputs = []
            for gates_x in linear(x, w_ih, b_ih).unbind():
                states = step(gates_x, linear(states[0], w_hh, b_hh), states)
                outputs.append(states[0])
            return torch.stack(outputs), states

        return run

    def call(self, layer: nn.RNNBase, run: Run) -> Callable[[], None]:
        """What is timed: forward, or forward and all gradients, of each input once."""
        weights = list(layer.parameters())

        def infer() -> None:
            with torch.no_grad():
                for x in self.inputs:
                    run(x)

        def train() -> None:
            for x in self.inputs:
                torch.autograd.grad(run(x)[0], [x, *weights], self.dy)

        return train if self.training else infer

    def results(self, layer: nn.RNNBase, run: Run, dtype: torch.dtype) -> Results:
        x = self.inputs[0].detach().to(dtype).requires_grad_(self.training)
        with torch.set_grad_enabled(self.training):
            y, states = run(x)
        ends = states if isinstance(states, tuple) else (states,)
        names, found = ("y", "h_n", "c_n")[: 1 + len(ends)], (y, *ends)
        if self.training:
            parameters = dict(layer.named_parameters())
            found += torch.autograd.grad(y, [x, *parameters.values()], self.dy.to(dtype))
            names += ("dx", *(f"d{name}" for name in parameters))
        return Results(names, tuple(t.detach() for t in found))

    def check(self, row: Row) -> None:
        """Put each backend's share of the error budget, or what is wrong with it, into the row."""
        double = copy.deepcopy(self.theirs).double()
        exact = self.results(double, double, torch.float64)
        dtype, (T, B, H) = DTYPES[self.case.dtype], self.case.shape
        theirs = self.results(self.theirs, self.theirs, dtype)
        terms, eps = max(T * B, 2 * H), TF32_EPS if self.case.dtype == "tf32" else None
        for name in own_backends():
            with fastrnn.backend(name), torch.set_grad_enabled(self.training):
                reason = fastrnn.explain(self.ours, self.inputs[0])[0].refusals.get(name)
            if reason is not None:
                row.absent[name] = reason
                continue
            try:
                ours = self.results(self.ours, self._forced(name), dtype)
                used = compare(ours, theirs, exact, terms, eps)
            except Exception as failure:  # whatever it is, the table goes on
                row.wrong[name] = reason_of(failure)
            else:
                row.error_share[name] = max(used.values())


def reason_of(failure: Exception) -> str:
    """Its first line. A device that does not work any more raises here, as nothing else can run."""
    torch.cuda.synchronize()
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


def captured(call: Callable[[], None]) -> Callable[[], None] | None:
    """The call as a graph's replay, None where it cannot be captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception:
        torch.cuda.set_stream(stream)  # which a broken capture does not do
        torch.cuda.synchronize()
        return None
    return graph.replay


def warmed_up(call: Callable[[], None]) -> None:
    """As capturing wants it: on a stream of its own."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)


def alternate(subjects: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, in turn, over so many seconds for each."""
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    end = time.perf_counter() + seconds * len(subjects)
    while not all(len(taken) >= 5 for taken in samples.values()) or time.perf_counter() < end:
        for name, subject in subjects.items():
            start, stop = _event(), _event()
            start.record()
            subject()
            stop.record()
            stop.synchronize()
            samples[name].append(start.elapsed_time(stop) / INPUTS)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def measure(case: Case, seconds: float, opponents: Sequence[str]) -> Row:
    row = Row(case)
    torch._dynamo.reset()  # after a few shapes of one function it would leave the rest eager
    with precision(case.dtype):
        setup = Setup(case)
        setup.check(row)
        subjects: dict[str, Callable[[], None]] = {}
        for name, (layer, run) in setup.runs().items():
            ours = name in own_backends()
            if (ours and name not in row.error_share) or (not ours and name not in opponents):
                continue
            call = setup.call(layer, run)
            try:
                warmed_up(call)
            except Exception as failure:
                row.absent[name] = reason_of(failure)
                continue
            replay = captured(call)
            row.captured[name] = replay is not None
            subjects[name] = replay or call
        row.ms = alternate(subjects, seconds)
    return row


def describe() -> dict[str, Any]:
    about = torch.cuda.get_device_properties(0)
    return machine.describe() | {
        "gpu": about.name,
        "gpu_memory": about.total_memory,
        "processors": about.multi_processor_count,
        "driver": gpu_driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "triton": version("triton"),
    }


def line(row: Row) -> str:
    def cell(name: str) -> str:
        if name in row.wrong:
            return f"{'WRONG':>11}"
        if name not in row.ms:
            return f"{'-':>11}"
        return f"{row.ms[name]:>10.3f}{'g' if row.captured[name] else ' '}"

    times = "".join(cell(name) for name in (*own_backends(), *OPPONENTS))
    ratio = "" if row.ratio is None else f"{row.ratio:>7.2f} {row.best}"
    reasons = [f"  {k}: {v}" for k, v in (row.wrong | row.absent).items()]
    return f"{row.case!s:<42}{times}{ratio}" + "".join(reasons)


def verdicts(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        target = row.case.target
        if target is not None and row.ratio is not None:
            word = "met   " if row.ratio >= target else "MISSED"
            yield f"{word} {row.ratio:6.2f} of {target:.2f}  {row.case}, cuDNN / {row.best}"
    by_case = {row.case: row for row in rows}
    for case, row in by_case.items():
        even = by_case.get(case._replace(shape=case.shape._replace(H=128)))
        if case.shape.H == 130 and even is not None and row.best and even.best:
            quotient = row.ms[row.best] / even.ms[even.best]
            word = "met   " if quotient <= 1.6 else "MISSED"
            yield f"{word} {quotient:6.2f} of 1.60 at most  {case}, H = 130 / H = 128"


def save(path: Path, about: dict[str, Any], settings: dict[str, Any], rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        asdict(row) | {"case": row.case._asdict() | {"shape": row.case.shape._asdict()}}
        for row in rows
    ]
    record = {"machine": about, "settings": settings, "rows": entries}
    path.write_text(json.dumps(record, indent=1) + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=["lstm", "gru", "rnn_tanh"])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--shape", nargs="+", metavar="T,B,H", choices=list(map(str, SHAPES)),
        default=list(map(str, SHAPES)), help="only these of the table",
    )  # fmt: skip
    parser.add_argument("--opponent", nargs="*", choices=OPPONENTS, default=OPPONENTS)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each subject of a case")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("there is no GPU that this build of torch can use", file=sys.stderr)
        return 1
    about = describe()
    print(
        f"{about['gpu']}, driver {about['driver']}, CUDA {about['cuda']}, commit {about['commit']}"
    )
    names = "".join(f"{name:>11}" for name in (*own_backends(), *OPPONENTS))
    print(f"median ms; g: a graph's replay; ratio: cuDNN / fastrnn\n\n{'':<42}{names}  ratio")
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    path = options.output or FOLDER / "gpu" / f"{stamp}-{about['commit']}.json"
    rows: list[Row] = []
    shapes = [shape for shape in SHAPES if str(shape) in options.shape]
    for case in map(Case._make, product(options.cell, options.mode, options.dtype, shapes)):
        rows.append(measure(case, options.seconds, options.opponent))
        print(line(rows[-1]), flush=True)
        save(path, about, {"seconds": options.seconds, "inputs": INPUTS}, rows)
    print("\ntargets")
    for verdict in verdicts(rows):
        print(f"  {verdict}")
    print(f"\nwritten: {path}")
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
