"""Random layers and cells, by turns with torch.nn: where is fastrnn slower?

Sizes are drawn evenly on a logarithmic scale. A draw whose ratio falls below :data:`SLOWER` is
measured :data:`REPEATS` times more, and the median of these counts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks import machine
from benchmarks.cases import LIBRARIES, Results, final_states, output
from benchmarks.shapes import Mode
from fastrnn.backends import Inputs
from fastrnn.cells import CELLS
from fastrnn.cores import usable_cores
from fastrnn.machine import cpu_name
from fastrnn.ops import describe
from fastrnn.timing import Subject, alternate
from fastrnn.validation import (
    KINKED,
    WrongResultError,
    assert_within_budget,
    errors,
    on_the_side_of,
)

DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
DTYPE_WEIGHTS = (4, 2, 2, 1)  # torch.nn takes seconds for large float16 layers on many CPUs
MOST_FLOPS = 1.5e9
LONGEST, LARGEST_BATCH, WIDEST = 400, 256, 1024
SLOWER = 0.97
REPEATS = 5
FP16_LEAST = 0.9
# The largest share of draws that may be slower, and the least geometric means.
MOST_SLOWER, MOST_SLOWER_FP16 = 0.01, 0.05
LAYERS_MEAN, CELLS_MEAN = 3.0, 1.15


class Draw(NamedTuple):
    """A layer, or a cell where `T` is 0, and how it is called."""

    cell: str
    dtype: str
    mode: Mode
    T: int
    B: int
    I: int
    H: int
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    packed: bool = False
    hx: bool = False

    @property
    def is_cell(self) -> bool:
        return self.T == 0

    def __str__(self) -> str:
        sizes = f"B={self.B} I={self.I} H={self.H}"
        options = [f"{self.num_layers} layers"] * (self.num_layers > 1)
        options += ["bidirectional"] * self.bidirectional + ["packed"] * self.packed
        options += [f"proj_size={self.proj_size}"] * (self.proj_size > 0) + ["hx"] * self.hx
        kind = f"{self.cell} cell" if self.is_cell else f"{self.cell} T={self.T}"
        return " ".join([kind, sizes, self.dtype, self.mode, *options])

    def flops(self) -> float:
        """Multiplications and additions of the matrix products, as if every row were T long."""
        directions, out = 1 + self.bidirectional, self.proj_size or self.H
        inputs = [self.I] + [directions * out] * (self.num_layers - 1)
        gates = CELLS[self.cell].gates * self.H
        width = sum(gates * (i + out) + self.proj_size * self.H for i in inputs) * directions
        return 2.0 * max(self.T, 1) * self.B * width * (3 if self.mode == "training" else 1)


def draw(source: random.Random) -> Draw:
    """One of at most :data:`MOST_FLOPS`; of four one is a cell."""
    while True:
        drawn = _any_draw(source)
        if drawn.flops() <= MOST_FLOPS:
            return drawn


def _any_draw(source: random.Random) -> Draw:
    def size(most: int) -> int:
        return round(math.exp(source.uniform(0, math.log(most))))

    def rarely() -> bool:
        return source.random() < 0.25

    cell, (dtype,) = source.choice(list(CELLS)), source.choices(list(DTYPES), DTYPE_WEIGHTS)
    mode: Mode = source.choice(("inference", "training"))
    B, I, H = size(LARGEST_BATCH), size(WIDEST), size(WIDEST)
    if rarely():
        return Draw(cell, dtype, mode, 0, B, I, H, hx=rarely())
    projects = cell == "lstm" and H > 1 and rarely()
    return Draw(
        cell,
        dtype,
        mode,
        size(LONGEST),
        B,
        I,
        H,
        num_layers=source.choice((2, 3)) if rarely() else 1,
        bidirectional=rarely(),
        proj_size=source.randrange(1, H) if projects else 0,
        packed=rarely(),
        hx=rarely(),
    )


class Setup:
    """Modules of both libraries with the same weights, on the same input."""

    def __init__(self, draw: Draw, seed: int) -> None:
        self.draw = draw
        torch.manual_seed(seed)
        dtype = DTYPES[draw.dtype]
        self.modules = {name: _build(library, draw) for name, library in LIBRARIES.items()}
        state = self.modules["torch"].state_dict()
        for module in self.modules.values():
            module.load_state_dict(state)
        shape = (draw.B, draw.I) if draw.is_cell else (draw.T, draw.B, draw.I)
        x = torch.randn(shape).to(dtype)
        self.batch_sizes: Tensor | None = None
        if draw.packed:
            lengths = torch.randint(1, draw.T + 1, (draw.B,)).sort(descending=True).values
            packed = pack_padded_sequence(x, lengths)
            x, self.batch_sizes = packed.data, packed.batch_sizes
        self.x = x
        directions = 1 + draw.bidirectional
        self.dy = torch.randn(*x.shape[:-1], directions * (draw.proj_size or draw.H)).to(dtype)
        self.hx: Any = None
        if draw.hx:
            lead = (draw.B,) if draw.is_cell else (draw.num_layers * directions, draw.B)
            widths = (draw.proj_size or draw.H, draw.H)[: CELLS[draw.cell].states]
            states = tuple(torch.randn(*lead, width).to(dtype) for width in widths)
            self.hx = states if len(states) > 1 else states[0]

    def check(self) -> None:
        """Raise :class:`WrongResultError` unless our error is within the budget."""
        draw, dtype = self.draw, self.x.dtype
        exact = _build(nn, draw).double()
        exact.load_state_dict(self.modules["torch"].state_dict())
        ours, theirs = (self._results(self.modules[name], dtype) for name in LIBRARIES)
        if draw.cell in KINKED and draw.mode == "training":
            right, right_for_theirs = (self._on_the_side_of(name, exact) for name in LIBRARIES)
        else:
            right = right_for_theirs = self._results(exact, torch.float64)
        plain = errors(theirs.by_name(), right_for_theirs.by_name())
        terms = max(max(draw.T, 1) * draw.B, draw.I + draw.H)
        assert_within_budget(ours.by_name(), plain, right.by_name(), dtype, terms)

    def _on_the_side_of(self, library: str, exact: nn.Module) -> Results:
        """The results of `exact` where every ReLU takes the slope that it took in the library's
        module: see :func:`fastrnn.validation.on_the_side_of`."""
        draw, reverse = self.draw, (False, True)[: 1 + self.draw.bidirectional]
        x = self.x.double().requires_grad_()
        y, rows = x.unsqueeze(0) if draw.is_cell else x, self.x
        ends = []
        for k, weights in enumerate(self._by_layer(exact)):
            groups = slice(k * len(reverse), (k + 1) * len(reverse))
            hx = self.hx if self.hx is None or draw.is_cell else self.hx[groups]
            with torch.no_grad():
                rows = self._output(self._layer(library, k, rows)(self._input(rows), hx))
            h0 = None if hx is None else hx.double().reshape(-1, draw.B, draw.H)
            given = Inputs(y, self.batch_sizes, None, None, (h0, None, None, None), weights)
            problem = describe(draw.cell, given, reverse, draw.B, all_states=False, grad=True)
            y, h_n, *_ = on_the_side_of(rows, problem, given)
            ends.append(h_n)
        y = y.squeeze(0) if draw.is_cell else y
        return self._named(exact, x, y, () if draw.is_cell else (torch.cat(ends),))

    def _by_layer(self, module: nn.Module) -> list[list[Tensor | None]]:
        """The weights of each layer, those of both directions in one list."""
        flat: list[Tensor | None] = list(module.parameters())
        each = len(flat) // self.draw.num_layers
        return [flat[k : k + each] for k in range(0, len(flat), each)]

    def _layer(self, library: str, k: int, rows: Tensor) -> nn.Module:
        """Layer k of the library's module alone, for the output `rows` of the layer before."""
        module = self.modules[library]
        if self.draw.num_layers == 1:
            return module
        alone = self.draw._replace(num_layers=1, I=rows.shape[-1])
        layer = _build(LIBRARIES[library], alone)
        names = layer.state_dict()
        layer.load_state_dict(dict(zip(names, self._by_layer(module)[k], strict=True)))
        return layer

    def subject(self, library: str) -> Subject:
        """The call to time: forward, or forward and the gradients to x and all weights."""
        module = self.modules[library]
        if self.draw.mode == "inference":
            data = self._input(self.x)

            def infer() -> object:
                with torch.inference_mode():
                    return module(data, self.hx)

            return infer
        x = self.x.clone().requires_grad_()
        data, wanted = self._input(x), [x, *module.parameters()]

        def train() -> object:
            return torch.autograd.grad(self._output(module(data, self.hx)), wanted, self.dy)

        return train

    def _input(self, x: Tensor) -> Tensor | PackedSequence:
        return x if self.batch_sizes is None else PackedSequence(x, self.batch_sizes)

    def _output(self, result: Any) -> Tensor:
        if not self.draw.is_cell:
            return output(result)
        h: Tensor = result[0] if isinstance(result, tuple) else result
        return h

    def _results(self, module: nn.Module, dtype: torch.dtype) -> Results:
        x = self.x.to(dtype, copy=True).requires_grad_(self.draw.mode == "training")
        hx = self.hx
        if hx is not None:
            hx = tuple(s.to(dtype) for s in hx) if isinstance(hx, tuple) else hx.to(dtype)
        result = module(self._input(x), hx)
        states = () if self.draw.is_cell else final_states(result)
        return self._named(module, x, self._output(result), states)

    def _named(
        self, module: nn.Module, x: Tensor, y: Tensor, states: tuple[Tensor, ...]
    ) -> Results:
        """A call's outputs and, in training, the gradients of `x` and the module's weights."""
        names, tensors = ["y", *("h_n", "c_n")[: len(states)]], [y, *states]
        if self.draw.mode == "training":
            parameters = dict(module.named_parameters())
            names += ["dx", *(f"d{name}" for name in parameters)]
            tensors += torch.autograd.grad(y, [x, *parameters.values()], self.dy.to(y.dtype))
        return Results(tuple(names), tuple(t.detach() for t in tensors))


