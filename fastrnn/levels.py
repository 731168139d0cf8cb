"""Layers under torch.func, from the innermost transform outwards.

What the Functions of :mod:`fastrnn.transforms` do for every nesting is done here by hand, without
the machinery that torch puts around each Function, for the common ones: an innermost vmap, and one
transform that differentiates, with vmaps around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._functorch import autograd_function as single_level
from torch._functorch.pyfunctorch import (
    FuncTorchInterpreter,
    VmapInterpreter,
    retrieve_current_functorch_interpreter,
)
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import ops
from .autograd import run, run_backward, run_forward
from .backends import Grads, Inputs, Problem, by_name
from .members import Call, Dims, Members, as_inputs
from .transforms import Backward, Forward, plain_gradients


def scan(
    backend: str, problem: Problem, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run one layer under torch.func's transforms: y, h_n, c_n and c."""
    if not torch._C._are_functorch_transforms_active():
        return run(backend, problem, inputs)
    level = retrieve_current_functorch_interpreter()
    if isinstance(level, VmapInterpreter):
        found = _scan_members(backend, problem, inputs, level)
        if found is not None:
            return found
    elif _is_alone(inputs, level):
        found = _scan_differentiated(backend, problem, inputs)
        if found is not None:
            return found
    x, batch_sizes, lengths, reset, states, weights = inputs
    tensors = [x, *states, *weights]
    if not torch.is_grad_enabled():  # which an autograd.Function does not hand down the levels
        tensors = [None if t is None else t.detach() for t in tensors]
    grad = any(_is_tracked(t) for t in tensors if t is not None)
    call = Call(backend, problem._replace(grad=grad))
    outputs = Forward.apply(  # type: ignore[no-untyped-call]
        call, tensors[0], batch_sizes, lengths, reset, *tensors[1:]
    )
    return ops.structured(problem, outputs)[:4]


