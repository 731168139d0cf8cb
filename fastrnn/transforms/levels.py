"""Layers under torch.func, from the innermost transform outwards.

What the Functions of :mod:`.functions` do for every nesting is done here by hand, without the
machinery that torch puts around each Function, for the common ones: an innermost vmap, and one
transform that differentiates, with vmaps around it. The most common are found out about once: see
:mod:`.folds`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch, autograd, ops
from ..autograd import Route, wants_gradients
from ..backends import Backend, Grads, Inputs, Outputs, Problem
from .functions import Backward, Forward, plain_gradients
from .members import Call, Dims, Members, as_inputs, as_tensors
from .wrappers import (
    Below,
    OneLevel,
    innermost,
    is_inside,
    is_tracked,
    unwrap_members,
    unwrap_tracked,
    wrap_members,
    wrap_tracked,
)

_OUTERMOST = 1  # the number of the transform that no other is around


def scan(
    backend: Backend, problem: Problem, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run one layer under torch.func's transforms: y, h_n, c_n and c."""
    level, found = innermost(), None
    if level is not None:
        kind = level.key()
        if kind == _torch.TransformType.Vmap:
            found = _scan_members(backend, problem, inputs, level)
        elif kind == _torch.TransformType.Grad:
            found = _scan_differentiated(backend, problem, inputs, level.level())
    if found is not None:
        return found
    if inputs.unbatched():
        outputs = scan(backend, problem, inputs.with_batch())
        return Outputs(*outputs, []).without_batch()[:4]
    if level is None:
        problem = problem._replace(grad=wants_gradients(inputs))
        return autograd.scan(Route.below(problem, backend, inputs), inputs)
    x, batch_sizes, lengths, reset, states, weights = inputs
    tensors = [x, *states, *weights]
    if not torch.is_grad_enabled():  # which an autograd.Function does not hand down the levels
        tensors = [None if t is None else t.detach() for t in tensors]
    grad = any(is_tracked(t) for t in tensors if t is not None)
    call = Call(backend, problem._replace(grad=grad))
    outputs = Forward.apply(  # type: ignore[no-untyped-call]
        call, tensors[0], batch_sizes, lengths, reset, *tensors[1:]
    )
    return ops.structured(problem, outputs)[:4]


def _scan_members(
    backend: Backend, problem: Problem, inputs: Inputs, level: _torch.CInterpreter
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """One call for all members of the innermost transform, a vmap; None where it cannot serve them.

    :class:`Forward`'s rule does the same. But torch takes longer to get to that rule than a small
    layer takes to run, and where only vmaps are active nothing needs to be a Function."""
    number = level.level()
    given, dims = unwrap_members(as_tensors(inputs), number)
    if all(d is None for d in dims):
        with Below():
            return scan(backend, problem, as_inputs(given))
    members = members_on(backend, level, problem, dims, inputs.unbatched())
    if members is None:
        return None
    return run_members(
        members, number, given, dims, lambda ours: scan(backend, members.problem, ours)
    )


def run_members(
    members: Members,
    number: int,
    given: Sequence[Tensor | None],
    dims: Dims,
    run: Callable[[Inputs], Sequence[Tensor | None]],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Of the innermost vmap, whose number it is; `run` runs all of its members below it."""
    with Below():
        parts = members.parts(run(as_inputs(members.inputs(given, dims))))
    return wrap_members(parts, members.axes, number)  # type: ignore[no-any-return]


def members_on(
    backend: Backend,
    level: _torch.CInterpreter,
    problem: Problem,
    dims: Dims,
    unbatched: bool,
) -> Members | None:
    """The members of a vmap as a call that the backend serves, if there is one. Stacked weights no
    transform of torch's shall see: no other may be around the vmap."""
    members = Members.of(_torch.CVmapInterpreterPtr(level).batchSize(), problem, dims, unbatched)
    if members is None:
        return None
    if members.groups and level.level() == _OUTERMOST:
        stacked = members.with_stacks
        if not backend.supports(stacked.problem):
            return stacked
    return None if backend.supports(members.problem) else members


_Pull = Callable[[Call, Grads], Sequence[Tensor]]  # a backward pass, of the call that ran forward
_Run = tuple[Sequence[Tensor | None], _Pull]  # y, h_n, c_n and c, and their backward pass


class _Differentiated(_torch.SingleLevelFunction):
    """A layer under the one transform that differentiates it, with vmaps around that.

    It does what :class:`Forward` does there, without its cost: of a Function torch makes a new
    class for each call and each level. `how` is the call, its level's number, and
    :func:`_forward_and_pull` of it."""

    @staticmethod
    def forward(ctx: Any, how: tuple[Call, int, Any], *tensors: Any) -> Any:
        ctx.call, ctx.level, (outputs, ctx.pull) = how
        ctx.set_materialize_grads(False)
        y, *others = wrap_tracked(outputs, ctx.level)
        ctx.save_for_backward(*tensors, y)  # so that autograd sees y changed before `pull` reads it
        return y, *others

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, need_x, _, _, _, *need_rest = needed = ctx.needs_input_grad
        if all(g is None for g in grads):
            return (None,) * len(needed)
        call = Call(ctx.call.backend, ctx.call.problem, (need_x, *need_rest))
        *tensors, _ = ctx.saved_tensors
        if is_inside(ctx.level, tensors):
            with OneLevel():
                found = _Pulled.apply((call, ctx.level, ctx.pull), *tensors, *grads)  # type: ignore[attr-defined]
        elif _torch.is_forward_differentiated():
            found = plain_gradients(call, as_inputs(tensors), Grads(*grads))
        else:  # the transform is over, or others are active inside of it: they need it all anew
            found = _anew(call, tensors, grads)
        each = iter(found)
        places = (False, need_x, False, False, False, *need_rest)
        return tuple([next(each) if need else None for need in places])


def _anew(call: Call, tensors: Sequence[Any], grads: Sequence[Any]) -> Sequence[Tensor]:
    """The gradients, through Functions that any transform sees through."""
    inputs = as_inputs(tensors)
    if inputs.unbatched():
        outer = [None if g is None else g.unsqueeze(1) for g in grads]
        found = _anew(call, (inputs.x.unsqueeze(1), *tensors[1:]), outer)
        return [found[0].squeeze(1), *found[1:]] if call.needs[0] else found
    y, _, _, _, *saved = Forward.apply(call, *tensors)  # type: ignore[no-untyped-call]
    gradients: tuple[Tensor, ...] = Backward.apply(call, *tensors, *grads, y, *saved)  # type: ignore[no-untyped-call]
    return gradients


class _Pulled(_torch.SingleLevelFunction):
    """Its backward pass, which has derivatives as :class:`Backward` has."""

    @staticmethod
    def forward(ctx: Any, how: tuple[Call, int, _Pull], *tensors: Any) -> Any:
        ctx.call, number, pull = how
        ctx.save_for_backward(*tensors)
        grads = unwrap_tracked(tensors[-4:], number)
        with Below():
            found = pull(ctx.call, Grads(*grads))
        return wrap_tracked(found, number)

    backward = Backward.backward


def _scan_differentiated(
    backend: Backend, problem: Problem, inputs: Inputs, number: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """The call under the innermost transform, which differentiates it; None where another one, or
    autograd outside of all, does so too, or where the vmaps around it do not fold into one call."""
    if _torch.is_forward_differentiated() or not torch.is_grad_enabled():
        return None
    outer = (_torch.interpreters() or [])[:-1]
    if any(level.key() != _torch.TransformType.Vmap for level in outer):
        return None
    given = unwrap_tracked(as_tensors(inputs), number)
    if not problem.grad or any(t is not None and is_tracked(t) for t in given):
        return None
    call = Call(backend, problem)
    with Below():  # where nothing is tracked
        run = _forward_and_pull(call, as_inputs(given), inputs.x.requires_grad)
    return None if run is None else differentiated(call, number, run, inputs)


def differentiated(
    call: Call, number: int, run: _Run, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What has `run` below the innermost transform, as that one sees it."""
    with OneLevel():
        outputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = _Differentiated.apply(  # type: ignore[attr-defined]
            (call, number, run), *as_tensors(inputs)
        )
    return outputs


def _forward_and_pull(call: Call, inputs: Inputs, wants_dx: bool) -> _Run | None:
    """Under vmaps alone, a forward pass and what runs its backward pass; None where a vmap does not
    fold."""
    level, unbatched = innermost(), inputs.unbatched()
    if level is None:
        if unbatched:
            return None
        return kernel_and_pull(Route.below(call.problem, call.backend, inputs), inputs)
    number = level.level()
    given, dims = unwrap_members(as_tensors(inputs), number)
    members = members_on(call.backend, level, call.problem, dims, unbatched)
    if members is None:
        return None
    if all(d is None for d in dims) or (members.groups and wants_dx and not members.own_x):
        return None
    whole = Call(call.backend, members.problem)
    return members_and_pull(
        members, number, given, dims, lambda ours: _forward_and_pull(whole, ours, wants_dx)
    )


def kernel_and_pull(
    route: Route, inputs: Inputs
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], _Pull]:
    """Below all transforms."""
    y, h_n, c_n, c, saved = route.forward(inputs, True)

    def pull(call: Call, grads: Grads) -> Sequence[Tensor]:
        found = route.backward(inputs, y, saved, grads, call.needs, call.samples)
        return [d for d in found if d is not None]

    return (y, h_n, c_n, c), pull


def members_and_pull(
    members: Members,
    number: int,
    given: Sequence[Tensor | None],
    dims: Dims,
    run: Callable[[Inputs], _Run | None],
) -> _Run | None:
    """Of the innermost vmap, whose number it is; `run` runs all of its members below it."""
    with Below():
        found = run(as_inputs(members.inputs(given, dims)))
        if found is None:
            return None
        outputs, pull_all = found
        parts = members.parts(outputs)

    def pull(call: Call, grads: Grads) -> Sequence[Tensor]:
        values, grads_dims = unwrap_members(grads, number)
        with Below():
            outer = Grads(*members.grads(values, grads_dims))
            found, axes = members.gradients(call, pull_all(members.backward_call(call), outer))
        wrapped: Sequence[Tensor] = wrap_members(found, axes, number)
        return wrapped

    return wrap_members(parts, members.axes, number), pull
