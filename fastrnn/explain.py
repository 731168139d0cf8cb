"""Which backend serves a layer, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .backends import BACKENDS, Inputs, Problem, choose, refusal
from .functional import is_autocast
from .modules import Layers, Step


@dataclass(frozen=True)
class Explanation:
    """For one layer: the backend that serves it, or None, and what each refusing backend says.

    Attributes:
        layer: its index in the stack.
        problem: what the backends are asked.
        serves: name of the backend that a call would use now; None if the call would raise.
        refusals: reason of every backend that refuses, by name.
    """

    layer: int
    problem: Problem
    serves: str | None
    refusals: dict[str, str]

    def __str__(self) -> str:
        p = self.problem
        sizes = f"T={p.T} B={p.B} I={p.I} H={p.H}" + (f" P={p.P}" if p.P else "")
        kind = f"{p.dtype} on {p.device}".removeprefix("torch.")
        flags = [f"{p.G} directions"] * (p.G > 1) + ["packed"] * p.packed
        flags += ["lengths"] * p.lengths + ["resets"] * p.reset + ["all states"] * p.all_states
        flags.append("with gradients" if p.grad else "without gradients")
        lines = [f"layer {self.layer}: {p.cell.name} {sizes}, {kind}, {', '.join(flags)}"]
        for backend in BACKENDS:
            reason = self.refusals.get(backend.name)
            answer = f"refuses: {reason}" if reason else "could serve"
            lines.append(f"  {backend.name}: {'serves' if backend.name == self.serves else answer}")
        return "\n".join(lines)


class Explanations(tuple[Explanation, ...]):
    """One :class:`Explanation` a layer, printed one after the other."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self))

    __str__ = __repr__


def explain(
    layer: torch.nn.Module,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> Explanations:
    """Which backend would serve ``layer(input, hx)``, and the reason of each that would not,
    without running it.

    Args:
        layer: a fastrnn layer or cell.
        input: what the layer would be called with.
        hx: the states that it would be called with; they matter only in whether they require a
            gradient.
        lengths, reset: as the layer would be called with them.

    Returns:
        One :class:`Explanation` a layer of the stack; print the result.

    Raises:
        TypeError: `layer` is not a fastrnn layer or cell.
    """
    if isinstance(layer, Layers):
        x, batch_sizes = _time_first(layer, input)
        weights = layer._weights()
        reverse = [False, True] if layer.bidirectional else [False]
    elif isinstance(layer, Step):
        assert isinstance(input, Tensor)
        x, batch_sizes = input.reshape(1, -1, input.shape[-1]), None
        weights = [[layer.weight_ih, layer.weight_hh, layer.bias_ih, layer.bias_hh]]
        reverse = [False]
    else:
        raise TypeError(f"explain() takes a fastrnn layer or cell, got {type(layer).__name__}")
    batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    states = [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)
    grad = any(t.requires_grad for t in (x, *states))
    found = []
    last, every = (getattr(layer, name, False) for name in ("return_states", "return_layers"))
    for k, flat in enumerate(weights):
        grad = grad or any(w is not None and w.requires_grad for w in flat)
        inputs = Inputs(x, batch_sizes, lengths, reset, (None,) * 4, flat)
        all_states = every or (last and k == len(weights) - 1)
        problem = ops.describe(layer._cell, inputs, reverse, batch, all_states, grad)
        problem = problem._replace(
            dtype=_computed_in(x), grouped=False, grad=grad and torch.is_grad_enabled()
        )
        found.append(_explain_one(k, problem))
    return Explanations(found)


def _time_first(layer: Layers, input: Tensor | PackedSequence) -> tuple[Tensor, Tensor | None]:
    if isinstance(input, PackedSequence):
        return input.data, input.batch_sizes
    if input.dim() == 2:
        return input.unsqueeze(1), None
    return input.transpose(0, 1) if layer.batch_first else input, None


def _computed_in(x: Tensor) -> torch.dtype:
    if is_autocast(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _explain_one(layer: int, problem: Problem) -> Explanation:
    reasons = {b.name: reason for b in BACKENDS if (reason := refusal(b, problem)) is not None}
    try:
        serves = choose(problem).name
    except RuntimeError:
        serves = None
    return Explanation(layer, problem, serves, reasons)
