"""Which backend serves a layer, and why the others do not."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from . import record
from .backends import (
    BACKENDS,
    ComputesNothing,
    Inputs,
    Outputs,
    Problem,
    asked,
    choose,
    only,
    refusal,
    timed_as,
)
from .modules import Layers, Step
from .plain import OverriddenError, stop_at_overrides


@dataclass(frozen=True)
class Explanation:
    """For one layer: the backend that serves it, or None, and what each refusing backend says.

    Attributes:
        layer: its index in the stack.
        problem: what the backends are asked.
        serves: name of the backend that a call would use now; None if the call would raise.
        refusals: reason of every backend that refuses, by name.
        name: of the module in the model that was explained; empty for a layer alone.
        measured: what the device's record says for `serves`, if it was chosen by times.
    """

    layer: int
    problem: Problem
    serves: str | None
    refusals: dict[str, str]
    name: str = ""
    measured: str | None = None

    def __str__(self) -> str:
        p = self.problem
        sizes = f"T={p.T} B={p.B} I={p.I} H={p.H}" + (f" P={p.P}" if p.P else "")
        kind = f"{p.dtype} on {p.device}".removeprefix("torch.")
        flags = [f"{p.G} directions"] * (p.G > 1) + ["packed"] * p.packed
        flags += ["lengths"] * p.lengths + ["resets"] * p.reset + ["all states"] * p.all_states
        flags.append("with gradients" if p.grad else "without gradients")
        where = f"{self.name}, layer" if self.name else "layer"
        lines = [f"{where} {self.layer}: {p.cell.name} {sizes}, {kind}, {', '.join(flags)}"]
        serves = "serves" + (f", {self.measured}" if self.measured else "")
        for backend in BACKENDS:
            reason = self.refusals.get(backend.name)
            answer = f"refuses: {reason}" if reason else "could serve"
            lines.append(f"  {backend.name}: {serves if backend.name == self.serves else answer}")
        return "\n".join(lines)


class Explanations(tuple[Explanation, ...]):
    """One :class:`Explanation` a layer, printed one after the other.

    Attributes:
        notes: what there is to say of recurrent layers that have no explanation.
    """

    notes: tuple[str, ...]

    def __new__(cls, each: Iterable[Explanation], notes: Iterable[str] = ()) -> Explanations:
        explanations = super().__new__(cls, each)
        explanations.notes = tuple(notes)
        return explanations

    def __repr__(self) -> str:
        return "\n".join(map(str, (*self, *self.notes)))

    __str__ = __repr__


def explain(layer: nn.Module, *args: Any, **kwargs: Any) -> Explanations:
    """Which backend would serve ``layer(*args, **kwargs)``, and the reason of each that would not.

    A layer or cell is not run: the call is checked as ever, and what it would ask the backends for
    is taken down. A model is run once, as ``model(*args, **kwargs)`` in its present mode, and what
    it calls its layers with is explained; a layer that it calls again with the same sizes is
    explained once.

    Args:
        layer: a fastrnn layer or cell, or a model that has some inside.
        args, kwargs: what it would be called with, such as `input`, `hx` and `lengths`.

    Returns:
        One :class:`Explanation` a layer of the stack; print the result. None, but a note that says
        so, where torch.nn's forward serves, for tensors with a ``__torch_function__`` of their own.

    Raises:
        TypeError: `layer` is a layer of torch.nn, which is to be converted first, or there is no
            recurrent layer in it.
        Exception: whatever the call raises, for shapes and dtypes that do not fit.
    """
    if isinstance(layer, (Layers, Step)):
        try:
            return Explanations(_explain_call("", layer, args, kwargs))
        except OverriddenError as error:
            return Explanations((), [_by_torch(error)])
    if isinstance(layer, _RECURRENT):
        raise TypeError(f"explain() takes a fastrnn layer or cell, and this is {_advice(layer)}")
    return _explain_model(layer, args, kwargs)


def _by_torch(reason: OverriddenError) -> str:
    return f"torch.nn's forward serves: {reason}"


_RECURRENT = (nn.RNNBase, nn.modules.rnn.RNNCellBase)


def _explain_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explanations:
    recurrent = {n: m for n, m in model.named_modules() if isinstance(m, _RECURRENT)}
    if not recurrent:
        raise TypeError(
            "explain() takes a fastrnn layer or cell, or a model with some inside, got "
            f"{type(model).__name__} without any"
        )
    ours = {n: m for n, m in recurrent.items() if isinstance(m, (Layers, Step))}
    explained: dict[tuple[str, int, Problem], Explanation] = {}
    by_torch: dict[str, str] = {}

    def explain_next_call(name: str, *call: Any) -> None:
        try:
            for one in _explain_call(name, *call):
                explained.setdefault((name, one.layer, one.problem), one)
        except OverriddenError as error:
            by_torch[name] = f"{name}: {_by_torch(error)}"

    with contextlib.ExitStack() as hooks:
        for name, module in ours.items():
            hook = functools.partial(explain_next_call, name)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        model(*args, **kwargs)
    called = {name for name, _, _ in explained} | by_torch.keys()
    notes = [f"{name}: the model did not call it" for name in ours if name not in called]
    notes += by_torch.values()
    theirs = recurrent.keys() - ours.keys()
    notes += [f"{n}: {_advice(m)}" for n, m in recurrent.items() if n in theirs]
    return Explanations(explained.values(), notes)


def _advice(module: nn.Module) -> str:
    """What a recurrent layer is that is not fastrnn's, and what to do with it."""
    kind = type(module)
    if kind.__module__.startswith("torch.nn."):
        return f"a torch.nn.{kind.__name__}: convert it first, by fastrnn.convert"
    return f"a {kind.__name__}, a class of its own that fastrnn.convert leaves alone"


