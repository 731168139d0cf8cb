"""What a backend is given and what it must answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..cells import Cell

Weights = Sequence[Tensor | None]
SavedShape = tuple[tuple[int, ...], torch.dtype]


class Problem(NamedTuple):
    """What a backend needs to know to accept or refuse one layer call."""

    cell: Cell
    dtype: torch.dtype
    device: torch.device
    T: int
    B: int
    I: int
    H: int
    P: int  # size of the projection, 0 without one
    G: int  # groups: directions
    packed: bool
    grad: bool

    @property
    def out(self) -> int:
        """Width of one group's output."""
        return self.P or self.H

    @property
    def per_group(self) -> int:
        """Entries a group has in the flat list of weights."""
        return 5 if self.P else 4


class Backend(Protocol):
    """One implementation of a layer: `G` groups run over a sequence.

    Shapes: x [T, B, I], or [N, I] with batch_sizes [T] when packed; h0 [G, B, out], c0 [G, B, H] or
    None (zeros); weights per group w_ih [gates*H, I], w_hh [gates*H, out], b_ih, b_hh [gates*H] or
    None, and w_hr [P, H] when the problem has P. y [T, B, G*out] or [N, G*out]; h_n [G, B, out];
    c_n [G, B, H], or None for cells without c."""

    name: str
    differentiable: bool  # forward() is plain torch, seen through by autograd: no backward()

    def supports(self, problem: Problem) -> str | None:
        """None, or the reason why this backend does not serve the problem."""

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
        """y, h_n, c_n, and what backward() wants back ([] unless `save`)."""

    def backward(
        self,
        problem: Problem,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        x: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Weights,
        reverse: Sequence[bool],
        y: Tensor,
        saved: list[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """The needed gradients, in the order x, h0, c0, *weights; a gradient given as None is
        zero."""

    def saved_shapes(self, problem: Problem, N: int) -> list[SavedShape]:
        """Shapes and dtypes of what forward() saves, for tracing; N is the number of rows of x."""
