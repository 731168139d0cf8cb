"""The cells: what LSTM, GRU and RNN layers differ in, and nothing else.

A cell turns the input's gates, the recurrent gates and the old states into the new states.
`Cell.step` is plain torch and is the reference that every kernel is tested against. `LSTM` follows
Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000, `GRU` follows Cho et al.
2014 with the reset after the product (as cuDNN and torch), `RNN` is Elman 1990."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

States = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, States], States]


@dataclass(frozen=True, eq=False)
class Cell:
    """The elementwise part of a recurrent layer; equal to itself alone.

    Attributes:
        name: the key in :data:`CELLS`, the same that the compiled kernels use.
        gates: rows of the weights per hidden unit.
        states: what is carried from step to step: 1 (h) or 2 (h, c).
        saved: values per unit that a kernel keeps for the backward pass.
        shared_dgates: whether both gate inputs get the same gradient, so that one buffer serves.
        step: ``step(gates_x [.., gates*H], gates_h [.., gates*H], states) -> new states``, where
            ``gates_x = x W_ih^T + b_ih`` and ``gates_h = h W_hh^T + b_hh``.
    """

    name: str
    gates: int
    states: int
    saved: int
    shared_dgates: bool
    step: Step


def _lstm(gates_x: Tensor, gates_h: Tensor, states: States) -> States:
    _, c = states
    i, f, g, o = (gates_x + gates_h).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(gates_x: Tensor, gates_h: Tensor, states: States) -> States:
    (h,) = states
    xr, xz, xn = gates_x.chunk(3, -1)
    hr, hz, hn = gates_h.chunk(3, -1)
    z = torch.sigmoid(xz + hz)
    n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return (n + z * (h - n),)


def _rnn_tanh(gates_x: Tensor, gates_h: Tensor, states: States) -> States:
    return (torch.tanh(gates_x + gates_h),)


def _rnn_relu(gates_x: Tensor, gates_h: Tensor, states: States) -> States:
    return (torch.relu(gates_x + gates_h),)


CELLS = {
    cell.name: cell
    for cell in (
        Cell("lstm", gates=4, states=2, saved=4, shared_dgates=True, step=_lstm),
        Cell("gru", gates=3, states=1, saved=4, shared_dgates=False, step=_gru),
        Cell("rnn_tanh", gates=1, states=1, saved=1, shared_dgates=True, step=_rnn_tanh),
        Cell("rnn_relu", gates=1, states=1, saved=1, shared_dgates=True, step=_rnn_relu),
    )
}
