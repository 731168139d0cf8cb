"""Layers under torch.func: vmap over inputs and over weights, in any nesting with grad.

A vmap is one call of the same kernel. Members that share their weights are blocks of rows of one
batch, and a weight's gradient then comes for each block apart (`samples`); members with weights of
their own are groups of one layer, as two directions are. Each rule below turns a call under one
vmap into a call without it, so that nested ones peel off one by one until tensors with memory are
left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._functorch.pyfunctorch import (
    FuncTorchInterpreter,
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
    retrieve_current_functorch_interpreter,
)
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import ops
from .autograd import run, run_backward, run_forward
from .backends import REFERENCE, Grads, Inputs, Outputs, Problem, by_name

_Dims = Sequence[int | None]  # of each tensor, the axis that a vmap has hidden


@dataclass(frozen=True)
class Call:
    """What of a layer call is no tensor.

    Attributes:
        backend: who runs it.
        problem: what is run.
        needs: of the backward pass, the gradients asked for.
        samples: of the backward pass, blocks of rows that get weights' gradients of their own.
    """

    backend: str
    problem: Problem
    needs: tuple[bool, ...] = ()
    samples: int = 1

    @property
    def inputs(self) -> int:
        """How many tensors make :class:`Inputs`."""
        return 8 + self.problem.G * self.problem.per_group


class Forward(torch.autograd.Function):
    """:func:`fastrnn.ops.flat` of a layer's outputs, ``(call, x, batch_sizes, lengths, reset,
    *states, *weights)`` being its arguments.

    What is saved for the backward pass is in a layout that only the backend knows. No vmap sees
    through it: its rule declares that these tensors have no axis of members, and the rule of
    :class:`Backward` makes of the same members the same call again, whose tensors they are."""

    @staticmethod
    def forward(call: Call, *tensors: Any) -> tuple[Tensor, ...]:
        return tuple(ops.flat(_run_forward(call, _inputs(tensors))))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        y, _, _, _, *saved = output
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*tensors, y, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        outer = grads[:4]
        if all(g is None for g in outer):
            return (None,) * len(needed)
        call = replace(ctx.call, needs=(needed[1], *needed[5:]))
        tensors = ctx.saved_tensors
        inputs, kept = tensors[: call.inputs], tensors[call.inputs :]
        if forward_ad._current_level >= 0:
            found = _plain_gradients(call, _inputs(inputs), Grads(*outer))
        else:
            found = Backward.apply(call, *inputs, *outer, *kept)  # type: ignore[no-untyped-call]
        each = iter(found)
        return tuple(next(each) if need else None for need in needed)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: Call, *tensors: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        dims = in_dims[1:]
        members = _Members.of(info.batch_size, call.problem, dims)
        if members is None:
            return _each_forward(info.batch_size, dims, call, tensors)
        whole = replace(call, problem=members.problem)
        found = Forward.apply(whole, *members.inputs(tensors, dims))  # type: ignore[no-untyped-call]
        return members.outputs(found)


class Backward(torch.autograd.Function):
    """The gradients of :class:`Forward` that ``call.needs`` names, as a function of the same
    arguments, the gradients of y, h_n, c_n and c, and what the forward pass kept: y and what its
    backend saved. Gradients beyond these are those of plain torch."""

    @staticmethod
    def forward(call: Call, *tensors: Any) -> tuple[Tensor, ...]:
        inputs, grads, y, saved = _split(call, tensors)
        return tuple(_run_backward(call, _inputs(inputs), y, saved, Grads(*grads)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.call = call
        ctx.save_for_backward(*tensors[: call.inputs + 4])

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        call, tensors, needed = ctx.call, list(ctx.saved_tensors), ctx.needs_input_grad
        places = [k for k in range(len(tensors)) if needed[1 + k]]

        def gradients(*wanted: Tensor) -> tuple[Tensor, ...]:
            given = list(tensors)
            for k, tensor in zip(places, wanted, strict=True):
                given[k] = tensor
            inputs, grads = given[: call.inputs], given[call.inputs :]
            return _plain_gradients(call, _inputs(inputs), Grads(*grads))

        _, pull = torch.func.vjp(gradients, *(tensors[k] for k in places))  # type: ignore[misc]
        found: list[Tensor | None] = [None] * len(needed)
        for k, grad in zip(places, pull(outer), strict=True):
            found[1 + k] = grad
        return tuple(found)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: Call, *tensors: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        dims = in_dims[1:]
        given, grads, y, saved = _split(call, tensors)
        given_dims, grads_dims, y_dim, _ = _split(call, dims)
        before = _Members.of(info.batch_size, call.problem, given_dims)
        if before is None:
            return _each_backward(info.batch_size, dims, call, tensors)
        members = replace(before, own_x=before.own_x or (before.groups and call.needs[0]))
        whole = members.backward_call(call)
        inputs = members.inputs(given, given_dims)
        if members == before and any(d is not None for d in given_dims):
            y = members.steps(y, y_dim)
        else:  # the forward pass was another call, which saved other tensors
            y, _, _, _, *saved = Forward.apply(whole, *inputs)  # type: ignore[no-untyped-call]
        outer = members.grads(grads, grads_dims)
        found = Backward.apply(whole, *inputs, *outer, y, *saved)  # type: ignore[no-untyped-call]
        return members.gradients(call, found)


@dataclass(frozen=True)
class _Members:
    """V members of a vmap as one layer call."""

    V: int
    one: Problem  # that each of them poses
    groups: bool  # each has weights of its own, so they are groups; else they are rows
    own_x: bool  # groups of different members read columns of their own

    @classmethod
    def of(cls, V: int, problem: Problem, dims: _Dims) -> _Members | None:
        """None where one call cannot serve them."""
        x, _, lengths, reset = dims[:4]
        groups = any(d is not None for d in dims[8:])
        if problem.packed or (groups and (lengths is not None or reset is not None)):
            return None
        return cls(V, problem, groups, groups and (problem.grouped or x is not None))

    @property
    def problem(self) -> Problem:
        """That all of them pose together."""
        one, V = self.one, self.V
        if not self.groups:
            return one._replace(B=V * one.B)
        return one._replace(reverse=one.reverse * V, grouped=self.own_x and V * one.G > 1)

    def backward_call(self, call: Call) -> Call:
        """`call` is that of one member."""
        if not self.groups:
            return replace(call, problem=self.problem, samples=self.V * call.samples)
        needs = (*call.needs[:5], *call.needs[5:] * self.V)
        return replace(call, problem=self.problem, needs=needs)

    def steps(self, tensor: Tensor | None, dim: int | None) -> Tensor | None:
        """[T, B, W] of each member -> [T, V*B, W] or [T, B, V*W]"""
        return self._merge(tensor, dim, 2 if self.groups else 1)

    def states(self, tensor: Tensor | None, dim: int | None) -> Tensor | None:
        """[G, B, W] of each member -> [G, V*B, W] or [V*G, B, W]"""
        return self._merge(tensor, dim, 0 if self.groups else 1)

    def inputs(self, tensors: Sequence[Any], dims: _Dims) -> list[Tensor | None]:
        """What Forward takes, of each member -> the same of all of them."""
        x, _, lengths, reset, *rest = tensors
        states = [self.states(s, d) for s, d in zip(rest[:4], dims[4:8], strict=True)]
        if not self.groups:
            lengths = self._merge(lengths, dims[2], 0)
            reset = self._merge(reset, dims[3], 1)
            return [self.steps(x, dims[0]), None, lengths, reset, *states, *rest[4:]]
        weights = zip(rest[4:], dims[8:], strict=True)
        members = [(w,) * self.V if w is None or d is None else w.unbind(d) for w, d in weights]
        flat = [w for member in zip(*members, strict=True) for w in member]
        return [self._columns(x, dims[0]), None, lengths, reset, *states, *flat]

    def _columns(self, x: Tensor, dim: int | None) -> Tensor:
        """x for groups: as it is if all read the same, else [T, B, V*G*I]."""
        if not self.own_x:
            return x
        x = self._spread(x, dim, 2)
        if not self.one.grouped:
            x = x.unsqueeze(3).expand(-1, -1, -1, self.one.G, -1)
        return x.flatten(2)

    def grads(self, grads: Sequence[Any], dims: _Dims) -> tuple[Tensor | None, ...]:
        """The gradients of y, h_n, c_n and c."""
        each = (self.steps, self.states, self.states, self.steps)
        return tuple(fold(g, d) for fold, g, d in zip(each, grads, dims, strict=True))

    def outputs(
        self, tensors: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """What Forward returned for all of them, and where the members are."""
        y, h_n, c_n, c, *saved = tensors
        steps, states = (2, 0) if self.groups else (1, 1)
        has_c, has_every = self.one.cell.states > 1, self.one.all_states
        found = (
            self.part(y, steps),
            self.part(h_n, states),
            self.part(c_n, states) if has_c else c_n,
            self.part(c, steps) if has_every else c,
            *saved,
        )
        dims = (steps, states, states if has_c else None, steps if has_every else None)
        return found, dims + (None,) * len(saved)

    def gradients(
        self, call: Call, found: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """What Backward returned for all of them, and where the members are; `call` is that of one
        member."""
        each = iter(found)
        states = 0 if self.groups else 1
        parted: list[Tensor] = []
        dims: list[int | None] = []
        if call.needs[0]:
            parted.append(self._part_dx(next(each)))
            dims.append(2 if self.groups else 1)
        for _ in filter(None, call.needs[1:5]):
            parted.append(self.part(next(each), states))
            dims.append(states)
        weights = list(each)
        if self.groups:
            wanted = len(weights) // self.V
            parted += [torch.stack(weights[k::wanted]) for k in range(wanted)]
        elif call.samples > 1:
            parted += [self.part(w, 0) for w in weights]
        else:
            parted += [w if self.V > 1 else w.unsqueeze(0) for w in weights]
        dims += [0] * (len(parted) - len(dims))
        return tuple(parted), tuple(dims)

    def _part_dx(self, dx: Tensor) -> Tensor:
        if not self.groups:
            return self.part(dx, 1)
        dx = self.part(dx, 2)
        if self.one.grouped or self.one.G == 1:
            return dx
        return _unflatten(dx, 3, self.one.G).sum(3)

    def part(self, tensor: Tensor, axis: int) -> Tensor:
        return _unflatten(tensor, axis, self.V)

    def _merge(self, tensor: Tensor | None, dim: int | None, axis: int) -> Tensor | None:
        return None if tensor is None else self._spread(tensor, dim, axis).flatten(axis, axis + 1)

    def _spread(self, tensor: Tensor, dim: int | None, axis: int) -> Tensor:
        """The members at `axis`, also of a tensor that they share."""
        if dim is not None:
            return tensor.movedim(dim, axis)
        shape = tensor.shape
        return tensor.unsqueeze(axis).expand(*shape[:axis], self.V, *shape[axis:])


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

    :class:`Forward`'s rule does the same. But autograd.Function takes ten times as long to get to
    it as this, and where only vmaps are active nothing needs to be a Function."""
    given, dims = _unwrap_members((*inputs[:4], *inputs.states, *inputs.weights), level)
    if all(d is None for d in dims):
        with level.lower():
            return scan(backend, problem, _inputs(given))
    members = _Members.of(level.batch_size(), problem, dims)
    if members is None or by_name(backend).supports(members.problem):
        return None
    with level.lower():
        ours = _inputs(members.inputs(given, dims))
        y, h_n, c_n, c = scan(backend, members.problem, ours)
        steps, states = (2, 0) if members.groups else (1, 1)
        parts = [
            None if t is None else members.part(t, axis)
            for t, axis in ((y, steps), (h_n, states), (c_n, states), (c, steps))
        ]
    return _wrap_members(parts, (steps, states, states, steps), level)


