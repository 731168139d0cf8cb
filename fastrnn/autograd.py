"""A layer call: the autograd.Function over the operators, or the short way without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import Weights, choose
from .cells import CELLS

Outputs = tuple[Tensor, Tensor, Tensor | None]
_PLAIN = (Tensor, torch.nn.Parameter)


class _Once(torch.autograd.Function):
    """Gradients that raise when they are differentiated again, by whatever they depend on.

    torch's once_differentiable does not: where the incoming gradient is a constant, as that of a
    sum is, or where another path leads to the input, second derivatives are silently left out.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            "the gradient of a fastrnn kernel cannot be differentiated again; run the forward "
            'pass under fastrnn.backend("reference"), which can'
        )


class Scan(torch.autograd.Function):
    """A layer on a backend with a backward pass of its own, which cannot be differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        backend: str,
        reverse: list[bool],
        batch: int,
        x: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor | None,
    ) -> Outputs:
        given = (x, h0, c0, *weights)
        run = ops.forward if _unwatched(given) else torch.ops.fastrnn.forward.default
        y, h_n, c_n, *saved = run(
            cell, backend, x, batch_sizes, h0, c0, weights, reverse, batch, True
        )
        ctx.set_materialize_grads(False)
        ctx.call = cell, backend, reverse, batch
        ctx.save_for_backward(x, batch_sizes, h0, c0, *weights, y, *saved)
        ctx.weights = len(weights)
        return y, h_n, c_n if CELLS[cell].states > 1 else None

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        cell, backend, reverse, batch = ctx.call
        x, batch_sizes, h0, c0, *rest = ctx.saved_tensors
        weights, y, saved = rest[: ctx.weights], rest[ctx.weights], rest[ctx.weights + 1 :]
        _, _, _, _, need_x, _, *need_rest = ctx.needs_input_grad
        needs = [need_x, *need_rest]
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * len(ctx.needs_input_grad)
        with torch.no_grad():
            given = (dy, dh_n, dc_n, x, h0, c0, *rest)
            run = ops.backward if _unwatched(given) else torch.ops.fastrnn.backward.default
            grads = run(
                cell, backend, dy, dh_n, dc_n,
                x, batch_sizes, h0, c0, weights, reverse, batch, y, saved, needs,
            )  # fmt: skip
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _Once.apply(len(grads), *grads, *given)  # type: ignore[no-untyped-call]
        each = iter(grads)
        dx, *others = (next(each) if needed else None for needed in needs)
        return None, None, None, None, dx, None, *others


def scan(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Weights,
    reverse: Sequence[bool],
    batch: int,
) -> Outputs:
    """Run one layer on the backend chosen for it: y, h_n, c_n (None for cells without).

    The arguments are those of :class:`fastrnn.backends.Backend`, already checked.
    """
    given = (x, h0, c0, *weights)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    problem = ops.describe(cell, x, batch_sizes, weights, reverse, batch, grad)
    backend = choose(problem)
    if backend.differentiable or (not grad and _unwatched(given)):
        y, h_n, c_n, _ = backend.forward(problem, x, batch_sizes, h0, c0, weights, reverse, False)
        return y, h_n, c_n
    if grad:
        outputs: Outputs = Scan.apply(  # type: ignore[no-untyped-call]
            cell, backend.name, list(reverse), batch, x, batch_sizes, h0, c0, *weights
        )
        return outputs
    y, h_n, c_n = torch.ops.fastrnn.forward.default(
        cell, backend.name, x, batch_sizes, h0, c0, weights, reverse, batch, False
    )
    return y, h_n, c_n if problem.cell.states > 1 else None


def _unwatched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a kernel may read the tensors' memory as it is, and nobody watches the dispatcher."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and all(t is None or (type(t) in _PLAIN and not t.is_neg()) for t in tensors)
    )
