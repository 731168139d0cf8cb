"""Layers under torch.func, from the innermost transform outwards.

What the Functions of :mod:`fastrnn.transforms` do for every nesting is done here by hand, without
the machinery that torch puts around each Function, for the common ones: an innermost vmap, and one
transform that differentiates, with vmaps around it. The most common, one vmap with or without a
transform inside it that differentiates, are found out about once: see :class:`Fold`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import (
    CInterpreter,
    CVmapInterpreterPtr,
    TransformType,
    get_interpreter_stack,
    get_single_level_autograd_function_allowed,
    peek_interpreter_stack,
    pop_dynamic_layer_stack,
    push_dynamic_layer_stack,
    set_single_level_autograd_function_allowed,
)
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import autograd, ops
from .autograd import Route, wants_gradients
from .backends import Backend, Grads, Inputs, Outputs, Problem
from .members import Call, Dims, Members, as_inputs, as_tensors
from .plain import is_followed, signature_below
from .transforms import Backward, Forward, plain_gradients


def scan(
    backend: Backend, problem: Problem, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run one layer under torch.func's transforms: y, h_n, c_n and c."""
    level, found = _innermost(), None
    if level is not None:
        kind = level.key()
        if kind == TransformType.Vmap:
            found = _scan_members(backend, problem, inputs, level)
        elif kind == TransformType.Grad:
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
    grad = any(_is_tracked(t) for t in tensors if t is not None)
    call = Call(backend, problem._replace(grad=grad))
    outputs = Forward.apply(  # type: ignore[no-untyped-call]
        call, tensors[0], batch_sizes, lengths, reset, *tensors[1:]
    )
    return ops.structured(problem, outputs)[:4]


class Peeled(NamedTuple):
    """A layer's tensors, in the order of :class:`Inputs`, without what transforms wrapped them in.

    Attributes:
        tensors: as they are below all transforms.
        levels: from the innermost, each one's number and the axes that it hides; None for those of
            one that differentiates.
        tracked: whether autograd follows any of them, around all transforms.
        signature: equal where all tensors have the same dtypes, devices and shapes at every level,
            and where autograd and a transform want gradients of x, and of any of them, or do not.
    """

    tensors: tuple[Tensor | None, ...]
    levels: list[tuple[int, Dims | None]]
    tracked: bool
    signature: tuple[object, ...]


def peel(inputs: Inputs) -> Peeled | None:
    """None where anybody follows what is computed, with other transforms, and where a vmap hides
    nothing of any tensor, so that they do not tell its size."""
    if is_followed():
        return None
    tensors: Sequence[Tensor | None] = as_tensors(inputs)
    levels: list[tuple[int, Dims | None]] = []
    for level in reversed(get_interpreter_stack() or ()):
        kind, number, dims = level.key(), level.level(), None
        if kind == TransformType.Vmap:
            tensors, dims = _unwrap_members(tensors, number)
            if not any(d is not None for d in dims):
                return None
        elif kind == TransformType.Grad:
            tensors = _unwrap_tracked(tensors, number)
        else:
            return None
        levels.append((number, dims))
    tensors = tuple(tensors)
    read = signature_below(tensors)
    if read is None:
        return None
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    key = (read, tracked, inputs.x.requires_grad, *[d for _, d in levels])
    return Peeled(tensors, levels, tracked, key)


class Fold(NamedTuple):
    """How the members of the only vmap are one call of a kernel."""

    call: Call  # of one member
    members: Members
    whole: Route  # of all of them


def fold(route: Route, inputs: Inputs, peeled: Peeled) -> Fold | None:
    """None where there is more to peel off than a vmap, and a transform inside it that
    differentiates, or where one call cannot serve the members."""
    problem, backend = route.problem, route.backend
    *inner, (_, dims) = peeled.levels
    if backend.differentiable or dims is None or len(inner) > 1:
        return None
    if inner and (inner[0][1] is not None or not problem.grad or peeled.tracked):
        return None
    vmap = (get_interpreter_stack() or [])[0]
    members = _members_on(backend, vmap, problem, dims, inputs.unbatched(), alone=True)
    if members is None:
        return None
    if inner and members.groups and inputs.x.requires_grad and not members.own_x:
        return None
    whole = members.problem if inner else members.problem._replace(grad=peeled.tracked)
    return Fold(Call(backend, problem), members, Route(whole, backend, plain=True))