def _unwrap_members(
    tensors: Sequence[Tensor | None], level: VmapInterpreter
) -> tuple[tuple[Tensor | None, ...], _Dims]:
    """What a vmap has wrapped, and the axes that it hides."""
    unwrap, number = torch._C._functorch._unwrap_batched, level.level()
    pairs = [(None, None) if t is None else unwrap(t, number) for t in tensors]
    given, dims = zip(*pairs, strict=True)
    return given, dims


def _wrap_members(tensors: Sequence[Tensor | None], axes: _Dims, level: VmapInterpreter) -> Any:
    """Undo :func:`_unwrap_members`."""
    wrap, number = torch._C._functorch._add_batch_dim, level.level()
    pairs = zip(tensors, axes, strict=True)
    return tuple(None if t is None else wrap(t, axis, number) for t, axis in pairs)


_Pull = Callable[[Call, Grads], Sequence[Tensor]]  # a backward pass, of the call that ran forward


class _Differentiated(_SingleLevelFunction):  # type: ignore[misc, valid-type]
    """A layer under the one transform that differentiates it, with vmaps around that.

    It does what :class:`Forward` does there, ten times as soon: torch makes a class of each Function
    for each call and each level. `run` is :func:`_forward_and_pull` of the call."""

    @staticmethod
    def forward(ctx: Any, call: Call, run: Any, *tensors: Any) -> Any:
        level = retrieve_current_functorch_interpreter()
        outputs, ctx.pull = run
        ctx.call, ctx.level = call, level.level()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return _wrap_tracked(outputs, level)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, need_x, _, _, _, *need_rest = needed = ctx.needs_input_grad
        if all(g is None for g in grads):
            return (None,) * len(needed)
        call, tensors = replace(ctx.call, needs=(need_x, *need_rest)), ctx.saved_tensors
        if _is_inside(ctx.level, tensors):
            with enable_single_level_autograd_function():
                found = _Pulled.apply((call, ctx.pull), *tensors, *grads)
        elif forward_ad._current_level >= 0:
            found = _plain_gradients(call, _inputs(tensors), Grads(*grads))
        else:  # the transform is over, and others may be active: what they see begins anew
            y, _, _, _, *saved = Forward.apply(call, *tensors)  # type: ignore[no-untyped-call]
            found = Backward.apply(call, *tensors, *grads, y, *saved)  # type: ignore[no-untyped-call]
        each = iter(found)
        places = (False, False, need_x, False, False, False, *need_rest)
        return tuple(next(each) if need else None for need in places)


