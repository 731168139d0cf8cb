"""A layer call: the autograd.Function over the operators, or the short way without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .backends import (
    BACKENDS,
    Backend,
    Grads,
    Inputs,
    Outputs,
    Problem,
    Recompute,
    by_name,
    choose,
    refusal,
)
from .plain import all_plain, is_watched


class Scan(torch.autograd.Function):
    """A layer on a backend with a backward pass of its own.

    Its gradients are differentiable too: where a graph of them is asked for (``create_graph``),
    they are computed by the plain torch backend instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        problem: Problem,
        plain: bool,
        x: Tensor,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        h_reset: Tensor | None,
        c_reset: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        inputs = Inputs(x, batch_sizes, lengths, reset, (h0, c0, h_reset, c_reset), weights)
        y, h_n, c_n, c, saved = run_forward(backend, problem, inputs, True, plain)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.problem, ctx.weights = backend, problem, len(weights)
        ctx.save_for_backward(
            x, batch_sizes, lengths, reset, h0, c0, h_reset, c_reset, *weights, y, *saved
        )
        return y, h_n, c_n, c

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dc: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grads = Grads(dy, dh_n, dc_n, dc)
        if dy is None and dh_n is None and dc_n is None and dc is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors, end = ctx.saved_tensors, 8 + ctx.weights
        x, batch_sizes, lengths, reset = tensors[:4]
        inputs = Inputs(x, batch_sizes, lengths, reset, tensors[4:8], tensors[8:end])
        needed = ctx.needs_input_grad
        needs = [needed[3], *needed[7:]]
        y, *saved = tensors[end:]
        if torch.compiler.is_compiling():
            with torch.no_grad():
                found = run_backward(ctx.backend, ctx.problem, inputs, y, saved, grads, needs)
        elif torch.is_grad_enabled() or any(map(_is_batched, grads)):
            found = _plain_backward(ctx.problem, inputs, grads, needs)
        else:
            found = run_backward(ctx.backend, ctx.problem, inputs, y, saved, grads, needs)
        return _placed(found, needs)


# Scan.apply without what torch does first for transforms, of which plain tensors know nothing.
_apply_plain = super(torch.autograd.Function, Scan).apply


def run_forward(
    backend: str, problem: Problem, inputs: Inputs, save: bool, plain: bool = False
) -> Outputs:
    """A backend's forward pass, through the operator if anyone watches; `plain` where the inputs
    are known to be."""
    if plain or (not is_watched() and all_plain(_tensors(inputs))):
        return by_name(backend).forward(problem, inputs, save)
    tensors = torch.ops.fastrnn.forward.default(
        problem.cell.name, backend, *inputs, problem.reverse, problem.B, save, problem.all_states
    )
    return ops.structured(problem, tensors)


def run_backward(
    backend: str,
    problem: Problem,
    inputs: Inputs,
    y: Tensor,
    saved: list[Tensor],
    grads: Grads,
    needs: Sequence[bool],
    samples: int = 1,
) -> list[Tensor]:
    """A backend's backward pass, through the operator if anyone watches."""
    if not is_watched() and all_plain((*_tensors(inputs), *grads, y)):
        with torch._C._DisableAutocast():
            return by_name(backend).backward(problem, inputs, y, saved, grads, needs, samples)
    found: list[Tensor] = torch.ops.fastrnn.backward.default(
        problem.cell.name, backend, *inputs, problem.reverse, problem.B, y, saved, grads, needs,
        samples,
    )  # fmt: skip
    return found


