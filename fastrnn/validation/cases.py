"""A layer call as a few numbers, and what it computes on a backend or in plain PyTorch.

Inputs, weights and incoming gradients are drawn from a seed, so that any two ways of computing the
same call can be compared, tensor by tensor: see :mod:`fastrnn.validation.budget`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, functional
from ..backends import backend as using
from ..cells import CELLS
from ..ops import describe

Named = dict[str, Tensor]
OUTPUTS = ("y", "h_n", "c_n", "c")
TORCH_LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}


@dataclass(frozen=True)
class Case:
    """One layer call.

    `lengths` makes it packed; `ends` are the lengths of a dense batch, and `cuts` the share of its
    steps that are resets, to given states with `to`. `every` asks for all states, `grouped` gives
    each group an input of its own, `layout` lays x out in memory."""

    T: int
    B: int
    I: int
    H: int
    reverse: tuple[bool, ...] = (False,)
    lengths: tuple[int, ...] = ()
    layout: str = "dense"
    bias: bool = True
    hx: bool = True
    P: int = 0
    ends: tuple[int, ...] = ()
    cuts: float = 0.0
    to: bool = False
    every: bool = False
    grouped: bool = False

    def __str__(self) -> str:
        parts = [f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"]
        parts += [f"P{self.P}"] * bool(self.P) + ["packed"] * bool(self.lengths)
        parts += ["reverse"] * (self.reverse == (True,)) + ["bidir"] * (len(self.reverse) == 2)
        parts += [self.layout] * (self.layout != "dense")
        parts += ["ends"] * bool(self.ends) + [f"cuts{self.cuts}"] * bool(self.cuts)
        parts += ["to"] * self.to + ["every"] * self.every + ["grouped"] * self.grouped
        return "-".join(parts + ["nobias"] * (not self.bias) + ["nohx"] * (not self.hx))

    @property
    def out(self) -> int:
        return self.P or self.H

    @property
    def batch_sizes(self) -> Tensor | None:
        if not self.lengths:
            return None
        return torch.tensor([sum(n > t for n in self.lengths) for t in range(self.T)])

    @property
    def reset(self) -> Tensor | None:
        if not self.cuts:
            return None
        generator = torch.Generator().manual_seed(7)
        return torch.rand(self.T, self.B, generator=generator) < self.cuts

    @property
    def options(self) -> dict[str, Any]:
        """What functional.layer takes by name but for the states at resets."""
        lengths = torch.tensor(self.ends) if self.ends else None
        return {"lengths": lengths, "reset": self.reset, "all_states": self.every}

    @property
    def has_torch_twin(self) -> bool:
        """Whether torch.nn has a layer for it."""
        own = self.ends or self.cuts or self.every or self.grouped
        return not own and self.reverse in ((False,), (False, True))


@dataclass
class Inputs:
    """Leaves of one call and the gradients that its outputs get, all in one dtype."""

    x: Tensor
    states: list[Tensor]
    weights: list[Tensor | None]
    at_reset: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    @property
    def leaves(self) -> Named:
        """By name, in the order in which :func:`as_function` takes them."""
        found = {"x": self.x}
        found |= {f"state{k}": s for k, s in enumerate(self.states)}
        found |= {f"at_reset{k}": s for k, s in enumerate(self.at_reset)}
        found |= {f"weight{k}": w for k, w in enumerate(self.weights) if w is not None}
        return found

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Inputs:
        """Fresh leaves in another dtype, or elsewhere; x keeps its memory layout."""

        def leaf(t: Tensor) -> Tensor:
            return t.detach().to(device, dtype).requires_grad_()

        weights = [None if w is None else leaf(w) for w in self.weights]
        grads = [g.to(device, dtype) for g in self.grads]
        states, at_reset = ([leaf(s) for s in kind] for kind in (self.states, self.at_reset))
        return Inputs(leaf(self.x), states, weights, at_reset, grads)


def make_inputs(cell: str, case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random inputs on the CPU, rounded to `dtype`, with weights of torch.nn's scale."""
    generator = torch.Generator().manual_seed(seed)
    kind, G = CELLS[cell], len(case.reverse)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Tensor:
        values = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return ((values * 2 - 1) / math.sqrt(case.H)).to(dtype).requires_grad_()

    lead = (sum(case.lengths),) if case.lengths else (case.T, case.B)
    rows, bias = kind.gates * case.H, case.bias
    weights: list[Tensor | None] = []
    for _ in range(G):
        weights += [uniform(rows, case.I), uniform(rows, case.out)]
        weights += [uniform(rows) if bias else None, uniform(rows) if bias else None]
        weights += [uniform(case.P, case.H)] if case.P else []
    widths = [case.out, case.H][: kind.states]
    states = [normal(G, case.B, w).requires_grad_() for w in widths] if case.hx else []
    grads = [normal(*lead, G * case.out), *(normal(G, case.B, w) for w in widths)]
    x = lay_out(normal(*lead, case.I * (G if case.grouped else 1)), case.layout).requires_grad_()
    at_reset = [normal(G, case.B, w).requires_grad_() for w in widths] if case.to else []
    grads += [normal(*lead, G * case.H)] if case.every and kind.states > 1 else []
    return Inputs(x, states, weights, at_reset, grads)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values elsewhere in memory (`expanded` keeps only the first row of the batch)."""
    if layout == "dense":
        return x
    if layout == "batch_first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "feature_first":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "padded":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if layout == "every_other":
        double = x.new_full((2 * x.shape[0], *x.shape[1:]), math.nan)
        double[::2] = x
        return double[::2]
    assert layout == "expanded"
    return x[:, :1].expand_as(x)


def collect(outputs: Sequence[Tensor], inputs: Inputs) -> Named:
    """Outputs and the gradients of every leaf, by name; x's only once."""
    torch.autograd.backward(list(outputs), inputs.grads)
    found: Named = dict(zip(OUTPUTS, (o.detach() for o in outputs), strict=False))
    for name, leaf in inputs.leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.dtype == leaf.dtype
        found[f"d{name}"] = leaf.grad
    return found


