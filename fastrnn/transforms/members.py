"""Members of a vmap as one layer call.

Members that share their weights are blocks of rows of one batch, and a weight's gradient then comes
for each block apart (`samples`); members with weights of their own are groups of one layer, as two
directions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, Inputs, Problem

Dims = tuple[int | None, ...]  # of each tensor, the axis that a vmap has hidden


@dataclass(frozen=True)
class Call:
    """What of a layer call is no tensor.

    Attributes:
        backend: who runs it.
        problem: what is run.
        needs: of the backward pass, the gradients asked for.
        samples: of the backward pass, blocks of rows that get weights' gradients of their own.
    """

    backend: Backend
    problem: Problem
    needs: tuple[bool, ...] = ()
    samples: int = 1

    @property
    def inputs(self) -> int:
        """How many tensors make :class:`Inputs`."""
        return 8 + self.problem.weights


@dataclass(frozen=True)
class Members:
    """V members of a vmap as one layer call."""

    V: int
    one: Problem  # that each of them poses
    groups: bool  # each has weights of its own, so they are groups; else they are rows
    own_x: bool  # groups of different members read columns of their own
    stacked: bool = False  # a weight of all members stays one tensor
    unbatched: bool = False  # a member is one row, without a dimension for it

    @classmethod
    @lru_cache(maxsize=1024)
    def of(cls, V: int, problem: Problem, dims: Dims, unbatched: bool = False) -> Members | None:
        """None where one call cannot serve them."""
        x, _, lengths, reset = dims[:4]
        groups = any(d is not None for d in dims[8:])
        if problem.packed or (groups and (unbatched or lengths is not None or reset is not None)):
            return None
        own_x = groups and (problem.grouped or x is not None)
        return cls(V, problem, groups, own_x, unbatched=unbatched)

    @cached_property
    def with_stacks(self) -> Members:
        """The same with stacked weights, where they can be."""
        return replace(self, stacked=self.groups and self.V > 1 and self.one.G == 1)

    @cached_property
    def problem(self) -> Problem:
        """That all of them pose together."""
        one, V = self.one, self.V
        if not self.groups:
            return one._replace(B=V * one.B)
        grouped = self.own_x and V * one.G > 1
        return one._replace(reverse=one.reverse * V, grouped=grouped, stacked=self.stacked)

    def backward_call(self, call: Call) -> Call:
        """`call` is that of one member."""
        if not self.groups:
            return Call(call.backend, self.problem, call.needs, self.V * call.samples)
        needs = (*call.needs[:5], *call.needs[5:] * (1 if self.stacked else self.V))
        return Call(call.backend, self.problem, needs, call.samples)

    def steps(self, tensor: Tensor, dim: int | None) -> Tensor:
        """[T, B, W] of each member -> [T, V*B, W] or [T, B, V*W]"""
        return self._merge(tensor, dim, 2 if self.groups else 1)

    def states(self, tensor: Tensor, dim: int | None) -> Tensor:
        """[G, B, W] of each member -> [G, V*B, W] or [V*G, B, W]"""
        return self._merge(tensor, dim, 0 if self.groups else 1)

    def inputs(self, tensors: Sequence[Any], dims: Dims) -> list[Tensor | None]:
        """What Forward takes, of each member -> the same of all of them."""
        x, _, lengths, reset, *rest = tensors
        states = [
            None if s is None else self.states(s, d)
            for s, d in zip(rest[:4], dims[4:8], strict=True)
        ]
        if not self.groups:
            lengths = None if lengths is None else self._merge(lengths, dims[2], 0)
            reset = None if reset is None else self._merge(reset, dims[3], 1)
            return [self.steps(x, dims[0]), None, lengths, reset, *states, *rest[4:]]
        weights = list(zip(rest[4:], dims[8:], strict=True))
        x = self._columns(x, dims[0])
        if self.stacked:
            stacks = [None if w is None else self._spread(w, d, 0) for w, d in weights]
            return [x, None, lengths, reset, *states, *stacks]
        members = [(w,) * self.V if w is None or d is None else w.unbind(d) for w, d in weights]
        flat = [w for member in zip(*members, strict=True) for w in member]
        return [x, None, lengths, reset, *states, *flat]

    def _columns(self, x: Tensor, dim: int | None) -> Tensor:
        """x for groups: as it is if all read the same, else [T, B, V*G*I]."""
        if not self.own_x:
            return x
        x = self._spread(x, dim, 2)
        if not self.one.grouped:
            x = x.unsqueeze(3).expand(-1, -1, -1, self.one.G, -1)
        return x.flatten(2)

    def grads(self, grads: Sequence[Any], dims: Dims) -> tuple[Tensor | None, ...]:
        """The gradients of y, h_n, c_n and c."""
        each = (self.steps, self.states, self.states, self.steps)
        pairs = zip(each, grads, dims, strict=True)
        return tuple([None if g is None else fold(g, d) for fold, g, d in pairs])

    def outputs(
        self, tensors: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """What Forward returned for all of them, and where the members are."""
        saved = tensors[4:]
        there = (True, True, self.one.cell.states > 1, self.one.all_states)
        parts = self.parts(
            [t if is_there else None for t, is_there in zip(tensors, there, strict=False)]
        )
        found = [t if part is None else part for t, part in zip(tensors, parts, strict=False)]
        dims = [axis if is_there else None for axis, is_there in zip(self.axes, there, strict=True)]
        return (*found, *saved), (*dims, *(None,) * len(saved))

    @cached_property
    def axes(self) -> tuple[int, int, int, int]:
        """Where the members are in the parts of y, h_n, c_n and c."""
        return (2, 0, 0, 2) if self.groups else (1, 1, 1, 1)

    def parts(self, outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """y, h_n, c_n and c of all of them, with an axis of members."""
        pairs = zip(outputs, self.axes, strict=True)
        return [None if t is None else self._part(t, axis) for t, axis in pairs]

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
            parted.append(self._part(next(each), states))
            dims.append(states)
        weights = list(each)
        if self.stacked:
            axis = 1 if call.samples > 1 else 0
            return (*parted, *weights), (*dims, *[axis] * len(weights))
        if self.groups:
            wanted = len(weights) // self.V
            parted += [torch.stack(weights[k::wanted]) for k in range(wanted)]
        elif call.samples > 1:
            parted += [unflatten(w, 0, self.V) for w in weights]
        else:
            parted += [w if self.V > 1 else w.unsqueeze(0) for w in weights]
        dims += [0] * (len(parted) - len(dims))
        return tuple(parted), tuple(dims)

    def _part_dx(self, dx: Tensor) -> Tensor:
        if not self.groups:
            return self._part(dx, 1)
        dx = self._part(dx, 2)
        if self.one.grouped or self.one.G == 1:
            return dx
        return unflatten(dx, 3, self.one.G).sum(3)

    def _part(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor if self.unbatched else unflatten(tensor, axis, self.V)

    def _merge(self, tensor: Tensor, dim: int | None, axis: int) -> Tensor:
        spread = self._spread(tensor, dim, axis)
        return spread if self.unbatched else spread.flatten(axis, axis + 1)

    def _spread(self, tensor: Tensor, dim: int | None, axis: int) -> Tensor:
        """The members at `axis`, also of a tensor that they share."""
        if dim is not None:
            if abs(dim - axis) == 1:
                return tensor.transpose(dim, axis)  # which takes torch less time
            return tensor if dim == axis else tensor.movedim(dim, axis)
        shape = tensor.shape
        return tensor.unsqueeze(axis).expand(*shape[:axis], self.V, *shape[axis:])


def unflatten(tensor: Tensor, axis: int, size: int) -> Tensor:
    shape = tensor.shape
    return tensor.reshape(*shape[:axis], size, shape[axis] // size, *shape[axis + 1 :])


def as_inputs(tensors: Sequence[Any]) -> Inputs:
    x, batch_sizes, lengths, reset = tensors[:4]
    return Inputs(x, batch_sizes, lengths, reset, tensors[4:8], tensors[8:])


def as_tensors(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Undo :func:`as_inputs`."""
    x, batch_sizes, lengths, reset, states, weights = inputs
    return x, batch_sizes, lengths, reset, *states, *weights
