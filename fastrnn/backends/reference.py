"""The reference backend: plain torch, written to be read. It serves every problem, and every other
backend is tested against it. Autograd, torch.func and forward-mode differentiation see through
it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import _torch
from ..cells import Cell, States
from .base import Grads, Inputs, Outputs, Problem, SavedShape


class _Steps(NamedTuple):
    """Which rows take part in each step, and where they are cut."""

    sizes: list[int]  # the first sizes[t] rows are there at step t
    alive: Tensor | None  # bool [T, B, 1], rows that have not ended
    cut: Tensor | None  # bool [T, B, 1], rows that begin anew at step t

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs) -> _Steps:
        lengths, reset = inputs.lengths, inputs.reset
        sizes = inputs.batch_sizes
        alive = None
        if lengths is not None:
            steps = torch.arange(problem.T, device=lengths.device)
            alive = (steps[:, None] < lengths).unsqueeze(-1)
        cut = None if reset is None else reset.unsqueeze(-1)
        if cut is not None and alive is not None:
            cut = cut & alive
        rows = [problem.B] * problem.T if sizes is None else _torch.to_list(sizes)
        return cls(rows, alive, cut)


def _scan(
    cell: Cell,
    gates_x: Tensor,  # [N, gates*H], the steps one after the other
    steps: _Steps,
    states: States,
    at_reset: States,
    weights: Sequence[Tensor | None],
    reverse: bool,
) -> tuple[list[States], States]:
    """Run one direction: the states after every step, and the last states.

    Step t works on the first sizes[t] rows of the states. Going forward, a row that has ended keeps
    its last state; going back, a row keeps its initial state until its own end is reached: the same
    lines serve both."""
    sizes, alive, cut = steps
    _, w_hh, _, b_hh, *proj = weights
    assert w_hh is not None
    given = torch.split(gates_x, sizes)
    T = len(sizes)
    found: list[States] = [states] * T
    for t in reversed(range(T)) if reverse else range(T):
        edge = t + 1 if reverse else t  # between the step before, in this direction, and t
        if cut is not None and edge < T:
            states = _choose(cut[edge], at_reset, states)
        active = tuple(_first(s, sizes[t]) for s in states)
        new = cell.step(given[t], linear(active[0], w_hh, b_hh), active)
        if proj:
            assert proj[0] is not None
            new = (linear(new[0], proj[0]), *new[1:])
        found[t] = new
        if alive is not None:
            found[t] = tuple(s.masked_fill(~alive[t], 0) for s in new)
            new = _choose(alive[t], new, active)
        states = tuple(_replace(s, n) for s, n in zip(states, new, strict=True))
    return found, states


def _choose(mask: Tensor, where: States, otherwise: States) -> States:
    return tuple(torch.where(mask, a, b) for a, b in zip(where, otherwise, strict=True))


def _first(state: Tensor, rows: int) -> Tensor:
    """Without a slice where that is all: its backward pass would fill a state with zeros."""
    return state if state.shape[0] == rows else state[:rows]


def _replace(state: Tensor, head: Tensor) -> Tensor:
    if head.shape[0] == state.shape[0]:
        return head
    return torch.cat([head, state[head.shape[0] :]])


def _place(tensor: Tensor | None, needed: bool) -> Any:
    """A tensor that is given twice has a gradient for each of its places."""
    if tensor is None:
        return None
    place = tensor.view_as(tensor)
    return place.requires_grad_() if needed and not place.requires_grad else place


def _or_zeros(state: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_zeros(shape) if state is None else state


class Reference:
    """See :class:`fastrnn.backends.Backend`."""

    name = "reference"
    differentiable = True
    on_request: str | None = None

    def supports(self, problem: Problem) -> str | None:
        return None

    def forward(self, problem: Problem, inputs: Inputs, save: bool) -> Outputs:
        if inputs.unbatched():
            return self.forward(problem, inputs.with_batch(), save).without_batch()
        cell, G, B, I, H = problem.cell, len(problem.reverse), problem.B, problem.I, problem.H
        steps = _Steps.of(problem, inputs)
        x = inputs.x
        if steps.alive is not None:
            x = x.masked_fill(~steps.alive, 0)
        rows = x if problem.packed else x.flatten(0, 1)
        shapes = ((G, B, problem.P or H), (G, B, H))[: cell.states]
        h0, c0, h_reset, c_reset = inputs.states
        initial, anew = (h0, c0)[: cell.states], (h_reset, c_reset)[: cell.states]
        starts = [_or_zeros(s, x, shape) for s, shape in zip(initial, shapes, strict=True)]
        resets = [_or_zeros(s, x, shape) for s, shape in zip(anew, shapes, strict=True)]
        every: list[list[Tensor]] = []
        ends: list[States] = []
        for g, reverse in enumerate(problem.reverse):
            weights = inputs.weights_of(problem, g)
            w_ih, _, b_ih, *_ = weights
            assert w_ih is not None
            gates_x = linear(rows[:, g * I : (g + 1) * I] if problem.grouped else rows, w_ih, b_ih)
            states, at_reset = tuple(s[g] for s in starts), tuple(s[g] for s in resets)
            found, states = _scan(cell, gates_x, steps, states, at_reset, weights, reverse)
            every.append([torch.cat(s) for s in zip(*found, strict=True)])
            ends.append(states)
        y, *c = (torch.cat(s, -1) if G > 1 else s[0] for s in zip(*every, strict=True))
        h_n, *c_n = (torch.stack(s) for s in zip(*ends, strict=True))
        lead = x.shape[:-1]
        return Outputs(
            y.view(*lead, y.shape[-1]),
            h_n,
            c_n[0] if c_n else None,
            c[0].view(*lead, c[0].shape[-1]) if c and problem.all_states else None,
            [],
        )

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
        """By autograd, through a second run of the layer. The gradients can be differentiated
        further where grad mode is enabled."""
        if samples > 1:
            raise NotImplementedError("the reference backend adds up the gradients of a batch")
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            tensors = (inputs.x, *inputs.states, *inputs.weights)
            places = [_place(t, needed) for t, needed in zip(tensors, needs, strict=True)]
            given = inputs._replace(x=places[0], states=places[1:5], weights=places[5:])
            *outputs, _ = self.forward(problem, given, False)
        each = zip(outputs, grads, strict=True)
        pairs = [(o, g) for o, g in each if o is not None and g is not None]
        wanted = [needed and t is not None for t, needed in zip(places, needs, strict=True)]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                list(itertools.compress(places, wanted)),
                [g for _, g in pairs],
                create_graph=create_graph,
                materialize_grads=True,
            )
        )
        return [next(found) if want else None for want in wanted]

    def saved_shapes(self, problem: Problem, N: int) -> list[SavedShape]:
        return []


REFERENCE = Reference()