class _Notebook(ComputesNothing, threading.local):
    """A backend that takes down what it is asked for. It is one object for ever, as calls of the
    same sizes remember whom they go to."""

    name = "explain"
    differentiable = True  # as it reads no tensor, whatever watches or wraps them

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def forward(self, problem: Problem, inputs: Inputs, save: bool) -> Outputs:
        self.problems.append(problem)
        x, G, out, H = inputs.x, problem.G, problem.out, problem.H
        ends = (G,) if inputs.unbatched() else (G, problem.B)
        return Outputs(
            x.new_zeros((*x.shape[:-1], G * out)),
            x.new_zeros((*ends, out)),
            x.new_zeros((*ends, H)) if problem.cell.states > 1 else None,
            x.new_zeros((*x.shape[:-1], G * H)) if problem.all_states else None,
            [],
        )


_notebook = _Notebook()


def _explain_call(
    name: str, layer: Layers | Step, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Explanation]:
    """One explanation for each layer of the stack; `name` is the layer's in a model."""
    if isinstance(layer, Layers):
        weights = layer._weights()
    else:
        weights = [[layer.weight_ih, layer.weight_hh, layer.bias_ih, layer.bias_hh]]
    leaves = map(_tensor_of, tree_leaves((args, kwargs, weights)))
    stop_at_overrides(tuple(leaves))
    _notebook.problems = []
    # Without gradients, of which autograd would want to see the way.
    with torch.no_grad(), only(_notebook), _random_numbers_kept(weights[0][0].device):
        layer.forward(*args, **kwargs)
    grad = any(_requires_grad(leaf) for leaf in tree_leaves((args, kwargs)))
    explanations = []
    for k, (problem, flat) in enumerate(zip(_notebook.problems, weights, strict=True)):
        grad = grad or any(map(_requires_grad, flat))
        posed = problem._replace(grad=grad and torch.is_grad_enabled())
        explanations.append(_explain_one(k, posed, name))
    if isinstance(layer, Step) and layer._is_for_torch(*args, **kwargs):
        explanations = [dataclasses.replace(e, serves="aten") for e in explanations]
    return explanations


def _random_numbers_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Dropout draws the same numbers after the block as it would have without it."""
    pretended = device.type == "cuda" and not torch.cuda.is_available()  # by fake tensors
    if device.type in ("cpu", "meta") or pretended:
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def _requires_grad(leaf: Any) -> bool:
    tensor = _tensor_of(leaf)
    return isinstance(tensor, Tensor) and tensor.requires_grad


def _tensor_of(leaf: Any) -> Any:
    return leaf.data if isinstance(leaf, PackedSequence) else leaf


def _explain_one(layer: int, problem: Problem, name: str) -> Explanation:
    reasons = {b.name: reason for b in BACKENDS if (reason := refusal(b, problem)) is not None}
    try:
        serves = choose(problem).name
    except RuntimeError:
        return Explanation(layer, problem, None, reasons, name)
    times = record.measured(*timed_as(problem)) if asked() is None else None
    others = [b.name for b in BACKENDS if b.name != serves and b.name not in reasons]
    measured = None if times is None else times.tells(serves, others)
    return Explanation(layer, problem, serves, reasons, name, measured)