class _Pulled(_SingleLevelFunction):  # type: ignore[misc, valid-type]
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
    with enable_single_level_autograd_function():
        outputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = _Differentiated.apply(
            call, run, *tensors
        )
    return outputs


def _forward_and_pull(
    call: Call, tensors: Sequence[Any], wants_dx: bool
) -> tuple[Sequence[Tensor | None], _Pull] | None:
    """Under vmaps alone, a forward pass and what runs its backward pass; None where a vmap does not
    fold."""
    if not torch._C._are_functorch_transforms_active():
        inputs = _inputs(tensors)
        y, h_n, c_n, c, saved = run_forward(call.backend, call.problem, inputs, True)

        def pull_kernel(call: Call, grads: Grads) -> Sequence[Tensor]:
            return run_backward(
                call.backend, call.problem, inputs, y, saved, grads, call.needs, call.samples
            )

        return (y, h_n, c_n, c), pull_kernel
    level = retrieve_current_functorch_interpreter()
    given, dims = _unwrap_members(tensors, level)
    members = _Members.of(level.batch_size(), call.problem, dims)
    if members is None or by_name(call.backend).supports(members.problem):
        return None
    if all(d is None for d in dims) or (members.groups and wants_dx and not members.own_x):
        return None
    with level.lower():
        whole = replace(call, problem=members.problem)
        run = _forward_and_pull(whole, members.inputs(given, dims), wants_dx)
        if run is None:
            return None
        outputs, pull_all = run
        steps, states = (2, 0) if members.groups else (1, 1)
        axes = (steps, states, states, steps)
        parts = [
            None if t is None else members.part(t, axis)
            for t, axis in zip(outputs, axes, strict=True)
        ]

    def pull(call: Call, grads: Grads) -> Sequence[Tensor]:
        now = retrieve_current_functorch_interpreter()
        values, grads_dims = _unwrap_members(grads, now)
        with now.lower():
            outer = Grads(*members.grads(values, grads_dims))
            parts, axes = members.gradients(call, pull_all(members.backward_call(call), outer))
        found: Sequence[Tensor] = _wrap_members(parts, axes, now)
        return found

    return _wrap_members(parts, axes, level), pull


