"""A cell's step, by the shortest path from its tensors to a kernel; where there is none, as a layer
of one timestep.

A small step takes less time than what surrounds a layer: looking at its options, dimensions for
time and groups, outputs that are states too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _torch, functional, record
from .autograd import plain_backward
from .backends import Grads, Inputs, Problem, StepInputs, TakesSteps, asked, choose
from .cells import CELLS, States
from .plain import all_plain, is_watched, signature

Check = Callable[[StepInputs], None]


def step(cell: str, inputs: StepInputs, check: Check, sizes: tuple[int, int]) -> States:
    """One timestep of one group.

    Args:
        cell: a key of :data:`fastrnn.cells.CELLS`.
        inputs: the weights are w_ih [gates*H, I], w_hh [gates*H, H], b_ih and b_hh [gates*H] or
            None, in torch's gate order.
        check: what raises if x and the states do not fit `sizes`; not called where the same shapes
            have passed.
        sizes: what `check` compares with.

    Returns:
        The new states [B, H]: h and, for cells with one, c.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
    """
    x, h0, c0, weights = inputs
    tensors = (x, h0, c0, *weights)
    read = signature(tensors)
    if read is None:
        check(inputs)
        return _as_layer(cell, inputs)
    grad = torch.is_grad_enabled() and _any_requires_grad(tensors)
    key = (cell, sizes, grad, asked(), read)
    bound = _bound.get(key, _UNKNOWN)  # in one access, as another thread may clear the dictionary
    if bound is _UNKNOWN:
        check(inputs)
        bound = Bound.of(cell, inputs, grad)
        _remember(key, bound)
    return _as_layer(cell, inputs) if bound is None else bound.run(inputs)


class Bound(NamedTuple):
    """What the steps of equal dtypes, devices and shapes have in common."""

    problem: Problem
    kernel: TakesSteps

    @classmethod
    def of(cls, cell: str, inputs: StepInputs, grad: bool) -> Bound | None:
        """None if the backend that serves it takes layers only, or may be another one next time, as
        on a GPU."""
        layer = inputs.of_layer()
        given, options = (_states(layer), None), ((False,), False, 0)
        problem = functional.checked_problem(CELLS[cell], layer, None, given, options, None, grad)
        backend = choose(problem)
        if problem.device.type != "cpu" or not isinstance(backend, TakesSteps):
            return None
        return cls(problem, backend)

    def run(self, inputs: StepInputs) -> States:
        """The new states."""
        problem, kernel = self
        if problem.grad:
            x, h0, c0, weights = inputs
            h, c = _apply(self, x, h0, c0, *weights)  # type: ignore[no-untyped-call]
        else:
            h, c, _ = kernel.step(problem, inputs, False)
        return (h,) if c is None else (h, c)


# The steps that have passed the checks, by all that may decide who serves them; None: as layers.
_bound: dict[tuple[object, ...], Bound | None] = record.choices()
_MOST_BOUND = 4096
_UNKNOWN: Any = object()


def _remember(key: tuple[object, ...], bound: Bound | None) -> None:
    if len(_bound) >= _MOST_BOUND:
        _bound.clear()
    _bound[key] = bound


def _any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    for t in reversed(tensors):  # noqa: SIM110 - any() takes longer; the weights do, as a rule
        if t is not None and t.requires_grad:
            return True
    return False


def _as_layer(cell: str, inputs: StepInputs) -> States:
    layer = inputs.of_layer()
    _, ends, _ = functional.layer(cell, layer.x, _states(layer), layer.weights)
    return tuple(without_lead(s) for s in ends)


def _states(layer: Inputs) -> States | None:
    h0, c0, _, _ = layer.states
    return None if h0 is None else (h0,) if c0 is None else (h0, c0)


def without_lead(state: Tensor) -> Tensor:
    """A new state without its first dimension. In place, so that it is no view: those cannot be
    detached in place, as loops do. A subclass's is a view already, which cannot be changed so."""
    return state.squeeze_(0) if type(state) is Tensor else state.squeeze(0)


class CellStep(torch.autograd.Function):
    """A step on a backend that takes it as it is, of plain tensors.

    Its gradients are differentiable: where a graph of them is asked for (``create_graph``), or
    anybody watches the backward pass, they are computed by the plain torch backend instead."""

    @staticmethod
    def forward(
        ctx: Any,
        bound: Bound,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        h, c, saved = bound.kernel.step(bound.problem, StepInputs(x, h0, c0, weights), True)
        ctx.set_materialize_grads(False)
        ctx.bound = bound
        ctx.save_for_backward(x, h0, c0, *weights, *saved)
        return h, c

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None) -> tuple[Tensor | None, ...]:
        _, *needs = ctx.needs_input_grad
        if dh is None and dc is None:
            return None, *(None for _ in needs)
        x, h0, c0, *others = ctx.saved_tensors
        weights, saved = others[: len(needs) - 3], others[len(needs) - 3 :]
        inputs = StepInputs(x, h0, c0, weights)
        problem, kernel = ctx.bound
        with _torch.DisableAutocast():  # which forward() may not have been called under
            if torch.is_grad_enabled() or is_watched() or not all_plain((dh, dc)):
                return None, *_plain_gradients(problem, inputs, dh, dc, needs)
            with _torch.DisableTorchFunction():  # see plain.put_aside_default_device
                return None, *kernel.step_backward(problem, inputs, saved, (dh, dc), needs)


# Its apply without what torch does first for transforms, of which plain tensors know nothing.
_apply = super(torch.autograd.Function, CellStep).apply


def _plain_gradients(
    problem: Problem,
    inputs: StepInputs,
    dh: Tensor | None,
    dc: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    dh_n, dc_n = (None if d is None else d.unsqueeze(0) for d in (dh, dc))
    wanted = (*needs[:3], False, False, *needs[3:])
    found = plain_backward(problem, inputs.of_layer(), Grads(None, dh_n, dc_n, None), wanted, 1)
    first = [None if d is None else d.squeeze(0) for d in found[:3]]
    return [*first, *found[5:]]
