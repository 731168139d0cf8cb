"""A layer call: the autograd.Function over the operators, or the short way without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _torch, ops
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
from .plain import all_plain, is_watched, signature


class Scan(torch.autograd.Function):
    """A layer on a backend with a backward pass of its own.

    Its gradients are differentiable too: where a graph of them is asked for (``create_graph``),
    they are computed by the plain torch backend instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        route: Route,
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
        y, h_n, c_n, c, saved = route.forward(inputs, True)
        if route.kept is not None:
            route.kept.extend(saved)
        ctx.set_materialize_grads(False)
        ctx.route = route
        ctx.save_for_backward(
            x, batch_sizes, lengths, reset, h0, c0, h_reset, c_reset, *weights, y, *saved
        )
        return y, h_n, c_n, c

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dc: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        if dy is None and dh_n is None and dc_n is None and dc is None:
            return (None,) * len(needed)
        tensors, end = ctx.saved_tensors, len(needed) - 1
        x, batch_sizes, lengths, reset = tensors[:4]
        inputs = Inputs(x, batch_sizes, lengths, reset, tensors[4:8], tensors[8:end])
        y, *saved = tensors[end:]
        grads, needs = Grads(dy, dh_n, dc_n, dc), needed[1:2] + needed[5:]
        dx, *others = ctx.route.backward(inputs, y, saved, grads, needs)
        return None, dx, None, None, None, *others


# Scan.apply without what torch does first for transforms, of which plain tensors know nothing.
_apply_plain = super(torch.autograd.Function, Scan).apply


def run_forward(backend: Backend, problem: Problem, inputs: Inputs, save: bool) -> Outputs:
    """A backend's forward pass, through the operator if anyone watches."""
    if not is_watched() and all_plain(_tensors(inputs)):
        return backend.forward(problem, inputs, save)
    tensors = torch.ops.fastrnn.forward.default(
        problem.cell.name, backend.name, *inputs, problem.reverse, problem.B, save,
        problem.all_states,
    )  # fmt: skip
    return ops.structured(problem, tensors)


def run_backward(
    backend: Backend,
    problem: Problem,
    inputs: Inputs,
    y: Tensor,
    saved: list[Tensor],
    grads: Grads,
    needs: Sequence[bool],
    samples: int = 1,
) -> list[Tensor]:
    """A backend's backward pass, through the operator if anyone watches: the needed gradients."""
    if not is_watched() and all_plain((*_tensors(inputs), *grads, y, *saved)):
        with _torch.DisableAutocast():
            found = backend.backward(problem, inputs, y, saved, grads, needs, samples)
        return [d for d in found if d is not None]
    needed: list[Tensor] = torch.ops.fastrnn.backward.default(
        problem.cell.name, backend.name, *inputs, problem.reverse, problem.B, y, saved, grads,
        needs, samples,
    )  # fmt: skip
    return needed


def is_batched(grad: Tensor | None) -> bool:
    if grad is None:
        return False
    wrapped: bool = _torch.is_wrapped(grad)
    return wrapped or _torch.is_legacy_batched(grad)


def plain_backward(
    problem: Problem, inputs: Inputs, grads: Grads, needs: Sequence[bool], samples: int
) -> Sequence[Tensor | None]:
    """Gradients through the plain torch backend, which runs the layer again.

    They can be differentiated further, and many incoming gradients at once (``is_grads_batched``,
    vectorized Jacobians), which have no memory that a kernel could read, pass through it.
    """
    plain = next(b for b in BACKENDS if b.differentiable)
    return plain.backward(problem, inputs, inputs.x, [], grads, needs, samples)


