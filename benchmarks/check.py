"""No time without a right answer: our error against what plain PyTorch allows itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.cases import Results, Setup

FACTOR = 2.0


class WrongResultError(Exception):
    """A layer's output or gradient is further from the reference than the budget allows."""


def error(value: Tensor, reference: Tensor) -> float:
    """max|value - reference| / max|reference|."""
    if value.shape != reference.shape:
        raise WrongResultError(f"shape {tuple(value.shape)} instead of {tuple(reference.shape)}")
    scale = reference.abs().max().clamp(min=torch.finfo(reference.dtype).tiny)
    return float((value.to(reference.dtype) - reference).abs().max() / scale)


def floor(shape: Sequence[int], dtype: torch.dtype, eps: float | None = None) -> float:
    """The error that even a right result may have where torch's own is, by luck, nothing.

    Rounding the result to its dtype costs half an epsilon. The longest sum, over a gate's inputs
    or over all rows of a weight's gradient, accumulates as many roundings in float32, and
    independent roundings grow with the square root of their number. `eps` is that of the dtype,
    unless products may round their factors further.
    """
    T, B, I, H = shape
    unit = (eps or torch.finfo(dtype).eps) / 2
    return unit + math.sqrt(max(I + H, T * B)) * torch.finfo(torch.float32).eps / 2


def compare(ours: Results, theirs: Results, exact: Results, floor: float) -> dict[str, float]:
    """The quotient of our error and its budget, by tensor; raises where it is above one.

    The budget is twice the error of torch.nn in the same dtype, plus `floor`.
    """
    used = {}
    for name, our, their, right in zip(
        exact.names, ours.tensors, theirs.tensors, exact.tensors, strict=True
    ):
        ours_error, theirs_error = error(our, right), error(their, right)
        budget = FACTOR * theirs_error + floor
        # The negation catches NaN, which compares false with everything.
        if not ours_error <= budget:
            raise WrongResultError(
                f"{name}: error {ours_error:.2e}, torch's {theirs_error:.2e}, budget {budget:.2e}"
            )
        used[name] = ours_error / budget
    return used


def verify(setup: Setup) -> dict[str, float]:
    """Checks fastrnn against torch.nn and the exact results of one case."""
    ours, theirs = setup.results("fastrnn"), setup.results("torch")
    return compare(ours, theirs, setup.reference(), floor(setup.case.shape, setup.x.dtype))


def verify_opponent(y: Tensor, setup: Setup) -> None:
    """Whether another runtime computes the same function: half of the digits tell that.

    Its accuracy is its own affair; a gate in the wrong place is ours.
    """
    theirs = setup.results("torch").tensors[0]
    found, budget = error(y, theirs), math.sqrt(torch.finfo(theirs.dtype).eps)
    if not found <= budget:
        raise WrongResultError(f"y: error {found:.2e}, budget {budget:.2e}")