def scan_folded(
    fold: Fold, peeled: Peeled, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """:func:`scan`, of what is known to fold."""
    *inner, (number, dims) = peeled.levels
    assert dims is not None
    call, members, whole = fold
    if not inner:
        return _run_members(
            members, number, peeled.tensors, dims, lambda ours: autograd.scan(whole, ours)
        )
    with _Below():
        run = _members_and_pull(
            members, number, peeled.tensors, dims, lambda ours: _kernel_and_pull(whole, ours)
        )
    assert run is not None
    return _differentiated(call, inner[0][0], run, inputs)


def _scan_members(
    backend: Backend, problem: Problem, inputs: Inputs, level: CInterpreter
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """One call for all members of the innermost transform, a vmap; None where it cannot serve them.

    :class:`Forward`'s rule does the same. But torch takes longer to get to that rule than a small
    layer takes to run, and where only vmaps are active nothing needs to be a Function."""
    number = level.level()
    given, dims = _unwrap_members(as_tensors(inputs), number)
    if all(d is None for d in dims):
        with _Below():
            return scan(backend, problem, as_inputs(given))
    members = _members_on(backend, level, problem, dims, inputs.unbatched(), _is_alone())
    if members is None:
        return None
    return _run_members(
        members, number, given, dims, lambda ours: scan(backend, members.problem, ours)
    )


def _run_members(
    members: Members,
    number: int,
    given: Sequence[Tensor | None],
    dims: Dims,
    run: Callable[[Inputs], Sequence[Tensor | None]],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Of the innermost vmap, whose number it is; `run` runs all of its members below it."""
    with _Below():
        parts = members.parts(run(as_inputs(members.inputs(given, dims))))
    return _wrap_members(parts, members.axes, number)  # type: ignore[no-any-return]


def _members_on(
    backend: Backend,
    level: CInterpreter,
    problem: Problem,
    dims: Dims,
    unbatched: bool,
    alone: bool,
) -> Members | None:
    """The members of a vmap as a call that the backend serves, if there is one. Stacked weights no
    transform of torch's shall see: no other may be around the vmap."""
    members = Members.of(CVmapInterpreterPtr(level).batchSize(), problem, dims, unbatched)
    if members is None:
        return None
    if members.groups and alone:
        stacked = members.with_stacks
        if not backend.supports(stacked.problem):
            return stacked
    return None if backend.supports(members.problem) else members


def _innermost() -> CInterpreter | None:  # torch does not tell that there may be none
    return peek_interpreter_stack()


def _is_alone() -> bool:
    """Whether no transform is around the innermost."""
    return len(get_interpreter_stack() or ()) == 1


class _Below:
    """Run what is inside below the innermost transform. (torch's own way of it takes longer.)"""

    def __enter__(self) -> None:
        self.level = pop_dynamic_layer_stack()

    def __exit__(self, *exception: object) -> None:
        push_dynamic_layer_stack(self.level)


class _OneLevel:
    """Let Functions of one level be applied, which only they may that know what a level is."""

    def __enter__(self) -> None:
        self.before = get_single_level_autograd_function_allowed()
        set_single_level_autograd_function_allowed(True)

    def __exit__(self, *exception: object) -> None:
        set_single_level_autograd_function_allowed(self.before)


def _unwrap_members(
    tensors: Sequence[Tensor | None], number: int
) -> tuple[tuple[Tensor | None, ...], Dims]:
    """What the vmap of that level's number has wrapped, and the axes that it hides."""
    unwrap = torch._C._functorch._unwrap_batched
    pairs = [(None, None) if t is None else unwrap(t, number) for t in tensors]
    given, dims = zip(*pairs, strict=True)
    return given, dims


def _wrap_members(tensors: Sequence[Tensor | None], axes: Dims, number: int) -> Any:
    """Undo :func:`_unwrap_members`."""
    wrap = torch._C._functorch._add_batch_dim
    pairs = zip(tensors, axes, strict=True)
    wrapped = [None if t is None or axis is None else wrap(t, axis, number) for t, axis in pairs]
    return tuple(wrapped)


_Pull = Callable[[Call, Grads], Sequence[Tensor]]  # a backward pass, of the call that ran forward
_Run = tuple[Sequence[Tensor | None], _Pull]  # y, h_n, c_n and c, and their backward pass


class _Differentiated(_SingleLevelFunction):
    """A layer under the one transform that differentiates it, with vmaps around that.

    It does what :class:`Forward` does there, without its cost: of a Function torch makes a new
    class for each call and each level. `how` is the call, its level's number, and
    :func:`_forward_and_pull` of it."""

    @staticmethod
    def forward(ctx: Any, how: tuple[Call, int, Any], *tensors: Any) -> Any:
        ctx.call, ctx.level, (outputs, ctx.pull) = how
        ctx.set_materialize_grads(False)
        y, *others = _wrap_tracked(outputs, ctx.level)
        ctx.save_for_backward(*tensors, y)  # so that autograd sees y changed before `pull` reads it
        return y, *others

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, need_x, _, _, _, *need_rest = needed = ctx.needs_input_grad
        if all(g is None for g in grads):
            return (None,) * len(needed)
        call = Call(ctx.call.backend, ctx.call.problem, (need_x, *need_rest))
        *tensors, _ = ctx.saved_tensors
        if _is_inside(ctx.level, tensors):
            with _OneLevel():
                found = _Pulled.apply((call, ctx.level, ctx.pull), *tensors, *grads)  # type: ignore[attr-defined]
        elif forward_ad._current_level >= 0:
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


class _Pulled(_SingleLevelFunction):
    """Its backward pass, which has derivatives as :class:`Backward` has."""

    @staticmethod
    def forward(ctx: Any, how: tuple[Call, int, _Pull], *tensors: Any) -> Any:
        ctx.call, number, pull = how
        ctx.save_for_backward(*tensors)
        grads = _unwrap_tracked(tensors[-4:], number)
        with _Below():
            found = pull(ctx.call, Grads(*grads))
        return _wrap_tracked(found, number)

    backward = Backward.backward


def _scan_differentiated(
    backend: Backend, problem: Problem, inputs: Inputs, number: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """The call under the innermost transform, which differentiates it; None where another one, or
    autograd outside of all, does so too, or where the vmaps around it do not fold into one call."""
    if forward_ad._current_level >= 0 or not torch.is_grad_enabled():
        return None
    outer = (get_interpreter_stack() or [])[:-1]
    if any(level.key() != TransformType.Vmap for level in outer):
        return None
    given = _unwrap_tracked(as_tensors(inputs), number)
    if not problem.grad or any(t is not None and _is_tracked(t) for t in given):
        return None
    call = Call(backend, problem)
    with _Below():  # where nothing is tracked
        run = _forward_and_pull(call, as_inputs(given), inputs.x.requires_grad)
    return None if run is None else _differentiated(call, number, run, inputs)


def _differentiated(
    call: Call, number: int, run: _Run, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What has `run` below the innermost transform, as that one sees it."""
    with _OneLevel():
        outputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = _Differentiated.apply(  # type: ignore[attr-defined]
            (call, number, run), *as_tensors(inputs)
        )
    return outputs


def _forward_and_pull(call: Call, inputs: Inputs, wants_dx: bool) -> _Run | None:
    """Under vmaps alone, a forward pass and what runs its backward pass; None where a vmap does not
    fold."""
    level, unbatched = _innermost(), inputs.unbatched()
    if level is None:
        if unbatched:
            return None
        return _kernel_and_pull(Route.below(call.problem, call.backend, inputs), inputs)
    number = level.level()
    given, dims = _unwrap_members(as_tensors(inputs), number)
    members = _members_on(call.backend, level, call.problem, dims, unbatched, _is_alone())
    if members is None:
        return None
    if all(d is None for d in dims) or (members.groups and wants_dx and not members.own_x):
        return None
    whole = Call(call.backend, members.problem)
    return _members_and_pull(
        members, number, given, dims, lambda ours: _forward_and_pull(whole, ours, wants_dx)
    )


def _kernel_and_pull(
    route: Route, inputs: Inputs
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], _Pull]:
    """Below all transforms."""
    y, h_n, c_n, c, saved = route.forward(inputs, True)

    def pull(call: Call, grads: Grads) -> Sequence[Tensor]:
        found = route.backward(inputs, y, saved, grads, call.needs, call.samples)
        return [d for d in found if d is not None]

    return (y, h_n, c_n, c), pull


def _members_and_pull(
    members: Members,
    number: int,
    given: Sequence[Tensor | None],
    dims: Dims,
    run: Callable[[Inputs], _Run | None],
) -> _Run | None:
    """Of the innermost vmap, whose number it is; `run` runs all of its members below it."""
    with _Below():
        found = run(as_inputs(members.inputs(given, dims)))
        if found is None:
            return None
        outputs, pull_all = found
        parts = members.parts(outputs)

    def pull(call: Call, grads: Grads) -> Sequence[Tensor]:
        values, grads_dims = _unwrap_members(grads, number)
        with _Below():
            outer = Grads(*members.grads(values, grads_dims))
            found, axes = members.gradients(call, pull_all(members.backward_call(call), outer))
        wrapped: Sequence[Tensor] = _wrap_members(found, axes, number)
        return wrapped

    return _wrap_members(parts, members.axes, number), pull


def _is_inside(level: int, tensors: Sequence[Tensor | None]) -> bool:
    """Whether the transform of that number that wrapped these tensors is still the innermost."""
    innermost = _innermost()
    if innermost is None or innermost.level() != level:
        return False
    # The number may be another's by now; then the tensors' wrappers are dead.
    get_level = torch._C._functorch.maybe_get_level
    return any(t is not None and get_level(t) == level for t in tensors)


def _unwrap_tracked(tensors: Sequence[Tensor | None], number: int) -> list[Tensor | None]:
    unwrap = torch._C._functorch._unwrap_for_grad
    return [None if t is None else unwrap(t, number) for t in tensors]


def _wrap_tracked(tensors: Sequence[Tensor | None], number: int) -> tuple[Tensor | None, ...]:
    wrap = torch._C._functorch._wrap_for_grad
    return tuple([None if t is None else wrap(t, number) for t in tensors])


def _is_tracked(tensor: Tensor) -> bool:
    """Whether autograd follows it at any level of transforms; a vmap inside does not show it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad:
            return True
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad
