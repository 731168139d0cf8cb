"""The reference backend: plain torch, written to be read. It serves every problem, and every other
backend is tested against it. Autograd, torch.func and forward-mode differentiation see through
it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..cells import Cell, States
from .base import Problem, SavedShape, Weights


def _scan(
    cell: Cell,
    gates_x: Tensor,  # [N, gates*H], the steps one after the other
    sizes: Sequence[int],
    states: States,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, States]:
    """Run one direction: h of every row [N, out], and the last states.

    Step t works on the first sizes[t] rows of the states. Going forward, a row that has ended keeps
    its last state; going back, a row keeps its initial state until its own end is reached: the same
    two lines serve both."""
    steps = list(torch.split(gates_x, list(sizes)))
    outputs: list[Tensor] = steps[:]
    order = range(len(sizes))
    for t in reversed(order) if reverse else order:
        active = tuple(s[: sizes[t]] for s in states)
        new = cell.step(steps[t], linear(active[0], w_hh, b_hh), active)
        if w_hr is not None:
            new = (linear(new[0], w_hr), *new[1:])
        outputs[t] = new[0]
        states = tuple(_replace(s, n) for s, n in zip(states, new, strict=True))
    return torch.cat(outputs), states


def _replace(state: Tensor, head: Tensor) -> Tensor:
    if head.shape[0] == state.shape[0]:
        return head
    return torch.cat([head, state[head.shape[0] :]])


class Reference:
    """See :class:`fastrnn.backends.Backend`."""

    name = "reference"
    differentiable = True

    def supports(self, problem: Problem) -> str | None:
        return None

    def forward(
        self,
        problem: Problem,
        x: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Weights,
        reverse: Sequence[bool],
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        cell, G, B = problem.cell, problem.G, problem.B
        if h0 is None:
            h0 = x.new_zeros(G, B, problem.out)
        if c0 is None and cell.states > 1:
            c0 = x.new_zeros(G, B, problem.H)
        sizes = [B] * problem.T if batch_sizes is None else batch_sizes.tolist()
        rows = x.reshape(-1, problem.I) if batch_sizes is None else x  # [N, I]
        ys: list[Tensor] = []
        ends: list[States] = []
        for g in range(G):
            w_ih, w_hh, b_ih, b_hh, *proj = weights[g * problem.per_group :][: problem.per_group]
            assert w_ih is not None
            assert w_hh is not None
            states: States = (h0[g],) if c0 is None else (h0[g], c0[g])
            w_hr = proj[0] if proj else None
            gates_x = linear(rows, w_ih, b_ih)
            y, states = _scan(cell, gates_x, sizes, states, w_hh, b_hh, w_hr, reverse[g])
            ys.append(y)
            ends.append(states)
        y = ys[0] if G == 1 else torch.cat(ys, -1)
        h_n, *c_n = (torch.stack(s) for s in zip(*ends, strict=True))
        return y.view(*x.shape[:-1], G * problem.out), h_n, c_n[0] if c_n else None, []

    def backward(self, *args: object) -> list[Tensor]:
        raise NotImplementedError("autograd differentiates the reference backend")

    def saved_shapes(self, problem: Problem, N: int) -> list[SavedShape]:
        return []


REFERENCE = Reference()
