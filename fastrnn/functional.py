"""Layers and stacks of layers as functions: directions, projection, dropout, packing, autocast.

Everything is checked here before a kernel sees it. Nothing here knows a cell or a backend by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout as _dropout

from .autograd import scan
from .backends import Weights, check_batch_sizes
from .cells import CELLS, Cell, States

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def stack(
    cell: str,
    x: Tensor,
    hx: States | None,
    weights: Sequence[Weights],
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, States]:
    """Layers on top of each other, each reading the output of the one below.

    Args:
        cell: a key of :data:`fastrnn.cells.CELLS`.
        x: [T, B, I] of any strides, or [N, I] with `batch_sizes`.
        hx: the cell's initial states, h [L*D, B, out] and c [L*D, B, H], layer by layer and in a
            layer direction by direction,
            or None for zeros. D is the number of directions; out is H, or P with a projection.
        weights: one flat list a layer, as for :func:`layer`.
        bidirectional: every layer runs in both directions, their outputs side by side.
        dropout: probability of an output between two layers to be zeroed while `training`.
        batch_sizes: CPU int64 [T], rows of each step of a packed sequence, longest sequence first.

    Returns:
        The last layer's output [T, B, D*out] or [N, D*out], and the last states, of the shapes of
        `hx`.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together, or the sequence is empty.
    """
    reverse = (False, True) if bidirectional else (False,)
    groups, layers = len(reverse), len(weights)
    ends: list[States] = []
    for k in range(layers):
        states = None if hx is None else tuple(s[k * groups : (k + 1) * groups] for s in hx)
        x, end = layer(cell, x, states, weights[k], reverse, batch_sizes)
        ends.append(end)
        if training and dropout and k < layers - 1:
            x = _dropout(x, dropout)
    if layers == 1:
        return x, ends[0]
    return x, tuple(torch.cat(s) for s in zip(*ends, strict=True))


def layer(
    cell: str,
    x: Tensor,
    states: States | None,
    weights: Weights,
    reverse: Sequence[bool] = (False,),
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, States]:
    """One layer of G groups over one input; group g goes backwards in time where reverse[g].

    Args:
        cell: a key of :data:`fastrnn.cells.CELLS`.
        x: [T, B, I] of any strides, or [N, I] with `batch_sizes`.
        states: h [G, B, out] and, for cells with one, c [G, B, H]; None for zeros.
        weights: per group w_ih [gates*H, I], w_hh [gates*H, out], b_ih and b_hh [gates*H] or None
            and, with a projection,
            w_hr [P, H]: 4 or 5 entries a group, in torch's gate order.
        reverse: the direction of each group.
        batch_sizes: CPU int64 [T], rows of each step of a packed sequence.

    Returns:
        y [T, B, G*out] or [N, G*out], and the last states.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together, or the sequence is empty.
    """
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.get_autocast_dtype(x.device.type)
            states = None if states is None else tuple(cast(s, dtype) for s in states)
            weights = [None if w is None else cast(w, dtype) for w in weights]
            return layer(cell, cast(x, dtype), states, weights, reverse, batch_sizes)
    kind = CELLS[cell]
    batch = _check_input(x, batch_sizes)
    H, out = _check_weights(kind, x, weights, len(reverse))
    if states is None:
        h0 = c0 = None
    else:
        _check_states(kind, x, states, (len(reverse), batch), H, out)
        h0, c0 = (states[0], None) if kind.states == 1 else states
    y, h_n, c_n = scan(cell, x, batch_sizes, h0, c0, weights, reverse, batch)
    return y, (h_n,) if c_n is None else (h_n, c_n)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: double is left alone."""
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor


def _check_input(x: Tensor, batch_sizes: Tensor | None) -> int:
    """The batch size."""
    if x.layout != torch.strided:
        raise RuntimeError(f"input must be a dense tensor, got {x.layout}")
    expected = 3 if batch_sizes is None else 2
    if x.dim() != expected:
        raise RuntimeError(f"input must have {expected} dimensions, got {x.dim()}")
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if batch_sizes is None:
        return x.shape[1]
    if not torch.compiler.is_compiling():
        check_batch_sizes(batch_sizes, x.shape[0])
    return int(batch_sizes[0])


def _check_weights(cell: Cell, x: Tensor, weights: Weights, groups: int) -> tuple[int, int]:
    """H and the width of one group's output."""
    if groups == 0 or len(weights) not in (4 * groups, 5 * groups):
        raise RuntimeError(
            f"expected 4 or 5 weights for each of {groups} groups, got {len(weights)}"
        )
    each = len(weights) // groups
    if each == 5 and cell.states == 1:
        raise RuntimeError(f"{cell.name} has no projection: its only state would change its size")
    w_ih, w_hr = weights[0], weights[4] if each == 5 else None
    rows = w_ih.shape[0] if w_ih is not None and w_ih.dim() else 0
    H = rows // cell.gates
    out = w_hr.shape[0] if w_hr is not None and w_hr.dim() else H
    if H == 0 or out == 0 or rows % cell.gates:
        shapes = [None if w is None else tuple(w.shape) for w in weights]
        raise RuntimeError(f"weights of shapes {shapes} do not make a {cell.name} layer")
    expected: tuple[tuple[int, ...], ...] = (
        (rows, x.shape[-1]),
        (rows, out),
        (rows,),
        (rows,),
        (out, H),
    )
    dtype, device = x.dtype, x.device
    for k, w in enumerate(weights):
        j = k % each
        if w is None:
            if j in (2, 3):
                continue
            raise RuntimeError(f"{_NAMES[j]} is None")
        if w.shape != expected[j]:
            raise RuntimeError(f"Expected {_NAMES[j]} size {expected[j]}, got {list(w.shape)}")
        if w.dtype != dtype or w.device != device:
            _raise_mismatch(x, w, "parameter")
    return H, out


def _check_states(
    cell: Cell, x: Tensor, states: States, lead: tuple[int, int], H: int, out: int
) -> None:
    if len(states) != cell.states:
        raise RuntimeError(f"{cell.name} expects {cell.states} hidden states, got {len(states)}")
    for k, state in enumerate(states):
        shape = (*lead, H if k else out)
        if state.shape != shape:
            raise RuntimeError(f"Expected hidden[{k}] size {shape}, got {list(state.shape)}")
        if state.dtype != x.dtype or state.device != x.device:
            _raise_mismatch(x, state, "hidden")


def _raise_mismatch(x: Tensor, other: Tensor, what: str) -> None:
    if x.device != other.device:
        raise RuntimeError(
            f"Input and {what} tensors are not at the same device, "
            f"found input tensor at {x.device} and {what} tensor at {other.device}"
        )
    raise RuntimeError(
        f"Input and {what} tensors are not the same dtype, "
        f"found input tensor with {x.dtype} and {what} tensor with {other.dtype}"
    )
