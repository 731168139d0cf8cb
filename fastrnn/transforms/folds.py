"""One vmap, with or without a transform inside it that differentiates: how its members become one
call is found out once for all calls that look alike below both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _torch, autograd
from ..autograd import Route
from ..backends import Inputs
from ..plain import is_followed, signature_below
from .levels import differentiated, kernel_and_pull, members_and_pull, members_on, run_members
from .members import Call, Dims, Members, as_tensors
from .wrappers import Below, unwrap_members, unwrap_tracked


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
    for level in reversed(_torch.interpreters() or ()):
        kind, number, dims = level.key(), level.level(), None
        if kind == _torch.TransformType.Vmap:
            tensors, dims = unwrap_members(tensors, number)
            if not any(d is not None for d in dims):
                return None
        elif kind == _torch.TransformType.Grad:
            tensors = unwrap_tracked(tensors, number)
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
    vmap = (_torch.interpreters() or [])[0]
    members = members_on(backend, vmap, problem, dims, inputs.unbatched())
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
        return run_members(
            members, number, peeled.tensors, dims, lambda ours: autograd.scan(whole, ours)
        )
    with Below():
        run = members_and_pull(
            members, number, peeled.tensors, dims, lambda ours: kernel_and_pull(whole, ours)
        )
    assert run is not None
    return differentiated(call, inner[0][0], run, inputs)
