"""A layer call: the autograd.Function over the operators, or the short way without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import BACKENDS, Weights, choose
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
        if not torch.compiler.is_compiling() and any(map(_is_batched, (dy, dh_n, dc_n))):
            inputs = (x, h0, c0, *weights)
            call = (cell, batch_sizes, reverse, batch)
            return _batched_backward(call, inputs, needs, (dy, dh_n, dc_n))
        with torch.no_grad():
            given = (dy, dh_n, dc_n, x, h0, c0, *rest)
            run = ops.backward if _unwatched(given) else torch.ops.fastrnn.backward.default
            grads = run(
                cell, backend, dy, dh_n, dc_n,
                x, batch_sizes, h0, c0, weights, reverse, batch, y, saved, needs,
            )  # fmt: skip
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _Once.apply(len(grads), *grads, *given)  # type: ignore[no-untyped-call]
        return _placed(grads, needs)


def _placed(grads: Iterable[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The needed gradients where Scan.forward has its arguments."""
    each = iter(grads)
    dx, *others = (next(each) if needed else None for needed in needs)
    return None, None, None, None, dx, None, *others


def _is_batched(grad: Tensor | None) -> bool:
    if grad is None:
        return False
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(grad)
    return wrapped or torch._C._functorch.is_legacy_batchedtensor(grad)


def _batched_backward(
    call: tuple[str, Tensor | None, list[bool], int],
    inputs: tuple[Tensor | None, ...],
    needs: Sequence[bool],
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Many incoming gradients at once (``is_grads_batched``, vectorized Jacobians) have no memory
    that a kernel could read: the layer runs again in plain torch, which differentiates so."""
    cell, batch_sizes, reverse, batch = call
    plain = next(b for b in BACKENDS if b.differentiable)
    with torch.enable_grad():
        leaves = [
            None if t is None else t.detach().requires_grad_(needed)
            for t, needed in zip(inputs, needs, strict=True)
        ]
        x, h0, c0, *weights = leaves
        assert x is not None
        problem = ops.describe(cell, x, batch_sizes, weights, reverse, batch, True)
        *outputs, _ = plain.forward(problem, x, batch_sizes, h0, c0, weights, reverse, False)
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in used], wanted, [g for _, g in used], materialize_grads=True
    )
    return _placed(found, needs)


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
