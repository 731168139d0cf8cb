"""Weight gradients of each sample apart, as batched products with the gradients of the gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Inputs, Problem


class Samples(NamedTuple):
    """A batch [T, B] as `number` blocks of B / number rows."""

    number: int
    T: int
    B: int
    rows: Tensor | None  # [N] where a kernel's rows lie in the batch, t * B + b; None: as its steps

    def weight_gradients(
        self,
        problem: Problem,
        inputs: Inputs,
        y: Tensor,
        whole_h: Tensor | None,
        grads: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """The needed gradients [number, *weight.shape], from what a kernel was given and gave.

        `grads` are those of the input's gates and of the recurrent ones, [G, N, gates*H] each, and
        with a projection those of the states [G, N, P], then of `whole_h` [N, G*H]."""
        I, x, rows = problem.I, inputs.x, self.rows
        steps: _Dense | _Steps = _Dense()
        if rows is not None or inputs.batch_sizes is not None:
            steps = _Steps.of(problem, inputs)
            rows = steps.step * problem.B + steps.row if rows is None else rows
        found: list[Tensor | None] = []
        for g in range(problem.G):
            dgates_x, dgates_h, *dprojection = (d[g] for d in grads)
            x_g = x[..., g * I : (g + 1) * I] if problem.grouped else x
            h_before = steps.h_before(problem, inputs, y, g)
            factors = [(dgates_x, x_g), (dgates_h, h_before), (dgates_x, None), (dgates_h, None)]
            if whole_h is not None:
                factors.append((dprojection[0], whole_h[:, g * problem.H : (g + 1) * problem.H]))
            mine = slice(g * problem.per_group, (g + 1) * problem.per_group)
            for pair, needed, w in zip(factors, needs[mine], inputs.weights[mine], strict=True):
                found.append(self._product(*pair, rows) if needed and w is not None else None)
        return found

    def _product(self, left: Tensor, right: Tensor | None, rows: Tensor | None) -> Tensor:
        """left^T right, or the column sums of left, over each block of rows."""
        blocks = self._blocks(left, rows)
        return blocks.sum(1) if right is None else blocks.mT @ self._blocks(right, rows)

    def _blocks(self, packed: Tensor, rows: Tensor | None) -> Tensor:
        """[N, W] -> [number, T*B/number, W], zero where a row of the batch has no step; without
        `rows` it is all of the batch, [T*B, W] or [T, B, W]."""
        batch, width = packed, packed.shape[-1]
        if rows is not None:
            batch = packed.new_zeros(self.T * self.B, width).index_copy_(0, rows, packed)
        blocks = batch.reshape(self.T, self.number, self.B // self.number, width)
        return blocks.transpose(0, 1).flatten(1, 2)


class _Dense:
    """Every row takes part in every step: nothing has to be looked up."""

    def h_before(self, problem: Problem, inputs: Inputs, y: Tensor, g: int) -> Tensor:
        """The state [T, B, out] from which each step began."""
        after = y.view(problem.T, problem.B, problem.G, problem.out)[:, :, g]
        h0 = torch.zeros_like(after[:1]) if inputs.h0 is None else inputs.h0[g : g + 1]
        return torch.cat([after[1:], h0] if problem.reverse[g] else [h0, after[:-1]])


class _Steps(NamedTuple):
    """Where each of a kernel's N rows stands."""

    step: Tensor  # [N]
    row: Tensor  # [N] within its step
    first: Tensor  # [T] where each step's rows begin
    sizes: Tensor  # [T]

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs) -> _Steps:
        sizes = inputs.batch_sizes
        if sizes is None:
            sizes = torch.full((problem.T,), problem.B)
        step = torch.repeat_interleave(torch.arange(problem.T), sizes)
        first = sizes.cumsum(0) - sizes
        return cls(step, torch.arange(len(step)) - first[step], first, sizes)

    def h_before(self, problem: Problem, inputs: Inputs, y: Tensor, g: int) -> Tensor:
        """The state [N, out] from which each row's step began."""
        after = y.reshape(len(self.step), problem.G, problem.out)[:, g]
        before = self.step + 1 if problem.reverse[g] else self.step - 1
        inside = (before >= 0) & (before < problem.T)
        at = before.clamp(0, problem.T - 1)
        inside &= self.row < self.sizes[at]
        found = after[torch.where(inside, self.first[at] + self.row, 0)]
        if inputs.h0 is None:
            return found.masked_fill(~inside[:, None], 0)
        return torch.where(inside[:, None], found, inputs.h0[g, self.row])
