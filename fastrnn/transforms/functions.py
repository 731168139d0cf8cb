"""A layer's forward and backward pass as Functions of torch.func, in any nesting of vmap and grad.

A vmap is one call of the same kernel: see :mod:`.members`. Each rule below turns a call
under one vmap into a call without it, so that nested ones peel off one by one until tensors with
memory are left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _torch, ops
from ..autograd import run_backward, run_forward
from ..backends import REFERENCE, Grads, Inputs, Outputs, Problem
from .members import Call, Dims, Members, as_inputs, unflatten


class Forward(torch.autograd.Function):
    """:func:`fastrnn.ops.flat` of a layer's outputs, ``(call, x, batch_sizes, lengths, reset,
    *states, *weights)`` being its arguments.

    What is saved for the backward pass is in a layout that only the backend knows. No vmap sees
    through it: its rule declares that these tensors have no axis of members, and the rule of
    :class:`Backward` makes of the same members the same call again, whose tensors they are."""

    @staticmethod
    def forward(call: Call, *tensors: Any) -> tuple[Tensor, ...]:
        return tuple(ops.flat(_run_forward(call, as_inputs(tensors))))

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
        if _torch.is_forward_differentiated():
            found = plain_gradients(call, as_inputs(inputs), Grads(*outer))
        else:
            found = Backward.apply(call, *inputs, *outer, *kept)  # type: ignore[no-untyped-call]
        each = iter(found)
        return tuple(next(each) if need else None for need in needed)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: Call, *tensors: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        dims = in_dims[1:]
        members = Members.of(info.batch_size, call.problem, dims)
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
        return tuple(_run_backward(call, as_inputs(inputs), y, saved, Grads(*grads)))

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
            return plain_gradients(call, as_inputs(inputs), Grads(*grads))

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
        before = Members.of(info.batch_size, call.problem, given_dims)
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


def _split(call: Call, items: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Backward's arguments, or their axes: (of Inputs, of Grads, y, saved)."""
    end = call.inputs
    return items[:end], items[end : end + 4], items[end + 4], items[end + 5 :]


def _select(tensors: Sequence[Any], dims: Dims, member: int) -> list[Any]:
    pairs = zip(tensors, dims, strict=True)
    return [t if d is None else t.select(d, member) for t, d in pairs]


def _each_forward(
    V: int, dims: Dims, call: Call, tensors: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Forward's rule where one call cannot serve all members: one each."""
    each = [Forward.apply(call, *_select(tensors, dims, v)) for v in range(V)]  # type: ignore[no-untyped-call]
    found = [torch.stack(outputs) for outputs in zip(*(e[:4] for e in each), strict=True)]
    saved = [s for e in each for s in e[4:]]
    return (*found, *saved), (0,) * 4 + (None,) * len(saved)


def _each_backward(
    V: int, dims: Dims, call: Call, tensors: Sequence[Any]
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
    save = problem.grad and bool(call.backend.saved_shapes(problem, 0))
    parts = [
        run_forward(call.backend, part, _of_groups(problem, inputs, here), save)
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
    problem, backend = call.problem, call.backend
    G = problem.G
    for runs in range(1, G + 1):
        size = -(-G // runs)
        reason = backend.supports(_part(problem, slice(0, size)))
        if reason is None:
            break
    else:
        raise RuntimeError(f"fastrnn backend {backend.name!r} refuses what vmap made: {reason}")
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


def plain_gradients(call: Call, inputs: Inputs, grads: Grads) -> tuple[Tensor, ...]:
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

    with _torch.DisableAutocast():
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
        ours = as_inputs((*blocks[:8], *inputs.weights))
        return plain_gradients(alone, ours, Grads(*blocks[8:]))

    dims = tuple(None if t is None else a for t, a in zip(tensors, axes, strict=True))
    blocks = [
        None if t is None else t if d is None else unflatten(t, d, S)
        for t, d in zip(tensors, dims, strict=True)
    ]
    rows = sum(call.needs[:5])
    wanted = (1,) * rows + (0,) * (sum(call.needs) - rows)
    found = torch.func.vmap(of_one, dims, wanted)(*blocks)
    return tuple(g.flatten(1, 2) if k < rows else g for k, g in enumerate(found))
