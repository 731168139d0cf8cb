"""Triton kernels on GPUs, NVIDIA's and AMD's, with what a build of torch for them brings along.

Nothing here imports Triton before a layer is served: `import fastrnn` stays light, and works
without it. With TRITON_INTERPRET=1 in the environment the same kernels run on CPU tensors, slowly,
in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import Grads, Inputs, Outputs, Problem, SavedShape

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_MAX_MIXED = 63  # groups whose directions fit the bits of one argument


class Triton:
    """See :class:`fastrnn.backends.Backend`."""

    name = "triton"
    differentiable = False

    def supports(self, problem: Problem) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if problem.device.type != "cuda" and not _interprets(problem.device):
            return f"the kernels run on CUDA or HIP tensors, not on {problem.device.type}"
        if problem.device.type == "cpu" and problem.dtype == torch.bfloat16:
            return "Triton's interpreter rounds and multiplies bfloat16 wrongly"
        if problem.dtype not in _DTYPES:
            return f"no kernel for {problem.dtype}; there is one for float32, float16 and bfloat16"
        if problem.cell.name not in _CELLS:
            return f"no kernel for the cell {problem.cell.name}"
        if problem.P:
            return "proj_size is not supported by the kernels"
        if len(set(problem.reverse)) > 1 and problem.G > _MAX_MIXED:
            return f"at most {_MAX_MIXED} groups may go in different directions, not {problem.G}"
        if problem.B == 0:
            return "an empty batch leaves the kernels nothing to do"
        return None

    def forward(self, problem: Problem, inputs: Inputs, save: bool) -> Outputs:
        from . import scan

        return scan.forward(problem, inputs, save)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        y: Tensor,
        saved: list[Tensor],
        grads: Grads,
        needs: Sequence[bool],
        samples: int,
    ) -> list[Tensor]:
        from . import scan

        return scan.backward(problem, inputs, y, saved, grads, needs, samples)

    def saved_shapes(self, problem: Problem, N: int) -> list[SavedShape]:
        gates = ((N, problem.G, problem.cell.saved * problem.H), problem.dtype)
        c_before = ((N, problem.G, problem.H), torch.float32)
        return [gates, c_before] if problem.cell.states > 1 else [gates]


def _interprets(device: torch.device) -> bool:
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


TRITON = Triton()