def _build(library: ModuleType, draw: Draw) -> nn.Module:
    name, _, nonlinearity = draw.cell.partition("_")
    options: dict[str, Any] = {"nonlinearity": nonlinearity} if nonlinearity else {}
    if draw.is_cell:
        module: nn.Module = getattr(library, f"{name.upper()}Cell")(draw.I, draw.H, **options)
    else:
        options |= {"num_layers": draw.num_layers, "bidirectional": draw.bidirectional}
        if draw.proj_size:
            options["proj_size"] = draw.proj_size
        module = getattr(library, name.upper())(draw.I, draw.H, **options)
    return module.to(DTYPES[draw.dtype])


def ratio(setup: Setup, seconds: float) -> float:
    """The time of torch.nn over ours, both the best of their samples."""
    timings = alternate({name: setup.subject(name) for name in LIBRARIES}, seconds, least=3)
    return timings["torch"].best / timings["fastrnn"].best


def measured(setup: Setup, seconds: float) -> float:
    first = ratio(setup, seconds)
    if first >= SLOWER:
        return first
    return statistics.median(ratio(setup, seconds) for _ in range(REPEATS))


def report(ratios: dict[Draw, float]) -> bool:
    """Print the tables; whether everything that is asked for is met."""
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for drawn, value in ratios.items():
        groups["cell" if drawn.is_cell else "layer", drawn.dtype, drawn.mode].append(value)
    print(f"\n{'':<28}{'number':>7}{'mean':>7}{'least':>7}{'slower':>8}")
    for group, values in sorted(groups.items()):
        slower = sum(value < SLOWER for value in values)
        mean, least = statistics.geometric_mean(values), min(values)
        print(f"{' '.join(group):<28}{len(values):>7}{mean:>7.2f}{least:>7.2f}{slower:>8}")
    slowest = sorted((value, drawn) for drawn, value in ratios.items() if value < SLOWER)
    for value, drawn in slowest:
        print(f"{value:6.2f}  {drawn}")
    half = [value for drawn, value in ratios.items() if drawn.dtype == "fp16"]
    others = [value for drawn, value in ratios.items() if drawn.dtype != "fp16"]
    layers = [v for drawn, v in ratios.items() if not drawn.is_cell and drawn.dtype == "fp32"]
    cells = [v for drawn, v in ratios.items() if drawn.is_cell and drawn.dtype != "fp16"]
    wanted = [
        ("slower, without fp16", _slower(others), MOST_SLOWER, False),
        ("slower, fp16", _slower(half), MOST_SLOWER_FP16, False),
        ("least of fp16", min(half, default=math.inf), FP16_LEAST, True),
        ("mean of fp32 layers", _mean(layers), LAYERS_MEAN, True),
        ("mean of cells without fp16", _mean(cells), CELLS_MEAN, True),
    ]
    for name, value, limit, at_least in wanted:
        print(f"{name}: {value:.3f}, asked: {'>=' if at_least else '<='} {limit}")
    return all((v >= limit) if at_least else (v <= limit) for _, v, limit, at_least in wanted)


def _slower(values: Sequence[float]) -> float:
    return sum(value < SLOWER for value in values) / max(len(values), 1)


def _mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values) if values else math.inf


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=1000, help="of layers and cells")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.05, help="for each library and draw")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--cells", action="store_true", help="cells alone")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, commit {machine.commit()}")
    source = random.Random(options.seed)
    ratios: dict[Draw, float] = {}
    wrong = 0
    while len(ratios) < options.number:
        drawn = draw(source)
        if drawn.dtype not in options.dtype or (options.cells and not drawn.is_cell):
            continue
        setup = Setup(drawn, options.seed)
        try:
            setup.check()
        except WrongResultError as error:
            print(f"wrong: {drawn}: {error}", flush=True)
            wrong += 1
        ratios[drawn] = measured(setup, options.seconds)
        if sys.stderr.isatty():
            print(f"\r{len(ratios)} of {options.number}", end="", file=sys.stderr, flush=True)
    met = report(ratios)
    if options.output:
        rows = [{**drawn._asdict(), "ratio": value} for drawn, value in ratios.items()]
        options.output.write_text(json.dumps({**machine.describe(), "draws": rows}, indent=1))
    return 0 if met and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
