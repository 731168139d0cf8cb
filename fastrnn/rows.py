"""Rows of a batch, as users name them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .functional import as_tensor


def mask(rows: Any, batch: int) -> Tensor:
    """`rows` as bools [batch]: an int, a slice, indices, or a mask of bools or of the floats 0 and
    1. Of one row alone a mask may have no dimension.

    Raises:
        IndexError: there is no such row.
        ValueError: a mask has another shape or other values, or a row is named twice.
        TypeError: the dtype may be a mask's or an index's, or is neither.
    """
    chosen = torch.zeros(batch, dtype=torch.bool, device="cpu")
    if isinstance(rows, slice):
        chosen[rows] = True
        return chosen
    given = _tensor(rows)
    if given.dtype is torch.bool or given.is_floating_point():
        return _checked_mask(given, batch)
    named = indices(given, batch).reshape(-1)
    if len(set(named.tolist())) < len(named):
        raise ValueError(f"rows are named twice in {named.tolist()}: a mask should be of bools")
    chosen[named.cpu()] = True
    return chosen


def indices(rows: Any, batch: int) -> Tensor:
    """`rows` as int64 from 0 to batch - 1, none or one dimension of them.

    Raises:
        IndexError: there is no such row.
        ValueError: there are more dimensions.
        TypeError: they are no integers, or of uint8, which torch once took for a mask.
    """
    given = _tensor(rows)
    if given.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"rows should be signed integers, or a mask of bools, got {given.dtype}")
    if given.dim() > 1:
        raise ValueError(f"rows should have one dimension, got the shape {tuple(given.shape)}")
    wrong = given[(given < -batch) | (given >= batch)]
    if len(wrong):
        raise IndexError(f"row {int(wrong[0])} is out of range: there are {batch} rows")
    return given.to(torch.int64) % batch


def _checked_mask(given: Tensor, batch: int) -> Tensor:
    if given.dim() == 0 and batch == 1:
        given = given.reshape(1)
    if given.shape != (batch,):
        raise ValueError(
            f"a mask of rows should have the shape ({batch},), got {tuple(given.shape)}"
        )
    if given.dtype is not torch.bool and not bool(((given == 0) | (given == 1)).all()):
        raise ValueError("a mask of rows should be of bools, or of floats that are 0 or 1")
    return given.bool()


def _tensor(rows: Any) -> Tensor:
    # Of NumPy's scalars, which torch 2.6 does not read, the value in Python.
    is_scalar = not isinstance(rows, Tensor) and getattr(rows, "ndim", None) == 0
    return as_tensor(rows.item() if is_scalar else rows, "rows", torch.int64)
