"""Calls that torch's own functions compute, with nothing of ours in between, because they are over
before a kernel could be any faster.

They are the small ones in float16 on a CPU, and in training the steps of cells with one gate: two
products, which torch has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from . import _torch, record
from .backends import StepInputs, Weights, asked
from .backends.aten import FUNCTIONS
from .backends.widened import pays
from .cells import CELLS, States
from .plain import is_followed


class Sizes(NamedTuple):
    """Of a stack of layers."""

    cell: str
    H: int
    out: int  # the width of a direction's output
    num_layers: int
    directions: int


_serves: dict[tuple[object, ...], bool] = record.choices()
_MOST = 4096


def serves_step(cell: str, H: int, inputs: StepInputs) -> bool:
    """Whether :func:`step` shall compute a cell's step."""
    x, h, _, weights = inputs
    if type(x) is not Tensor:
        return False
    if x.dtype is torch.float16:
        if not _is_alone(x, h, weights):
            return False
        key = cell, H, x.shape, torch.is_grad_enabled()
        known = _serves.get(key)
        return _remember(key, _decide_step(*key)) if known is None else known
    if CELLS[cell].gates > 1 or x.dtype not in _FLOATS or not torch.is_grad_enabled():
        return False
    if not _is_alone(x, h, weights) or _record_decides(cell, x.dtype):
        return False
    # Autograd's own nodes cost less than a Function, and a kernel makes up for that only by many
    # units, whose product with a state of zeros it leaves out.
    return h is not None or H < 4 or x.shape[0] * H <= 64


_FLOATS = (torch.float32, torch.float64)


def _is_alone(x: Tensor, h: Tensor | None, weights: Weights) -> bool:
    """Whether all is of one dtype and batch size, on a CPU, nobody follows what is computed, and
    neither autocast nor a backend was asked for."""
    if x.dim() != 2 or not x.is_cpu or asked() is not None or _torch.autocast_active():
        return False
    if is_followed() or _torch.transforms_active():
        return False
    if weights[0] is None or weights[0].dtype is not x.dtype:
        return False
    if h is None:
        return True
    fits = isinstance(h, Tensor) and h.dim() == 2 and h.dtype is x.dtype
    return fits and h.shape[0] == x.shape[0]


def serves_layers(sizes: Sizes, x: Tensor, batch_sizes: Tensor | None) -> bool:
    """Whether :func:`layers` shall compute what a stack of layers gives for x, without lengths,
    resets or gradients by recomputation."""
    if x.dtype is not torch.float16 or type(x) is not Tensor or not x.is_cpu:
        return False
    if asked() is not None or is_followed() or _torch.transforms_active():
        return False
    if _torch.autocast_active() or x.dim() != (3 if batch_sizes is None else 2):
        return False
    T = len(x if batch_sizes is None else batch_sizes)
    key = sizes, T, x.shape, torch.is_grad_enabled()
    known = _serves.get(key)
    return _remember(key, _decide_layers(*key)) if known is None else known


def _remember(key: tuple[object, ...], decision: bool) -> bool:
    if len(_serves) >= _MOST:
        _serves.clear()
    _serves[key] = decision
    return decision


def _decide_step(cell: str, H: int, shape: torch.Size, grad: bool) -> bool:
    if _record_decides(cell, torch.float16):
        return False
    B, I = shape
    return B > 0 and not pays(CELLS[cell], 1, B, I, H, grad)


def _decide_layers(sizes: Sizes, T: int, shape: torch.Size, grad: bool) -> bool:
    name, H, out, num_layers, directions = sizes
    if _record_decides(name, torch.float16):
        return False
    *lead, I = shape
    rows, widths = math.prod(lead), [I, directions * out][:num_layers]
    return rows > 0 and not any(pays(CELLS[name], T, rows, width, H, grad) for width in widths)


def _record_decides(cell: str, dtype: torch.dtype) -> bool:
    """Whether the CPU's record may know better: then its backends are asked, as ever."""
    key = cell, dtype
    known = _decides.get(key)
    if known is None:
        wrong = record.is_wrong("aten", cell, dtype, _CPU)
        known = _decides[key] = wrong or record.has_times(_CPU)
    return known


_CPU = torch.device("cpu")
_decides: dict[tuple[str, torch.dtype], bool] = record.choices()


def step(cell: str, H: int, inputs: StepInputs) -> States:
    """The new states. torch checks their sizes."""
    x, h, c, weights = inputs
    if h is None:
        h = c = torch.zeros(x.shape[0], H, dtype=x.dtype, device=x.device)
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
