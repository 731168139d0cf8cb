"""Less memory for more time: a backend that keeps only every k-th state, and in its backward pass
runs each chunk of k steps again just before it goes back through it (Chen et al. 2016, "Training
Deep Nets with Sublinear Memory Cost"; for recurrent networks Gruslys et al. 2016,
"Memory-Efficient Backpropagation Through Time").

It is made of another backend, which runs the chunks: one text serves every set of kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _torch
from .base import Backend, Grads, Inputs, Outputs, Problem, SavedShape, check_lengths

MARK = "+recompute"
Some = Sequence[Tensor | None]


class Recompute:
    """See :class:`fastrnn.backends.Backend`. Its name is the inner one's with the length of the
    chunks, ``cpu+recompute64``.

    Groups of different directions meet the chunks in opposite orders, so each direction is a pass
    of its own. What crosses a border between two chunks is rounded to the dtype of the states; the
    gradients of the weights are added up in float32 or wider."""

    differentiable = False

    def __init__(self, inner: Backend, every: int) -> None:
        self.name = f"{inner.name}{MARK}{every}"
        self.inner, self.every = inner, every
        self.on_request: str | None = None  # whether `inner` may serve was asked before

    def supports(self, problem: Problem) -> str | None:
        if problem.stacked:
            return "it runs the directions one after the other, each with weights of its own"
        return self.inner.supports(problem)

    def saved_shapes(self, problem: Problem, N: int) -> list[SavedShape]:
        """h, and c of cells with one, between any two chunks in the order in which they ran."""
        lead = ((problem.T - 1) // self.every, problem.G, problem.B)
        widths = (problem.out, problem.H)[: problem.cell.states]
        return [((*lead, width), problem.dtype) for width in widths]

    def forward(self, problem: Problem, inputs: Inputs, save: bool) -> Outputs:
        if not save:
            return self.inner.forward(problem, inputs, False)
        if inputs.lengths is not None and inputs.lengths.device.type == "cpu":
            check_lengths(inputs.lengths, problem.T)
        x = inputs.x
        y = x.new_empty((*x.shape[:-1], problem.G * problem.out))
        c = x.new_empty((*x.shape[:-1], problem.G * problem.H)) if problem.all_states else None
        saved = [x.new_empty(shape) for shape, _ in self.saved_shapes(problem, x.shape[0])]
        ends: list[Some] = []
        for part in _directions(problem, inputs):
            states: Some = part.inputs.states[:2]
            for n, chunk in enumerate(part.chunks(self.every)):
                if n:
                    for border, state in zip(saved, states, strict=False):
                        assert state is not None
                        border[n - 1, part.groups] = state
                found = self.inner.forward(*part.at(chunk, states), False)
                part.columns(y)[chunk.rows] = found.y
                if c is not None and found.c is not None:
                    part.columns(c)[chunk.rows] = found.c
                states = _replaced(states, (found.h_n, found.c_n), problem.B)
            ends.append(states)
        h_n, *c_n = (torch.cat(end) for end in list(zip(*ends, strict=True))[: len(saved)])
        return Outputs(y, h_n, c_n[0] if c_n else None, c, saved)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        y: Tensor,
        saved: list[Tensor],
        grads: Grads,
        needs: Sequence[bool],
        samples: int,
    ) -> list[Tensor | None]:
        x = inputs.x
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
        dstates: list[Some] = []
        dweights: list[Tensor | None] = []
        for part in _directions(problem._replace(all_states=grads.c is not None), inputs):
            mine = (*needs[:5], *needs[5:][part.weights])
            into = dx if dx is None or not problem.grouped else part.columns(dx)
            add = bool(dstates) and not problem.grouped
            found = self._backward(part, saved, part.grads(grads), mine, samples, into, add)
            dstates.append(found[:4])
            dweights += found[4:]
        by_state = zip(needs[1:5], zip(*dstates, strict=True), strict=True)
        states = [torch.cat(each) if needed else None for needed, each in by_state]
        return [dx, *states, *dweights]

    def _backward(
        self,
        part: _Direction,
        saved: list[Tensor],
        grads: Grads,
        needs: Sequence[bool],
        samples: int,
        dx: Tensor | None,
        add: bool,
    ) -> list[Tensor | None]:
        """Gradients of h0, c0, the two states at resets, and the weights of one direction; that of
        its x goes into `dx`, or is added to it."""
        dstates: Some = (grads.h_n, grads.c_n)
        sums: Some = (None,) * (len(needs) - 3)  # states at resets, weights
        for n, chunk in reversed(list(enumerate(part.chunks(self.every)))):
            states: Some = part.inputs.states[:2]
            if n:
                states = [*(border[n - 1, part.groups] for border in saved), None][:2]
            wanted = (needs[0], *((True, len(saved) > 1) if n else needs[1:3]), *needs[3:])
            ours, given = part.at(chunk, states)
            again = self.inner.forward(ours, given, True)
            dh_n, dc_n = (_first(d, chunk.B) for d in dstates)
            arriving = Grads(_rows(grads.y, chunk), dh_n, dc_n, _rows(grads.c, chunk))
            dx_chunk, dh, dc, *others = self.inner.backward(
                ours, given, again.y, again.saved, arriving, wanted, samples
            )
            del again  # the next chunk's outputs take its place
            if dx is not None and dx_chunk is not None:
                into = dx[chunk.rows]
                (into.add_ if add else into.copy_)(dx_chunk)
            sums = _added(sums, others)
            dstates = _replaced(dstates, (dh, dc), part.problem.B)
            cut = part.cut_after(chunk)
            if cut is not None:
                at_cut = [None if d is None else d.masked_fill(~cut, 0) for d in dstates]
                sums = _added(sums, at_cut)
                dstates = [None if d is None else d.masked_fill(cut, 0) for d in dstates]
        dtype = part.problem.dtype
        return [*dstates, *(None if d is None else d.to(dtype) for d in sums)]


class _Chunk(NamedTuple):
    """Steps of a sequence, and the rows of x that they are: the same but for packed sequences."""

    steps: slice
    rows: slice
    B: int  # rows of its first step


class _Direction(NamedTuple):
    """Neighbouring groups that run in the same direction, as a problem of their own."""

    problem: Problem
    inputs: Inputs
    groups: slice  # of all
    all_groups: int

    @property
    def reverse(self) -> bool:
        return self.problem.reverse[0]

    @property
    def weights(self) -> slice:
        each = self.problem.per_group
        return slice(self.groups.start * each, self.groups.stop * each)

    def columns(self, tensor: Tensor) -> Tensor:
        """The groups' part of the last dimension."""
        width = tensor.shape[-1] // self.all_groups
        return tensor[..., self.groups.start * width : self.groups.stop * width]

    def grads(self, grads: Grads) -> Grads:
        y, h_n, c_n, c = grads
        return Grads(
            None if y is None else self.columns(y),
            None if h_n is None else h_n[self.groups],
            None if c_n is None else c_n[self.groups],
            None if c is None else self.columns(c),
        )

    def chunks(self, every: int) -> list[_Chunk]:
        """In the order in which they run."""
        T, sizes = self.problem.T, self.inputs.batch_sizes
        bounds = [slice(t, min(t + every, T)) for t in range(0, T, every)]
        if sizes is None:
            chunks = [_Chunk(steps, steps, self.problem.B) for steps in bounds]
        else:
            ends = [0, *itertools.accumulate(_torch.to_list(sizes))]
            chunks = [
                _Chunk(steps, slice(ends[steps.start], ends[steps.stop]), int(sizes[steps.start]))
                for steps in bounds
            ]
        return chunks[::-1] if self.reverse else chunks

    def at(self, chunk: _Chunk, states: Some) -> tuple[Problem, Inputs]:
        """What runs the chunk from the states that its neighbour left."""
        x, batch_sizes, lengths, reset, (*_, h_reset, c_reset), weights = self.inputs
        steps = chunk.steps
        T = steps.stop - steps.start
        cut = self.cut_after(chunk)
        if cut is not None:
            states = [_cut_to(s, r, cut) for s, r in zip(states, (h_reset, c_reset), strict=True)]
        inputs = Inputs(
            x[chunk.rows],
            None if batch_sizes is None else batch_sizes[steps],
            None if lengths is None else (lengths - steps.start).clamp(0, T),
            None if reset is None else reset[steps],
            (*(_first(s, chunk.B) for s in states), h_reset, c_reset),
            weights,
        )
        return self.problem._replace(T=T, B=chunk.B), inputs

    def cut_after(self, chunk: _Chunk) -> Tensor | None:
        """bool [B, 1]: the rows that a reset cuts between the chunk and the later one, which going
        backwards in time is where it begins. Going forward the chunk sees the cut itself."""
        reset, lengths, t = self.inputs.reset, self.inputs.lengths, chunk.steps.stop
        if reset is None or not self.reverse or t == self.problem.T:
            return None
        cut = reset[t] if lengths is None else reset[t] & (lengths > t)
        return cut.unsqueeze(-1)


