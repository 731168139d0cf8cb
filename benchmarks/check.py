"""No time without a right answer: our error against what plain PyTorch allows itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.cases import Results, Setup, rows_of_steps
from fastrnn.validation import WrongResultError, assert_within_budget, rms


def compare(
    ours: Results, theirs: Results, exact: Results, terms: int, eps: float | None = None
) -> dict[str, float]:
    """The share of its budget that our error takes, by tensor; raises where it is above one.

    `terms` and `eps` are as for :func:`fastrnn.validation.floor`.
    """
    dtype = theirs.tensors[0].dtype
    found, plain, right = (r.by_name() for r in (ours, theirs, exact))
    return assert_within_budget(found, plain, right, dtype, terms, eps)


def verify(setup: Setup) -> dict[str, float]:
    """Checks fastrnn against torch.nn and the exact results of one case."""
    ours, theirs = setup.results("fastrnn"), setup.results("torch")
    terms = max(rows_of_steps(setup.case), setup.case.shape.I + setup.case.shape.H)
    return compare(ours, theirs, setup.reference(), terms)


def verify_opponent(y: Tensor, setup: Setup) -> None:
    """Whether another runtime computes the same function: half of the digits tell that.

    Its accuracy is its own affair; a gate in the wrong place is ours.
    """
    theirs = setup.results("torch").tensors[0]
    if y.shape != theirs.shape:
        raise WrongResultError(f"y: shape {tuple(y.shape)} instead of {tuple(theirs.shape)}")
    error = rms(y.to(theirs.dtype) - theirs) / rms(theirs)
    budget = math.sqrt(torch.finfo(theirs.dtype).eps)
    if not error <= budget:
        raise WrongResultError(f"y: error {error:.2e}, budget {budget:.2e}")