def as_function(
    cell: str, case: Case, inputs: Inputs
) -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    """The leaves, and the layer as a function of them that returns all its outputs."""
    names = list(inputs.leaves)

    def layer(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, leaves, strict=True))
        states = tuple(given[f"state{k}"] for k in range(len(inputs.states)))
        at_reset = tuple(given[f"at_reset{k}"] for k in range(len(inputs.at_reset)))
        weights = [given.get(f"weight{k}") for k in range(len(inputs.weights))]
        y, ends, c = functional.layer(
            cell,
            given["x"],
            states or None,
            weights,
            case.reverse,
            case.batch_sizes,
            reset_states=at_reset or None,
            **case.options,
        )
        return (y, *ends) if c is None else (y, *ends, c)

    return list(inputs.leaves.values()), layer


def as_problem(cell: str, case: Case, inputs: Inputs) -> tuple[backends.Problem, backends.Inputs]:
    """What a backend is asked and given for the call."""
    options, states = case.options, []
    for kind in (inputs.states, inputs.at_reset):
        h, c = [*kind, None, None][:2]
        states += [h, c]
    given = backends.Inputs(
        inputs.x, case.batch_sizes, options["lengths"], options["reset"], states, inputs.weights
    )
    return describe(cell, given, case.reverse, case.B, case.every, True), given


def run(cell: str, case: Case, inputs: Inputs, backend: str) -> Named:
    """Forward and backward of one layer on a backend, which raises its reason if it refuses."""
    leaves, layer = as_function(cell, case, inputs)
    with using(backend):
        outputs = layer(*leaves)
    return collect(outputs, inputs)


def run_plain(cell: str, case: Case, inputs: Inputs) -> Named:
    """The same in plain PyTorch: torch.nn's layer where there is one, else our reference."""
    if cell not in TORCH_LAYERS or not case.has_torch_twin:
        return run(cell, case, inputs, "reference")
    options: dict[str, Any] = {"proj_size": case.P} if case.P else {}
    layer = TORCH_LAYERS[cell](
        case.I, case.H, bias=case.bias, bidirectional=len(case.reverse) == 2, **options
    )
    names = layer._flat_weights_names
    given = dict(zip(names, (w for w in inputs.weights if w is not None), strict=True))
    hx: Any = tuple(inputs.states) if len(inputs.states) == 2 else next(iter(inputs.states), None)
    x: Any = inputs.x
    if case.batch_sizes is not None:
        x = nn.utils.rnn.PackedSequence(x, case.batch_sizes)
    y, ends = torch.func.functional_call(layer, given, (x, hx))
    y = y.data if case.lengths else y
    return collect([y, *(ends if isinstance(ends, tuple) else [ends])], inputs)


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Let products of float32, torch's own and those of recurrent layers, round their factors to
    TF32 where the hardware can, if `precision` is "tf32"; else not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
