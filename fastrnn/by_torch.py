"""Calls that torch's own functions compute, with nothing of ours in between: in float16 on a CPU,
where the small ones are over before a kernel could be any faster.

They are cells' steps, and layers as far as torch.nn has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from . import _torch, record
from .backends import Weights, asked
from .backends.aten import FUNCTIONS
from .backends.widened import pays
from .cells import CELLS, States
from .plain import is_followed


class Sizes(NamedTuple):
    """Of a cell, or of a stack of layers."""

    cell: str
    H: int
    out: int  # the width of a direction's output
    num_layers: int = 1
    directions: int = 1


_serves: dict[tuple[Sizes, int, torch.Size, bool], bool] = record.choices()
_MOST = 4096


def serves_step(sizes: Sizes, x: Tensor, h: Tensor | None) -> bool:
    """Whether :func:`step` shall compute a cell's step on x, of float16."""
    if torch.compiler.is_compiling() or x.dim() != 2 or (h is not None and h.dim() != 2):
        return False
    return _serves_small(sizes, 1, x)


def serves_layers(sizes: Sizes, x: Tensor, batch_sizes: Tensor | None) -> bool:
    """Whether :func:`layers` shall compute what a stack of layers gives for x, of float16, without
    lengths, resets or gradients by recomputation."""
    if is_followed() or _torch.transforms_active() or x.dim() != (3 if batch_sizes is None else 2):
        return False
    return _serves_small(sizes, len(x if batch_sizes is None else batch_sizes), x)


def _serves_small(sizes: Sizes, T: int, x: Tensor) -> bool:
    if not x.is_cpu or asked() is not None or _torch.autocast_active():
        return False
    key = sizes, T, x.shape, torch.is_grad_enabled()
    known = _serves.get(key)
    if known is None:
        if len(_serves) >= _MOST:
            _serves.clear()
        known = _serves[key] = _decide(*key, x.device)
    return known


def _decide(sizes: Sizes, T: int, shape: torch.Size, grad: bool, device: torch.device) -> bool:
    """A device's record may know better: then its backends are asked, as ever."""
    name, H, out, num_layers, directions = sizes
    if record.is_wrong("aten", name, torch.float16, device) or record.has_times(device):
        return False
    *lead, I = shape
    rows, widths = math.prod(lead), [I, directions * out][:num_layers]
    return rows > 0 and not any(pays(CELLS[name], T, rows, width, H, grad) for width in widths)


def step(
    cell: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor]
) -> States:
    """The new states. torch checks what it is given."""
    if h is None:
        h = c = torch.zeros(x.shape[0], weights[1].shape[1], dtype=x.dtype, device=x.device)
    if CELLS[cell].states == 1:
        return (FUNCTIONS[cell].step(x, h, *weights),)
    states: States = FUNCTIONS[cell].step(x, (h, c), *weights)
    return states


def layers(
    sizes: Sizes,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: States | None,
    weights: Sequence[Weights],
    dropout: float,
) -> tuple[Tensor, States]:
    """The output and the last states of a stack of layers, whose inputs have been checked. See
    :func:`fastrnn.functional.stack`."""
    cell, H, out, num_layers, directions = sizes
    if states is None:
        B = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
        lead, widths = (num_layers * directions, B), (out, H)[: CELLS[cell].states]
        states = tuple(torch.zeros(*lead, w, dtype=x.dtype, device=x.device) for w in widths)
    hx = states if len(states) > 1 else states[0]
    flat = [w for w in chain(*weights) if w is not None]
    options = flat, weights[0][2] is not None, num_layers, dropout, dropout > 0, directions == 2
    run = FUNCTIONS[cell].layer
    if batch_sizes is None:
        y, *ends = run(x, hx, *options, False)
    else:
        y, *ends = run(x, batch_sizes, hx, *options)
    return y, tuple(ends)
