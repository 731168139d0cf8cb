"""How far a result may be from the truth: at most twice as far as plain PyTorch's in the same
dtype, both against float64, plus a floor that is derived."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .. import backends
from ..backends import Outputs
from ..cells import States
from .cases import (
    Case,
    Inputs,
    Named,
    as_problem,
    collect,
    float32_products,
    make_inputs,
    run,
    run_plain,
)

CPU = torch.device("cpu")
FACTOR = 2.0
TF32_EPS = 2.0**-10  # as torch.finfo's
BLOCK = 256  # terms of a sum that may be added one after the other
KINKED = {"rnn_relu"}  # cells whose derivative jumps where the new state becomes 0


def roundings(terms: int) -> int:
    """The most additions that a term of a sum of so many goes through, where blocks of terms have
    sums of their own, and those are added pairwise."""
    return min(terms, BLOCK) + math.ceil(math.log2(max(terms / BLOCK, 1)))


def floor(dtype: torch.dtype, terms: int, elements: int, eps: float | None = None) -> float:
    """Relative error, root mean square over the elements of a tensor, that any implementation in
    `dtype` may have, besides what plain PyTorch has.

    A rounding error is up to half an ulp, 1/sqrt(3) of that in the mean square, and independent
    errors add up like a random walk. A result is a sum of up to `terms` products, with its
    :func:`roundings` of the accumulator (float32 or wider), 16 more for an activation (exp, sum,
    quotient), its derivative and the product of up to six of those, and 4 of `dtype`: those of
    three factors that come out of memory (activation, incoming gradient, state) and of the result.
    The mean over n elements scatters by 1/sqrt(2n) of itself, of which three times are allowed. In
    float64 the truth errs as much itself, and so does what plain PyTorch is measured by: 4 times.
    `eps` is that of `dtype`, unless products may round their factors further.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    wide, narrow = torch.finfo(accumulator).eps, eps or torch.finfo(dtype).eps
    ulps = math.sqrt(4) * narrow + math.sqrt(roundings(terms) + 16) * wide
    truth = 4 if dtype == torch.float64 else 1
    return truth * ulps / 2 / math.sqrt(3) * (1 + 3 / math.sqrt(2 * max(elements, 1)))


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


class WrongResultError(AssertionError):
    """An output or a gradient is further from the truth than the budget allows."""


def errors(found: Named, exact: Named) -> dict[str, float]:
    """The root mean square of found - exact, by tensor."""
    return {name: rms(found[name].double() - right) for name, right in exact.items()}


def assert_within_budget(
    ours: Named,
    plain: Named | Mapping[str, float],
    exact: Named,
    dtype: torch.dtype,
    terms: int,
    eps: float | None = None,
) -> dict[str, float]:
    """Our error is at most twice that of plain PyTorch plus the :func:`floor`, for every tensor.

    Errors are root mean squares over a tensor, against its root mean square: a single element near
    zero has no relative error worth the name.

    Args:
        ours: what is to be judged, by name.
        plain: the same by plain PyTorch in `dtype`, or its :func:`errors`.
        exact: the same in float64.
        dtype: of the computation.
        terms: of the longest sum, as for :func:`floor`.
        eps: as for :func:`floor`.

    Returns:
        Of each tensor the share of its budget that our error takes.

    Raises:
        WrongResultError: an error is above its budget, or a tensor's shape or dtype is wrong. Its
            text tells all such tensors.
    """
    if not ours.keys() == plain.keys() == exact.keys():
        raise WrongResultError(f"results {[*ours]} instead of {[*exact]}")
    shares, wrong = {}, []
    for name, right in exact.items():
        our = ours[name]
        if our.shape != right.shape or our.dtype != dtype:
            wrong.append(f"{name}: {our.dtype} {[*our.shape]} instead of {dtype} {[*right.shape]}")
            continue
        theirs = plain[name]
        theirs = rms(theirs.double() - right) if isinstance(theirs, Tensor) else theirs
        error = rms(our.double() - right)
        allowed = FACTOR * theirs + floor(dtype, terms, right.numel(), eps) * rms(right)
        if not error <= allowed:  # so that NaN, which compares false with everything, is wrong
            wrong.append(
                f"{name}: error {error:.3g}, plain PyTorch {theirs:.3g}, allowed {allowed:.3g}"
            )
        shares[name] = error / allowed if allowed else 0.0
    if wrong:
        raise WrongResultError("; ".join(wrong))
    return shares