def _placed(grads: Iterable[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The needed gradients where Scan.forward has its arguments."""
    each = iter(grads)
    dx, *others = [next(each) if needed else None for needed in needs]
    return None, None, None, dx, None, None, None, *others


def _is_batched(grad: Tensor | None) -> bool:
    if grad is None:
        return False
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(grad)
    return wrapped or torch._C._functorch.is_legacy_batchedtensor(grad)


def _plain_backward(
    problem: Problem, inputs: Inputs, grads: Grads, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients through the plain torch backend, which runs the layer again.

    They can be differentiated further, and many incoming gradients at once (``is_grads_batched``,
    vectorized Jacobians), which have no memory that a kernel could read, pass through it.
    """
    plain = next(b for b in BACKENDS if b.differentiable)
    return plain.backward(problem, inputs, inputs.x, [], grads, needs, 1)


class Route(NamedTuple):
    """A layer call and who runs it."""

    problem: Problem
    backend: Backend
    plain: bool  # its inputs are known to be plain tensors, which nobody watches

    @classmethod
    def find(cls, problem: Problem, recompute: int, plain: bool) -> Route:
        """By way of the backend that is chosen for the problem."""
        backend = choose(problem)
        if recompute and problem.grad and recompute < problem.T:
            backend = _recomputing(backend, recompute, problem)
        return cls(problem, backend, plain)


def scan(route: Route, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run one layer, whose inputs have been checked: y, h_n, c_n and c."""
    problem, backend, plain = route
    if backend.differentiable:
        return backend.forward(problem, inputs, False)[:4]
    if not plain and torch._C._are_functorch_transforms_active():
        from . import levels  # which needs this module

        return levels.scan(backend.name, problem, inputs)
    return _run(backend.name, problem, inputs, plain)


def run(
    backend: str, problem: Problem, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run what :func:`scan` was given, of inputs that no transform wraps any more."""
    return _run(backend, problem._replace(grad=wants_gradients(inputs)), inputs, False)


def _run(
    backend: str, problem: Problem, inputs: Inputs, plain: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if not problem.grad:
        return run_forward(backend, problem, inputs, False, plain)[:4]
    x, batch_sizes, lengths, reset, states, weights = inputs
    apply = _apply_plain if plain else Scan.apply
    outputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = apply(  # type: ignore[no-untyped-call]
        backend, problem, plain, x, batch_sizes, lengths, reset, *states, *weights
    )
    return outputs


def wants_gradients(inputs: Inputs) -> bool:
    if not torch.is_grad_enabled():
        return False
    for t in (inputs.x, *inputs.weights, *inputs.states):
        if t is not None and t.requires_grad:
            return True
    return False


def _recomputing(backend: Backend, every: int, problem: Problem) -> Backend:
    """The backend with less memory, except under transforms that only plain torch serves."""
    if backend.differentiable and torch._C._are_functorch_transforms_active():
        return backend
    recompute = Recompute(backend, every)
    return backend if refusal(recompute, problem) else recompute


def _tensors(inputs: Inputs) -> tuple[Tensor | None, ...]:
    x, batch_sizes, lengths, reset, states, weights = inputs
    return x, *weights, *states, batch_sizes, lengths, reset


def _operator(
    cell: str,
    backend: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    reverse: Sequence[bool],
    batch: int,
    save: bool,
    all_states: bool,
) -> list[Tensor]:
    """The operator under autograd: in exported programs it stands alone, and Scan not around it.

    What it saves is Scan's then; nobody else reads it."""
    tensors = (x, batch_sizes, lengths, reset, *states, *weights)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    inputs = Inputs(x, batch_sizes, lengths, reset, states, weights)
    if not grad:
        if not is_watched() and all_plain(tensors):
            # As compiled code calls it: the dispatcher need not come again.
            return ops.forward(cell, backend, *inputs, reverse, batch, save, all_states)
        with torch._C._AutoDispatchBelowAutograd():
            found: list[Tensor] = torch.ops.fastrnn.forward.default(
                cell, backend, *inputs, reverse, batch, save, all_states
            )
        return found
    problem = ops.describe(cell, inputs, reverse, batch, all_states, grad)
    y, h_n, c_n, c = Scan.apply(backend, problem, False, *tensors)  # type: ignore[no-untyped-call]
    shapes = by_name(backend).saved_shapes(problem, 0) if save else []
    return ops.flat(Outputs(y, h_n, c_n, c, [x.new_empty(0) for _ in shapes]))


ops.LIBRARY.impl("forward", _operator, "Autograd")