def _is_alone(inputs: Inputs, top: FuncTorchInterpreter) -> bool:
    """Whether the innermost transform differentiates the layer, and no other one, nor autograd
    outside of all, does."""
    if forward_ad._current_level >= 0 or not torch.is_grad_enabled():
        return False
    *outer, _ = retrieve_all_functorch_interpreters()
    if top.key() != TransformType.Grad or not all(isinstance(i, VmapInterpreter) for i in outer):
        return False
    tensors = (inputs.x, *inputs.states, *inputs.weights)
    below = _unwrap_tracked(tensors, top)
    tracked = any(t is not None and t.requires_grad for t in tensors)
    return tracked and not any(t is not None and _is_tracked(t) for t in below)


def _is_inside(level: int, tensors: Sequence[Tensor | None]) -> bool:
    """Whether the transform of that number that wrapped these tensors is the innermost one still."""
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


def _unflatten(tensor: Tensor, axis: int, size: int) -> Tensor:
    shape = tensor.shape
    return tensor.reshape(*shape[:axis], size, shape[axis] // size, *shape[axis + 1 :])


def _is_tracked(tensor: Tensor) -> bool:
    """Whether autograd follows it at any level of transforms; a vmap inside does not show it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad:
            return True
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def _inputs(tensors: Sequence[Any]) -> Inputs:
    x, batch_sizes, lengths, reset = tensors[:4]
    return Inputs(x, batch_sizes, lengths, reset, tensors[4:8], tensors[8:])


def _split(call: Call, items: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Backward's arguments, or their axes: (of Inputs, of Grads, y, saved)."""
    end = call.inputs
    return items[:end], items[end : end + 4], items[end + 4], items[end + 5 :]


def _select(tensors: Sequence[Any], dims: _Dims, member: int) -> list[Any]:
    pairs = zip(tensors, dims, strict=True)
    return [t if d is None else t.select(d, member) for t, d in pairs]


def _each_forward(
    V: int, dims: _Dims, call: Call, tensors: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Forward's rule where one call cannot serve all members: one each."""
    each = [Forward.apply(call, *_select(tensors, dims, v)) for v in range(V)]  # type: ignore[no-untyped-call]
    found = [torch.stack(outputs) for outputs in zip(*(e[:4] for e in each), strict=True)]
    saved = [s for e in each for s in e[4:]]
    return (*found, *saved), (0,) * 4 + (None,) * len(saved)


def _each_backward(
    V: int, dims: _Dims, call: Call, tensors: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Backward's rule where one call cannot serve all members: one each."""
    end = call.inputs + 5
    rest, saved = tensors[:end], tensors[end:]
    apart = any(d is not None for d in dims[: call.inputs])  # as _each_forward made them
    k = len(saved) // V if apart else 0
    each = [
        Backward.apply(  # type: ignore[no-untyped-call]
            call, *_select(rest, dims[:end], v), *(saved[v * k : (v + 1) * k] if apart else saved)
        )
        for v in range(V)
    ]
    found = tuple(torch.stack(grads) for grads in zip(*each, strict=True))
    return found, (0,) * len(found)


def _run_forward(call: Call, inputs: Inputs) -> Outputs:
    """Without any transform left: in as few calls as the backend takes groups in."""
    problem = call.problem
    parts = [
        run_forward(call.backend, part, _of_groups(problem, inputs, here), problem.grad)
        for here, part in _parts(call)
    ]
    if len(parts) == 1:
        return parts[0]
    y, h_n, c_n, c, saved = zip(*parts, strict=True)
    return Outputs(
        torch.cat(y, -1),
        torch.cat(h_n),
        None if c_n[0] is None else torch.cat(c_n),
        None if c[0] is None else torch.cat(c, -1),
        [s for part in saved for s in part],
    )


def _run_backward(
    call: Call, inputs: Inputs, y: Tensor, saved: Sequence[Tensor], grads: Grads
) -> list[Tensor]:
    """As :func:`_run_forward`, whose parts' saved tensors lie one after the other."""
    problem, needs = call.problem, call.needs
    parts = list(_parts(call))
    if len(parts) == 1:
        return run_backward(
            call.backend, problem, inputs, y, list(saved), grads, needs, call.samples
        )
    k = len(saved) // len(parts)
    found = []
    for n, (here, part) in enumerate(parts):
        weights = slice(5 + here.start * problem.per_group, 5 + here.stop * problem.per_group)
        found.append(
            run_backward(
                call.backend,
                part,
                _of_groups(problem, inputs, here),
                _columns(y, problem.out, here),
                list(saved[n * k : (n + 1) * k]),
                Grads(
                    _columns(grads.y, problem.out, here),
                    None if grads.h_n is None else grads.h_n[here],
                    None if grads.c_n is None else grads.c_n[here],
                    _columns(grads.c, problem.H, here),
                ),
                (*needs[:5], *needs[weights]),
                call.samples,
            )
        )
    each = [iter(gradients) for gradients in found]
    merged = []
    for k, need in enumerate(needs[:5]):
        if need:
            pieces = [next(gradients) for gradients in each]
            if k:
                merged.append(torch.cat(pieces))
            else:
                merged.append(
                    torch.cat(pieces, -1) if problem.grouped else torch.stack(pieces).sum(0)
                )
    return merged + [w for gradients in each for w in gradients]


def _parts(call: Call) -> Iterator[tuple[slice, Problem]]:
    """The groups in as few equal runs as the backend serves in one call each.

    Raises:
        RuntimeError: it does not serve one alone.
    """
    problem, backend = call.problem, by_name(call.backend)
    G = problem.G
    for runs in range(1, G + 1):
        size = -(-G // runs)
        reason = backend.supports(_part(problem, slice(0, size)))
        if reason is None:
            break
    else:
        raise RuntimeError(f"fastrnn backend {call.backend!r} refuses what vmap made: {reason}")
    for start in range(0, G, size):
        here = slice(start, min(start + size, G))
        yield here, _part(problem, here)


def _part(problem: Problem, here: slice) -> Problem:
    reverse = problem.reverse[here]
    return problem._replace(reverse=reverse, grouped=problem.grouped and len(reverse) > 1)


def _of_groups(problem: Problem, inputs: Inputs, here: slice) -> Inputs:
    if here == slice(0, problem.G):
        return inputs
    per = problem.per_group
    return inputs._replace(
        x=_columns(inputs.x, problem.I, here) if problem.grouped else inputs.x,
        states=[None if s is None else s[here] for s in inputs.states],
        weights=inputs.weights[here.start * per : here.stop * per],
    )


def _columns(tensor: Any, width: int, here: slice) -> Any:
    return None if tensor is None else tensor[..., here.start * width : here.stop * width]


def _plain_gradients(call: Call, inputs: Inputs, grads: Grads) -> tuple[Tensor, ...]:
    """What Backward computes, in plain torch: any transform sees through it."""
    if call.samples > 1:
        return _plain_samples(call, inputs, grads)
    tensors = (inputs.x, *inputs.states, *inputs.weights)
    places = [k for k, need in enumerate(call.needs) if need]
    used = [k for k, g in enumerate(grads) if g is not None]

    def outputs(*wanted: Tensor) -> tuple[Tensor, ...]:
        given: list[Any] = list(tensors)
        for k, tensor in zip(places, wanted, strict=True):
            given[k] = tensor
        x, *rest = given
        ours = inputs._replace(x=x, states=rest[:4], weights=rest[4:])
        found = REFERENCE.forward(call.problem, ours, False)
        return tuple(found[k] for k in used)  # type: ignore[misc]

    with torch._C._DisableAutocast():
        _, pull = torch.func.vjp(outputs, *(tensors[k] for k in places))  # type: ignore[misc]
        found: tuple[Tensor, ...] = pull(tuple(grads[k] for k in used))
    return found


def _plain_samples(call: Call, inputs: Inputs, grads: Grads) -> tuple[Tensor, ...]:
    """With weights' gradients of each block of rows apart."""
    S = call.samples
    alone = replace(call, problem=call.problem._replace(B=call.problem.B // S), samples=1)
    tensors = (*inputs[:4], *inputs.states, *grads)
    axes = (1, None, 0, 1, *(1,) * 8)  # of the batch; there are no batch_sizes

    def of_one(*blocks: Any) -> tuple[Tensor, ...]:
        ours = _inputs((*blocks[:8], *inputs.weights))
        return _plain_gradients(alone, ours, Grads(*blocks[8:]))

    dims = tuple(None if t is None else a for t, a in zip(tensors, axes, strict=True))
    blocks = [
        None if t is None else t if d is None else _unflatten(t, d, S)
        for t, d in zip(tensors, dims, strict=True)
    ]
    rows = sum(call.needs[:5])
    wanted = (1,) * rows + (0,) * (sum(call.needs) - rows)
    found = torch.func.vmap(of_one, dims, wanted)(*blocks)
    return tuple(g.flatten(1, 2) if k < rows else g for k, g in enumerate(found))