class Truth:
    """A layer call in float64, and what plain PyTorch makes of it in a dtype on a device.

    `exact_on` is the backend that computes in float64; with `tf32`, products of float32 may round
    their factors to TF32.
    """

    def __init__(
        self,
        cell: str,
        case: Case,
        dtype: torch.dtype,
        exact_on: str = "reference",
        device: torch.device = CPU,
        tf32: bool = False,
    ) -> None:
        self.cell, self.case, self.dtype, self.device = cell, case, dtype, device
        self.precision = "tf32" if tf32 else "ieee"
        self.eps = TF32_EPS if tf32 else None
        self.exact = run(cell, case, self._inputs().to(torch.float64), exact_on)
        with float32_products(self.precision):
            result = _on_cpu(run_plain(cell, case, self.inputs()))
        # cuDNN may choose exact products where TF32 is allowed, and so come closer than TF32 can.
        self.plain = errors(result, self._on_the_side_of(result))

    def inputs(self) -> Inputs:
        """Fresh ones, on the device."""
        return self._inputs().to(self.dtype, self.device)

    def _inputs(self) -> Inputs:
        return make_inputs(self.cell, self.case, self.dtype)

    @property
    def terms(self) -> int:
        """Of the longest sum: a weight gradient's, or a gate's."""
        case = self.case
        return case.T * case.B + case.I + case.H

    def check(self, ours: Named, eps: float | None = None) -> dict[str, float]:
        """The share of each tensor's budget that our error takes; see
        :func:`assert_within_budget`, also for what it raises. `eps` replaces the Truth's own."""
        ours, eps = _on_cpu(ours), eps or self.eps
        exact = self._on_the_side_of(ours)
        return assert_within_budget(ours, self.plain, exact, self.dtype, self.terms, eps)

    def check_outputs(self, ours: Named) -> dict[str, float]:
        """As :meth:`check`, of outputs without gradients."""
        ours = _on_cpu(ours)
        exact = {name: self.exact[name] for name in ours}
        plain = {name: self.plain[name] for name in ours}
        return assert_within_budget(ours, plain, exact, self.dtype, self.terms, self.eps)

    def _on_the_side_of(self, result: Named) -> Named:
        """The truth for a result: at a kink, where a rounding error decides between two slopes that
        differ by O(1), either is right, so the exact run takes the slope that the result took."""
        if self.cell not in KINKED or torch.equal(result["y"] > 0, self.exact["y"] > 0):
            return self.exact
        inputs = self._inputs().to(torch.float64)
        problem, given = as_problem(self.cell, self.case, inputs)
        y, h_n, _, _, _ = on_the_side_of(result["y"], problem, given)
        return collect([y, h_n], inputs)


def on_the_side_of(y: Tensor, problem: backends.Problem, given: backends.Inputs) -> Outputs:
    """A layer in plain torch whose ReLU takes, at every step, the slope that it took in the outputs
    `y` of the same layer, with another rounding."""
    sizes = [problem.B] * problem.T if given.batch_sizes is None else given.batch_sizes.tolist()
    active = (y > 0).reshape(sum(sizes), problem.G, problem.H)
    steps: list[Tensor] = []
    for g, backwards in enumerate(problem.reverse):
        in_time = list(torch.split(active[:, g], sizes))
        steps += reversed(in_time) if backwards else in_time
    slopes = iter(steps)

    def step(gates_x: Tensor, gates_h: Tensor, states: States) -> States:
        return ((gates_x + gates_h) * next(slopes),)

    cell = replace(problem.cell, step=step)
    return backends.REFERENCE.forward(problem._replace(cell=cell), given, False)


def _on_cpu(results: Named) -> Named:
    return {name: tensor.cpu() for name, tensor in results.items()}