def _scan_members(
    backend: str, problem: Problem, inputs: Inputs, level: VmapInterpreter
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """One call for all members of the innermost transform, a vmap; None where it cannot serve them.

    :class:`Forward`'s rule does the same. But torch takes longer to get to that rule than a small
    layer takes to run, and where only vmaps are active nothing needs to be a Function."""
    given, dims = _unwrap_members((*inputs[:4], *inputs.states, *inputs.weights), level)
    if all(d is None for d in dims):
        with level.lower():
            return scan(backend, problem, as_inputs(given))
    members = _members_on(backend, level, problem, dims)
    if members is None:
        return None
    with level.lower():
        ours = as_inputs(members.inputs(given, dims))
        parts = members.parts(scan(backend, members.problem, ours))
    return _wrap_members(parts, members.axes, level)  # type: ignore[no-any-return]


def _members_on(
    backend: str, level: VmapInterpreter, problem: Problem, dims: Dims
) -> Members | None:
    """The members of a vmap as a call that the backend serves, if there is one."""
    members = Members.of(level.batch_size(), problem, dims)
    if members is None:
        return None
    serves = by_name(backend)
    if len(get_interpreter_stack() or ()) == 1:  # no transform of torch's shall see stacked weights
        stacked = members.stack()
        if not serves.supports(stacked.problem):
            return stacked
    return None if serves.supports(members.problem) else members


def _innermost_vmap() -> VmapInterpreter:
    level = retrieve_current_functorch_interpreter()
    assert isinstance(level, VmapInterpreter)
    return level


def _unwrap_members(
    tensors: Sequence[Tensor | None], level: VmapInterpreter
) -> tuple[tuple[Tensor | None, ...], Dims]:
    """What a vmap has wrapped, and the axes that it hides."""
    unwrap, number = torch._C._functorch._unwrap_batched, level.level()
    pairs = [(None, None) if t is None else unwrap(t, number) for t in tensors]
    given, dims = zip(*pairs, strict=True)
    return given, dims


def _wrap_members(tensors: Sequence[Tensor | None], axes: Dims, level: VmapInterpreter) -> Any:
    """Undo :func:`_unwrap_members`."""
    wrap, number = torch._C._functorch._add_batch_dim, level.level()
    pairs = zip(tensors, axes, strict=True)
    return tuple(None if t is None or axis is None else wrap(t, axis, number) for t, axis in pairs)


_Pull = Callable[[Call, Grads], Sequence[Tensor]]  # a backward pass, of the call that ran forward


class _Differentiated(_SingleLevelFunction):
    """A layer under the one transform that differentiates it, with vmaps around that.

    It does what :class:`Forward` does there, without its cost: of a Function torch makes a new
    class for each call and each level. `run` is :func:`_forward_and_pull` of the call."""

    @staticmethod
    def forward(ctx: Any, call: Call, run: Any, *tensors: Any) -> Any:
        level = retrieve_current_functorch_interpreter()
        outputs, ctx.pull = run
        ctx.call, ctx.level = call, level.level()
        ctx.set_materialize_grads(False)
        y, *others = _wrap_tracked(outputs, level)
        ctx.save_for_backward(*tensors, y)  # so that autograd sees y changed before `pull` reads it
        return y, *others

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, need_x, _, _, _, *need_rest = needed = ctx.needs_input_grad
        if all(g is None for g in grads):
            return (None,) * len(needed)
        call = replace(ctx.call, needs=(need_x, *need_rest))
        *tensors, _ = ctx.saved_tensors
        if _is_inside(ctx.level, tensors):
            with single_level.enable_single_level_autograd_function():  # type: ignore[attr-defined]
                found = _Pulled.apply((call, ctx.pull), *tensors, *grads)  # type: ignore[attr-defined]
        elif forward_ad._current_level >= 0:
            found = plain_gradients(call, as_inputs(tensors), Grads(*grads))
        else:  # the transform is over, or others are active inside of it: they need it all anew
            y, _, _, _, *saved = Forward.apply(call, *tensors)  # type: ignore[no-untyped-call]
            found = Backward.apply(call, *tensors, *grads, y, *saved)  # type: ignore[no-untyped-call]
        each = iter(found)
        places = (False, False, need_x, False, False, False, *need_rest)
        return tuple(next(each) if need else None for need in places)


class _Pulled(_SingleLevelFunction):
    """Its backward pass, which has derivatives as :class:`Backward` has."""

    @staticmethod
    def forward(ctx: Any, how: tuple[Call, _Pull], *tensors: Any) -> Any:
        level = retrieve_current_functorch_interpreter()
        call, pull = how
        ctx.call = call
        ctx.save_for_backward(*tensors)
        grads = _unwrap_tracked(tensors[call.inputs :], level)
        with level.lower():
            found = pull(call, Grads(*grads))
        return _wrap_tracked(found, level)

    backward = Backward.backward


def _scan_differentiated(
    backend: str, problem: Problem, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """The call under the innermost transform, which differentiates; None where the vmaps around it
    do not fold into one call."""
    level = retrieve_current_functorch_interpreter()
    call = Call(backend, problem._replace(grad=True))
    tensors = (*inputs[:4], *inputs.states, *inputs.weights)
    given = _unwrap_tracked(tensors, level)
    wants_dx = inputs.x.requires_grad
    with torch.no_grad(), level.lower():
        run = _forward_and_pull(call, given, wants_dx)
    if run is None:
        return None
    with single_level.enable_single_level_autograd_function():  # type: ignore[attr-defined]
        outputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = _Differentiated.apply(  # type: ignore[attr-defined]
            call, run, *tensors
        )
    return outputs


def _forward_and_pull(
    call: Call, tensors: Sequence[Any], wants_dx: bool
) -> tuple[Sequence[Tensor | None], _Pull] | None:
    """Under vmaps alone, a forward pass and what runs its backward pass; None where a vmap does not
    fold."""
    if not torch._C._are_functorch_transforms_active():
        inputs = as_inputs(tensors)
        y, h_n, c_n, c, saved = run_forward(call.backend, call.problem, inputs, True)

        def pull_kernel(call: Call, grads: Grads) -> Sequence[Tensor]:
            return run_backward(
                call.backend, call.problem, inputs, y, saved, grads, call.needs, call.samples
            )

        return (y, h_n, c_n, c), pull_kernel
    level = _innermost_vmap()
    given, dims = _unwrap_members(tensors, level)
    members = _members_on(call.backend, level, call.problem, dims)
    if members is None:
        return None
    if all(d is None for d in dims) or (members.groups and wants_dx and not members.own_x):
        return None
    with level.lower():
        whole = replace(call, problem=members.problem)
        run = _forward_and_pull(whole, members.inputs(given, dims), wants_dx)
        if run is None:
            return None
        outputs, pull_all = run
        parts = members.parts(outputs)

    def pull(call: Call, grads: Grads) -> Sequence[Tensor]:
        now = _innermost_vmap()
        values, grads_dims = _unwrap_members(grads, now)
        with now.lower():
            outer = Grads(*members.grads(values, grads_dims))
            found, axes = members.gradients(call, pull_all(members.backward_call(call), outer))
        wrapped: Sequence[Tensor] = _wrap_members(found, axes, now)
        return wrapped

    return _wrap_members(parts, members.axes, level), pull


def _is_alone(inputs: Inputs, top: FuncTorchInterpreter) -> bool:
    """Whether the innermost transform differentiates the layer, and no other one, nor autograd
    outside of all, does."""
    if forward_ad._current_level >= 0 or not torch.is_grad_enabled():
        return False
    outer = (get_interpreter_stack() or [])[:-1]
    if top.key() != TransformType.Grad or any(i.key() != TransformType.Vmap for i in outer):
        return False
    tensors = (inputs.x, *inputs.states, *inputs.weights)
    below = _unwrap_tracked(tensors, top)
    tracked = any(t is not None and t.requires_grad for t in tensors)
    return tracked and not any(t is not None and _is_tracked(t) for t in below)


def _is_inside(level: int, tensors: Sequence[Tensor | None]) -> bool:
    """Whether the transform of that number that wrapped these tensors is still the innermost."""
    if not torch._C._are_functorch_transforms_active():
        return False
    if retrieve_current_functorch_interpreter().level() != level:
        return False
    # The number may be another's by now; then the tensors' wrappers are dead.
    get_level = torch._C._functorch.maybe_get_level
    return any(t is not None and get_level(t) == level for t in tensors)


def _unwrap_tracked(
    tensors: Sequence[Tensor | None], level: FuncTorchInterpreter
) -> list[Tensor | None]:
    unwrap, number = torch._C._functorch._unwrap_for_grad, level.level()
    return [None if t is None else unwrap(t, number) for t in tensors]


def _wrap_tracked(
    tensors: Sequence[Tensor | None], level: FuncTorchInterpreter
) -> tuple[Tensor | None, ...]:
    wrap, number = torch._C._functorch._wrap_for_grad, level.level()
    return tuple(None if t is None else wrap(t, number) for t in tensors)


def _is_tracked(tensor: Tensor) -> bool:
    """Whether autograd follows it at any level of transforms; a vmap inside does not show it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad:
            return True
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad
