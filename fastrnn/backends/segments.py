"""Rows that end early and rows that are cut by resets, as one packed batch of segments.

Between two cuts a row is a sequence of its own, which depends on no other. Sorted by length and
packed, all segments run side by side: a kernel for packed sequences serves `lengths` and `reset`,
does nothing for padding, and is done after the longest segment's steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base import Inputs, Problem, check_lengths


class Segments(NamedTuple):
    """S segments of a batch [T, B], the longest first; N steps in all."""

    rows: Tensor  # [N] where each packed row lies in the batch, t * B + b
    batch_sizes: Tensor  # [longest]
    row: Tensor  # [S] the batch row of each segment
    starts: Tensor  # [S] whether it begins where its row begins, not at a reset
    first: Tensor  # [S] whether it is its row's first one, a reset at t = 0 or not
    last: Tensor  # [S] whether it ends where its row ends
    whole: bool  # every step of the batch is in a segment

    @classmethod
    def of(cls, problem: Problem, lengths: Tensor | None, reset: Tensor | None) -> Segments:
        """Cut the batch. The tensors are on the CPU.

        Raises:
            ValueError: a length is below 0 or above T.
        """
        T, B = problem.T, problem.B
        ends = torch.full((B,), T, device="cpu") if lengths is None else lengths
        if lengths is not None:
            check_lengths(lengths, T)
        begins = torch.zeros(B, T, dtype=torch.bool, device="cpu")
        if reset is not None:
            begins |= reset.t()
        begins[:, 0] = True
        begins &= torch.arange(T, device="cpu") < ends[:, None]
        row, start = begins.nonzero(as_tuple=True)  # by row, then by time
        first = start == 0
        last = torch.cat([row[1:] != row[:-1], row.new_ones(len(row[:1]), dtype=torch.bool)])
        stop = torch.where(last, ends[row], start.roll(-1))
        length, order = torch.sort(stop - start, descending=True, stable=True)
        row, start, first, last = row[order], start[order], first[order], last[order]
        longest = int(length[0]) if len(length) else 0
        # A segment is active at step k if it is longer than k.
        batch_sizes = len(length) - torch.bincount(length, minlength=longest)[:longest].cumsum(0)
        step = torch.repeat_interleave(torch.arange(longest, device="cpu"), batch_sizes)
        before = batch_sizes.cumsum(0) - batch_sizes
        segment = torch.arange(len(step), device="cpu") - before[step]
        rows = (start[segment] + step) * B + row[segment]
        starts = first if reset is None else first & ~reset[0][row]
        return cls(rows, batch_sizes, row, starts, first, last, len(rows) == T * B)

    def on(self, device: torch.device) -> Segments:
        """The same for tensors of another device; the batch sizes stay on the CPU."""
        rows, batch_sizes, row, starts, first, last, whole = self
        row, starts, first, last = (t.to(device) for t in (row, starts, first, last))
        return Segments(rows.to(device), batch_sizes, row, starts, first, last, whole)

    def gather(self, batch: Tensor) -> Tensor:
        """[T, B, ..] -> [N, ..]"""
        return batch.flatten(0, 1).index_select(0, self.rows)

    def scatter(self, packed: Tensor, T: int, B: int) -> Tensor:
        """[N, ..] -> [T, B, ..], zero outside the segments."""
        make = packed.new_empty if self.whole else packed.new_zeros
        batch = make((T * B, *packed.shape[1:]))
        return batch.index_copy_(0, self.rows, packed).view(T, B, *packed.shape[1:])

    def _begin(self, backwards: bool) -> Tensor:
        """[S] whether a segment starts from its row's initial state in this direction of time."""
        return self.last if backwards else self.starts

    def _end(self, backwards: bool) -> Tensor:
        """[S] whether a segment's last state is its row's."""
        return self.first if backwards else self.last

    def initial(
        self, problem: Problem, state: Tensor | None, at_reset: Tensor | None
    ) -> Tensor | None:
        """[G, B, W], twice -> the segments' initial states [G, S, W]."""
        given = state if state is not None else at_reset
        if given is None:
            return None
        out = given.new_zeros(problem.G, len(self.row), given.shape[-1])
        for g, backwards in enumerate(problem.reverse):
            begins = self._begin(backwards)
            for source, here in ((state, begins), (at_reset, ~begins)):
                if source is not None:
                    out[g, here] = source[g, self.row[here]]
        return out

    def final(self, problem: Problem, last: Tensor, state: Tensor | None) -> Tensor:
        """The segments' last states [G, S, W] -> the rows' [G, B, W]; `state` is the initial one,
        which a row without steps keeps."""
        shape = (problem.G, problem.B, last.shape[-1])
        out = last.new_zeros(shape) if state is None else state.clone()
        for g, backwards in enumerate(problem.reverse):
            ends = self._end(backwards)
            out[g, self.row[ends]] = last[g, ends]
        return out

    def final_gradient(self, problem: Problem, grad: Tensor | None) -> Tensor | None:
        """Backward of :meth:`final` to the segments."""
        if grad is None:
            return None
        out = grad.new_zeros(problem.G, len(self.row), grad.shape[-1])
        for g, backwards in enumerate(problem.reverse):
            ends = self._end(backwards)
            out[g, ends] = grad[g, self.row[ends]]
        return out

    def initial_gradient(
        self, problem: Problem, grad: Tensor, final: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Backward of :meth:`initial` [G, S, W] to (the initial state, the state at resets), both
        [G, B, W]; `final` is the gradient of the rows' last states, which rows without steps hand
        on."""
        shape = (problem.G, problem.B, grad.shape[-1])
        wide = torch.promote_types(grad.dtype, torch.float32)  # a row's resets may be many
        start, at_reset = grad.new_zeros(shape), grad.new_zeros(shape, dtype=wide)
        if final is not None:
            start.copy_(final)
            start[:, self.row] = 0
        for g, backwards in enumerate(problem.reverse):
            begins = self._begin(backwards)
            start[g, self.row[begins]] = grad[g, begins]
            at_reset[g].index_add_(0, self.row[~begins], grad[g, ~begins].to(wide))
        return start, at_reset.to(grad.dtype)


def packed(problem: Problem, inputs: Inputs) -> tuple[Problem, Inputs, Segments]:
    """The same layer over the packed batch of its segments. Where these are is found out on the
    CPU, so that a call whose lengths or resets are elsewhere waits for that device."""
    lengths, reset = (None if t is None else t.cpu() for t in (inputs.lengths, inputs.reset))
    cuts = Segments.of(problem, lengths, reset).on(problem.device)
    S = len(cuts.row)
    ours = problem._replace(T=len(cuts.batch_sizes), B=S, packed=True, lengths=False, reset=False)
    given = Inputs(
        cuts.gather(inputs.x),
        cuts.batch_sizes,
        None,
        None,
        (
            cuts.initial(problem, inputs.h0, inputs.h_reset),
            cuts.initial(problem, inputs.c0, inputs.c_reset),
            None,
            None,
        ),
        inputs.weights,
    )
    return ours, given, cuts
