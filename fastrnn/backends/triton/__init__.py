"""Triton kernels on GPUs, NVIDIA's and AMD's, with what a build of torch for them brings along.

Nothing here imports Triton before a layer on a GPU asks: `import fastrnn` stays light, and works
without it. With TRITON_INTERPRET=1 in the environment the same kernels run on CPU tensors, slowly,
in Triton's interpreter, for those who ask for this backend by name."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import UNVALIDATED, Grads, Inputs, Outputs, Problem, SavedShape
from .plan import saved_shapes

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MIXED = 63  # groups whose directions are the bits of one argument


class _Triton:
    """See :class:`fastrnn.backends.Backend`."""

    name = "triton"
    differentiable = False
    on_request: str | None = UNVALIDATED

    def supports(self, problem: Problem) -> str | None:
        if problem.dtype not in _DTYPES:
            return f"no kernel for {problem.dtype}; there is one for float32, float16 and bfloat16"
        device = problem.device.type
        if device != "cuda" and not (device == "cpu" and _is_interpreter_asked_for()):
            return f"the kernels run on CUDA and HIP tensors, not on {device}"
        if device == "cpu" and problem.dtype == torch.bfloat16:
            return "Triton's interpreter rounds and multiplies bfloat16 wrongly"
        if problem.P:
            return "proj_size is not supported by the kernels"
        groups = len(problem.reverse)
        if groups > _MIXED and len(set(problem.reverse)) > 1:
            return f"at most {_MIXED} groups may differ in direction, not {groups}"
        if problem.stacked:
            return "the kernels take the weights of each group apart"
        cells = _cells()
        if isinstance(cells, str):
            return cells
        if problem.cell.name not in cells:
            return f"no kernel for the cell {problem.cell.name}"
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
    ) -> list[Tensor | None]:
        from . import scan

        return scan.backward(problem, inputs, y, saved, grads, needs, samples)

    def saved_shapes(self, problem: Problem, N: int) -> list[SavedShape]:
        return saved_shapes(problem, N)


def _is_interpreter_asked_for() -> bool:
    from .. import asked

    return os.environ.get("TRITON_INTERPRET") == "1" and asked() == "triton"


def _cells() -> tuple[str, ...] | str:
    """Names of the cells that there are kernels for, or why there are none."""
    try:
        from .cells import TWINS
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return tuple(TWINS)


# Dynamo takes both for constants (see fastrnn.backends.asked).
_is_interpreter_asked_for._dynamo_marked_constant = True  # type: ignore[attr-defined]
_cells._dynamo_marked_constant = True  # type: ignore[attr-defined]

TRITON = _Triton()