def _directions(problem: Problem, inputs: Inputs) -> list[_Direction]:
    found = []
    for reverse, members in itertools.groupby(range(problem.G), problem.reverse.__getitem__):
        first, *others = members
        groups = slice(first, first + 1 + len(others))
        G = groups.stop - groups.start
        ours = problem._replace(reverse=(reverse,) * G, grouped=problem.grouped and G > 1)
        part = _Direction(ours, inputs, groups, problem.G)
        states = [None if s is None else s[groups] for s in inputs.states]
        given = inputs._replace(states=states, weights=inputs.weights[part.weights])
        if problem.grouped:
            given = given._replace(x=part.columns(inputs.x))
        found.append(part._replace(inputs=given))
    return found


def _rows(tensor: Tensor | None, chunk: _Chunk) -> Tensor | None:
    return None if tensor is None else tensor[chunk.rows]


def _first(state: Tensor | None, B: int) -> Tensor | None:
    return None if state is None else state[:, :B]


def _replaced(states: Some, new: Some, rows: int) -> list[Tensor | None]:
    """`states` [G, B, W] with the first rows of each from `new`; None is zeros, in `new` that there
    is no such state."""
    return [_put(s, n, rows) for s, n in zip(states, new, strict=True)]


def _put(state: Tensor | None, new: Tensor | None, rows: int) -> Tensor | None:
    if new is None or new.shape[1] == rows:
        return new
    G, B, W = new.shape
    state = new.new_zeros(G, rows, W) if state is None else state.clone()
    state[:, :B] = new
    return state


def _cut_to(state: Tensor | None, at_reset: Tensor | None, cut: Tensor) -> Tensor | None:
    if state is None or at_reset is None:
        return None if state is None else state.masked_fill(cut, 0)
    return torch.where(cut, at_reset, state)


def _added(sums: Some, more: Some) -> list[Tensor | None]:
    """In float32 or wider; what `more` lacks stays as it is."""
    return [_plus(s, m) for s, m in itertools.zip_longest(sums, more)]


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return total if more is None else more.to(torch.promote_types(more.dtype, torch.float32))
    return total.add_(more)