class Route(NamedTuple):
    """A layer call and who runs it."""

    problem: Problem
    backend: Backend
    plain: bool = False  # for plain tensors, which nobody watches
    # On a GPU backends look at more: torch's settings of precision, the state of the device.
    settled: bool = False  # nothing but the problem decides who serves it
    kept: list[Tensor] | None = None  # where what is saved for the backward pass goes as well

    @classmethod
    def find(cls, problem: Problem, recompute: int, plain: bool) -> Route:
        """By way of the backend that is chosen for the problem."""
        backend = choose(problem)
        if recompute and problem.grad and recompute < problem.T:
            backend = _recomputing(backend, recompute, problem)
        return cls(problem, backend, plain, problem.device.type == "cpu")

    @classmethod
    def below(cls, problem: Problem, backend: Backend, inputs: Inputs) -> Route:
        """Of inputs that no transform of torch.func wraps any more, by way of a backend that is
        chosen already."""
        return cls(problem, backend, signature(_tensors(inputs)) is not None)

    def is_transformed(self) -> bool:
        """Whether transforms of torch.func wrap the inputs of a backend that they do not see
        through."""
        if self.plain or self.backend.differentiable:
            return False
        return _torch.transforms_active()

    def forward(self, inputs: Inputs, save: bool) -> Outputs:
        """The backend's forward pass, through the operator if anyone watches."""
        if self.plain:
            return self.backend.forward(self.problem, inputs, save)
        return run_forward(self.backend, self.problem, inputs, save)

    def backward(
        self,
        inputs: Inputs,
        y: Tensor,
        saved: list[Tensor],
        grads: Grads,
        needs: Sequence[bool],
        samples: int = 1,
    ) -> Sequence[Tensor | None]:
        """Its backward pass: see :class:`fastrnn.backends.Backend`."""
        problem, backend, plain = self.problem, self.backend, self.plain
        if (
            plain
            and not torch.is_grad_enabled()
            and not _torch.autocast_active()
            and not is_watched()
            and all_plain(grads)
        ):
            with _torch.DisableTorchFunction():  # see plain.put_aside_default_device
                return backend.backward(problem, inputs, y, saved, grads, needs, samples)
        if not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or any(map(is_batched, grads))
        ):
            return plain_backward(problem, inputs, grads, needs, samples)
        with torch.no_grad():
            given = run_backward(backend, problem, inputs, y, saved, grads, needs, samples)
        found = iter(given)
        return [next(found) if needed else None for needed in needs]


def scan(route: Route, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run one layer, whose inputs have been checked, by a route that no transform is to be peeled
    off for: y, h_n, c_n and c."""
    problem, backend, plain = route.problem, route.backend, route.plain
    if backend.differentiable:
        y, h_n, c_n, c, _ = backend.forward(problem, inputs, False)
        return y, h_n, c_n, c
    if not problem.grad or (not plain and _torch.wants_operators_alone()):
        # In exported programs the operator stands alone, with its own gradients (_operator): strict
        # export would put Scan.forward there, under the no_grad that a Function's forward runs in.
        y, h_n, c_n, c, _ = route.forward(inputs, False)
        return y, h_n, c_n, c
    x, batch_sizes, lengths, reset, states, weights = inputs
    apply = _apply_plain if plain else Scan.apply
    outputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = apply(  # type: ignore[no-untyped-call]
        route, x, batch_sizes, lengths, reset, *states, *weights
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
    if backend.differentiable and _torch.transforms_active():
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

    A traced training step has a backward operator of its own, which reads what this one saves."""
    tensors = (x, batch_sizes, lengths, reset, *states, *weights)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    inputs = Inputs(x, batch_sizes, lengths, reset, states, weights)
    if not grad:
        if not is_watched() and all_plain(tensors):
            # As compiled code calls it: the dispatcher need not come again.
            return ops.forward(cell, backend, *inputs, reverse, batch, save, all_states)
        with _torch.BelowAutograd():
            found: list[Tensor] = torch.ops.fastrnn.forward.default(
                cell, backend, *inputs, reverse, batch, save, all_states
            )
        return found
    problem = ops.describe(cell, inputs, reverse, batch, all_states, grad)
    kept: list[Tensor] = []
    route = Route(problem, by_name(backend), kept=kept if save else None)
    y, h_n, c_n, c = Scan.apply(route, *tensors)  # type: ignore[no-untyped-call]
    # What else a backend keeps is no part of the operator's result.
    known = len(route.backend.saved_shapes(problem, 0))
    return ops.flat(Outputs(y, h_n, c_n, c, kept[:known]))


ops.LIBRARY.impl("forward", _operator, "Autograd")
