"""The fused C++ kernels on CPU tensors: packed weight panels, the cell in the GEMM's epilogue.

Everything the kernels write, workspaces included, is allocated here by torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from .base import Grads, Inputs, Outputs, Problem, SavedShape
from .segments import packed

try:
    from .. import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _MISSING: str | None = f"the extension fastrnn._C is not built: {error}"
    _CELLS: dict[str, tuple[int, int, int, int, bool]] = {}
else:
    _MISSING = None
    _CELLS = _C.cells()

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _padded(units: int) -> int:
    return -(-units // _C.unit_pad) * _C.unit_pad


class _Workspace(threading.local):
    """The kernels' scratch memory, kept from call to call: fresh pages cost a training step 5%.

    Each thread has its own, and no call leaves anything in it for the next.
    """

    def __init__(self, keep: int = 128 << 20) -> None:
        self._most = keep  # bytes; a larger one goes back at once
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def run(self, kernel: Callable[..., int], *arguments: object) -> None:
        """Call `kernel` with scratch memory; it answers how much it takes if that is too little."""
        needed = kernel(self._memory, *arguments)
        if not needed:
            return
        memory = torch.empty(needed, dtype=torch.uint8, device="cpu")
        if needed <= self._most:
            self._memory = memory
        kernel(memory, *arguments)


_workspace = _Workspace()


class _Cpu:
    """See :class:`fastrnn.backends.Backend`."""

    name = "cpu"
    differentiable = False
    on_request: str | None = None

    def supports(self, problem: Problem) -> str | None:
        if _MISSING is not None:
            return _MISSING
        if problem.device.type != "cpu":
            return f"the kernels run on CPU tensors, not on {problem.device.type}"
        if problem.dtype not in _DTYPES:
            return f"no kernel for {problem.dtype}; there is one for float32, float64 and bfloat16"
        if problem.cell.name not in _CELLS:
            return f"no kernel for the cell {problem.cell.name}"
        if problem.P and problem.cell.states == 1:
            return f"the kernels have no projection for the cell {problem.cell.name}"
        if problem.G > _C.max_groups:
            return f"the kernels take at most {_C.max_groups} groups, not {problem.G}"
        if problem.B == 0:
            return "an empty batch leaves the kernels nothing to do"
        return None

    def saved_shapes(self, problem: Problem, N: int) -> list[SavedShape]:
        """Shapes of what forward saves: post-activation gates, cell states where there are, and
        what a projection projects."""
        dtype = _accumulate_dtype(problem.dtype)
        units = _padded(problem.H)
        shapes: list[SavedShape] = [((problem.G, N, problem.cell.saved * units), dtype)]
        if problem.cell.states > 1:
            shapes.append(((problem.G, N, units), dtype))
        if problem.P:
            shapes.append(((N, problem.G * problem.H), problem.dtype))
        return shapes

    def forward(self, problem: Problem, inputs: Inputs, save: bool) -> Outputs:
        saved = []
        if save:
            N = problem.T * problem.B if inputs.batch_sizes is None else inputs.x.shape[0]
            x = inputs.x
            saved = [  # naming the dtype takes torch longer
                x.new_empty(*shape) if kind == x.dtype else x.new_empty(shape, dtype=kind)
                for shape, kind in self.saved_shapes(problem, N)
            ]
        if inputs.lengths is None and inputs.reset is None:
            return _forward(problem, inputs, saved)
        ours, given, cuts = packed(problem, inputs)
        y, h_n, c_n, c, _ = (_forward if ours.T else _forward_nothing)(ours, given, saved)
        return Outputs(
            cuts.scatter(y, problem.T, problem.B),
            cuts.final(problem, h_n, inputs.h0),
            None if c_n is None else cuts.final(problem, c_n, inputs.c0),
            None if c is None else cuts.scatter(c, problem.T, problem.B),
            saved,
        )

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
        if inputs.lengths is None and inputs.reset is None:
            return _backward(problem, inputs, y, saved, grads, needs, samples)
        ours, given, cuts = packed(problem, inputs)
        dy, d_every_c = (None if d is None else cuts.gather(d) for d in (grads.y, grads.c))
        dh_n, dc_n = (cuts.final_gradient(problem, d) for d in (grads.h_n, grads.c_n))
        h_wanted, c_wanted = needs[1] or needs[3], needs[2] or needs[4]
        dx, dh, dc, _, _, *dweights = (_backward if ours.T else _backward_nothing)(
            ours,
            given,
            cuts.gather(y),
            saved,
            Grads(dy, dh_n, dc_n, d_every_c),
            (needs[0], h_wanted, c_wanted, False, False, *needs[5:]),
            samples,
            None if samples == 1 else cuts.rows % problem.B // (problem.B // samples),
        )
        h_grads = (None, None) if dh is None else cuts.initial_gradient(problem, dh, grads.h_n)
        c_grads = (None, None) if dc is None else cuts.initial_gradient(problem, dc, grads.c_n)
        if dx is not None:
            dx = cuts.scatter(dx, problem.T, problem.B)
        states = chain.from_iterable(zip(h_grads, c_grads, strict=True))
        each = zip((dx, *states, *dweights), needs, strict=True)
        return [d if needed else None for d, needed in each]

    def prepare(self, problem: Problem, inputs: Inputs, outputs: Outputs) -> Callable[[], None]:
        y, h_n, c_n, _, _ = outputs
        cell, threads = _CELLS[problem.cell.name][0], torch.get_num_threads()
        kernel = _C.Prepared(
            cell, threads, inputs.x, inputs.h0, inputs.c0, inputs.weights, y, h_n, c_n
        )
        return lambda: _workspace.run(kernel)


def _layer(problem: Problem, inputs: Inputs) -> tuple[object, ...]:
    """What the kernels are told of a dense batch, or a packed one."""
    x, batch_sizes, _, _, (h0, c0, *_), weights = inputs
    cell, threads = _CELLS[problem.cell.name][0], torch.get_num_threads()
    return cell, threads, problem.reverse, problem.B, x, batch_sizes, h0, c0, weights


def _forward(problem: Problem, inputs: Inputs, saved: list[Tensor]) -> Outputs:
    """A dense batch, or a packed one."""
    x, G, B, H, out = inputs.x, problem.G, problem.B, problem.H, problem.out
    has_c = problem.cell.states > 1
    steps = x.shape[:-1]
    y, h_n = x.new_empty(*steps, G * out), x.new_empty(G, B, out)
    c_n = x.new_empty(G, B, H) if has_c else None
    c = x.new_empty(*steps, G * H) if problem.all_states and has_c else None
    _workspace.run(_C.forward, *_layer(problem, inputs), y, h_n, c_n, c, saved)
    return Outputs(y, h_n, c_n, c, saved)


def _backward(
    problem: Problem,
    inputs: Inputs,
    y: Tensor,
    saved: list[Tensor],
    grads: Grads,
    needs: Sequence[bool],
    samples: int,
    sample_of_row: Tensor | None = None,
) -> list[Tensor | None]:
    """A dense batch, or a packed one: gradients of x, h0, c0, the two states at resets (None), and
    the weights."""
    G, B, H, x = problem.G, problem.B, problem.H, inputs.x
    dx = _empty_like(x) if needs[0] else None
    dh0 = x.new_empty(G, B, problem.out) if needs[1] else None
    dc0 = x.new_empty(G, B, H) if needs[2] else None
    dweights = [
        None if w is None or not needed
        else _empty_like(w) if samples == 1
        else _empty_gradients(problem, w, samples)
        for w, needed in zip(inputs.weights, needs[5:], strict=True)
    ]  # fmt: skip
    states = (dx, dh0, dc0)
    _workspace.run(
        _C.backward, *_layer(problem, inputs), y, saved, grads, states, dweights, samples,
        sample_of_row,
    )  # fmt: skip
    if samples > 1 and problem.stacked:
        dweights = [None if d is None else d.transpose(0, 1) for d in dweights]
    return [dx, dh0, dc0, None, None, *dweights]


def _empty_like(tensor: Tensor) -> Tensor:
    """Contiguous memory; saying so takes torch longer."""
    if tensor.is_contiguous():
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _empty_gradients(problem: Problem, weight: Tensor, samples: int) -> Tensor:
    """As the kernels fill them: [samples, *weight.shape], or, of stacked weights, [G, samples,
    ...]."""
    if problem.stacked:
        return weight.new_empty(problem.G, samples, *weight.shape[1:])
    return weight.new_empty(samples, *weight.shape)


def _forward_nothing(problem: Problem, inputs: Inputs, saved: list[Tensor]) -> Outputs:
    """What _forward answers for a batch of no segments."""
    x, G, H = inputs.x, problem.G, problem.H
    has_c = problem.cell.states > 1
    c_n = x.new_empty((G, 0, H)) if has_c else None
    c = x.new_empty((0, G * H)) if has_c and problem.all_states else None
    return Outputs(
        x.new_empty((0, G * problem.out)), x.new_empty((G, 0, problem.out)), c_n, c, saved
    )


def _backward_nothing(
    problem: Problem,
    inputs: Inputs,
    y: Tensor,
    saved: list[Tensor],
    grads: Grads,
    needs: Sequence[bool],
    samples: int,
    sample_of_row: Tensor | None = None,
) -> list[Tensor | None]:
    """What _backward answers for a batch of no segments."""
    dh0, dc0 = (y.new_empty((problem.G, 0, width)) for width in (problem.out, problem.H))
    lead = () if samples == 1 else (samples,)
    dweights = [None if w is None else w.new_zeros((*lead, *w.shape)) for w in inputs.weights]
    return [torch.empty_like(inputs.x), dh0, dc0, None, None, *dweights]


CPU = _Cpu()
