"""float16 on a CPU: the float32 kernels, between two conversions.

torch's own layers multiply matrices of float16 several times slower there than of float32. What is
saved for the backward pass stays in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cells import Cell
from .base import Grads, Inputs, Outputs, Problem, SavedShape
from .cpu import CPU


def pays(cell: Cell, T: int, rows: int, I: int, H: int, grad: bool) -> bool:
    """Whether a layer is faster so than by torch's own functions. Those compute a single step of
    few multiplications before tensors are converted, and few rows before the weights are, unless
    gradients are wanted. The limits are where both take the same time on two cores with AVX2."""
    weights = cell.gates * H * (I + H)
    if grad:
        return T > 1 or rows * weights >= 2**17
    return rows * 2**17 >= weights and (T > 1 or (rows >= 4 and rows * weights >= 2**16))


class _Widened:
    """See :class:`fastrnn.backends.Backend`."""

    name = "widened"
    differentiable = False
    on_request: str | None = None

    def supports(self, problem: Problem) -> str | None:
        if problem.dtype != torch.float16:
            return f"it is for float16, which it computes in float32, and not for {problem.dtype}"
        return CPU.supports(_wide(problem))

    def saved_shapes(self, problem: Problem, N: int) -> list[SavedShape]:
        return CPU.saved_shapes(_wide(problem), N)

    def forward(self, problem: Problem, inputs: Inputs, save: bool) -> Outputs:
        y, h_n, c_n, c, saved = CPU.forward(_wide(problem), _widened(inputs), save)
        return Outputs(y.half(), h_n.half(), _half(c_n), _half(c), saved)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        y: Tensor,
        saved: list[Tensor],
        grads: Grads,
        needs: Sequence[bool],
        samples: int,
    ) -> list[Tensor | None]:
        wide_grads = Grads(*map(_float, grads))
        gradients = CPU.backward(
            _wide(problem), _widened(inputs), y.float(), saved, wide_grads, needs, samples
        )
        return [_half(gradient) for gradient in gradients]


WIDENED = _Widened()


def _wide(problem: Problem) -> Problem:
    return problem._replace(dtype=torch.float32)


def _widened(inputs: Inputs) -> Inputs:
    x, batch_sizes, lengths, reset, states, weights = inputs
    wide_states, wide_weights = [_float(s) for s in states], [_float(w) for w in weights]
    return Inputs(x.float(), batch_sizes, lengths, reset, wide_states, wide_weights)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _half(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.half()
