"""The fused C++ kernels on CPU tensors: packed weight panels, the cell in the GEMM's epilogue.

Everything the kernels write, workspaces included, is allocated here by torch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Bound, Grads, Inputs, Outputs, Problem, SavedShape
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

    def bind(self, problem: Problem) -> Bound:
        return _Cut(problem) if problem.lengths or problem.reset else _Batch(problem)

    def forward(self, problem: Problem, inputs: Inputs, save: bool) -> Outputs:
        return self.bind(problem).forward(inputs, save)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        y: Tensor,
        saved: list[Tensor],
        grads: Grads,
        needs: Sequence[bool],
        samples: int,
    ) -> Sequence[Tensor | None]:
        return self.bind(problem).backward(inputs, y, saved, grads, needs, samples)

    def prepare(self, problem: Problem, inputs: Inputs, outputs: Outputs) -> Callable[[], None]:
        y, h_n, c_n, _, _ = outputs
        cell, threads = _CELLS[problem.cell.name][0], torch.get_num_threads()
        kernel = _C.Prepared(
            cell, threads, inputs.x, inputs.h0, inputs.c0, inputs.weights, y, h_n, c_n
        )
        return lambda: _workspace.run(kernel)


class _Shapes(NamedTuple):
    """Of outputs; the dtypes of what is saved are None where they are x's: torch takes longer when
    told."""

    y: tuple[int, ...]
    c: tuple[int, ...] | None
    saved: list[tuple[tuple[int, ...], torch.dtype | None]]

    @classmethod
    def of(cls, problem: Problem, steps: tuple[int, ...]) -> _Shapes:
        """`steps` is what comes before the last dimension of x."""
        G, H, dtype = problem.G, problem.H, problem.dtype
        has_c = problem.all_states and problem.cell.states > 1
        shapes = CPU.saved_shapes(problem, math.prod(steps))
        saved = [(shape, None if kind == dtype else kind) for shape, kind in shapes]
        return cls((*steps, G * problem.out), (*steps, G * H) if has_c else None, saved)

    def empty_saved(self, x: Tensor) -> list[Tensor]:
        return [
            x.new_empty(shape) if dtype is None else x.new_empty(shape, dtype=dtype)
            for shape, dtype in self.saved
        ]


class _Batch:
    """A dense batch, or a packed one."""

    def __init__(self, problem: Problem) -> None:
        G, B = problem.G, problem.B
        self._problem = problem
        self._cell = _CELLS[problem.cell.name][0]
        self._h = (G, B, problem.out)
        self._c = (G, B, problem.H)
        self._has_c = problem.cell.states > 1
        self._dense = None if problem.packed else _Shapes.of(problem, (problem.T, B))

    def forward(self, inputs: Inputs, save: bool, room: list[Tensor] | None = None) -> Outputs:
        """`room` is where to save, if that is there already."""
        x, batch_sizes, _, _, (h0, c0, _, _), weights = inputs
        problem, shapes = self._problem, self._dense or _Shapes.of(self._problem, x.shape[:1])
        y, h_n = x.new_empty(shapes.y), x.new_empty(self._h)
        c_n = x.new_empty(self._c) if self._has_c else None
        c = None if shapes.c is None else x.new_empty(shapes.c)
        if room is None:
            room = shapes.empty_saved(x) if save else []
        _workspace.run(
            _C.forward, self._cell, torch.get_num_threads(), problem.reverse, problem.B,
            x, batch_sizes, h0, c0, weights, y, h_n, c_n, c, room,
        )  # fmt: skip
        return Outputs(y, h_n, c_n, c, room)

    def backward(
        self,
        inputs: Inputs,
        y: Tensor,
        saved: list[Tensor],
        grads: Grads,
        needs: Sequence[bool],
        samples: int,
        sample_of_row: Tensor | None = None,
    ) -> list[Tensor | None]:
        """No gradients of states at resets, which are cuts of a batch."""
        x, batch_sizes, _, _, (h0, c0, _, _), weights = inputs
        problem = self._problem
        dx = _empty_like(x) if needs[0] else None
        dh0 = x.new_empty(self._h) if needs[1] else None
        dc0 = x.new_empty(self._c) if needs[2] else None
        dweights = [
            None if w is None or not needed
            else _empty_like(w) if samples == 1
            else _empty_gradients(problem, w, samples)
            for w, needed in zip(weights, needs[5:], strict=True)
        ]  # fmt: skip
        _workspace.run(
            _C.backward, self._cell, torch.get_num_threads(), problem.reverse, problem.B,
            x, batch_sizes, h0, c0, weights, y, saved, grads, (dx, dh0, dc0), dweights,
            samples, sample_of_row,
        )  # fmt: skip
        if samples > 1 and problem.stacked:
            dweights = [None if d is None else d.transpose(0, 1) for d in dweights]
        return [dx, dh0, dc0, None, None, *dweights]


class _Nothing:
    """A batch of no segments."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def forward(self, inputs: Inputs, save: bool, room: list[Tensor]) -> Outputs:
        problem, x = self._problem, inputs.x
        shapes, has_c = _Shapes.of(problem, (0,)), problem.cell.states > 1
        return Outputs(
            x.new_empty(shapes.y),
            x.new_empty((problem.G, 0, problem.out)),
            x.new_empty((problem.G, 0, problem.H)) if has_c else None,
            None if shapes.c is None else x.new_empty(shapes.c),
            room,
        )

    def backward(
        self,
        inputs: Inputs,
        y: Tensor,
        saved: list[Tensor],
        grads: Grads,
        needs: Sequence[bool],
        samples: int,
        sample_of_row: Tensor | None = None,
    ) -> list[Tensor | None]:
        problem = self._problem
        dh0, dc0 = (y.new_empty((problem.G, 0, width)) for width in (problem.out, problem.H))
        lead = () if samples == 1 else (samples,)
        dweights = [None if w is None else w.new_zeros((*lead, *w.shape)) for w in inputs.weights]
        return [torch.empty_like(inputs.x), dh0, dc0, None, None, *dweights]


class _Cut:
    """A batch with lengths or resets: the packed batch of its segments."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._shapes = _Shapes.of(problem, (problem.T, problem.B))

    def forward(self, inputs: Inputs, save: bool) -> Outputs:
        problem = self._problem
        ours, given, cuts = packed(problem, inputs)
        room = self._shapes.empty_saved(inputs.x) if save else []  # whatever the cuts are
        y, h_n, c_n, c, _ = (_Batch if ours.T else _Nothing)(ours).forward(given, save, room)
        return Outputs(
            cuts.scatter(y, problem.T, problem.B),
            cuts.final(problem, h_n, inputs.h0),
            None if c_n is None else cuts.final(problem, c_n, inputs.c0),
            None if c is None else cuts.scatter(c, problem.T, problem.B),
            room,
        )

    def backward(
        self,
        inputs: Inputs,
        y: Tensor,
        saved: list[Tensor],
        grads: Grads,
        needs: Sequence[bool],
        samples: int,
    ) -> list[Tensor | None]:
        problem = self._problem
        ours, given, cuts = packed(problem, inputs)
        dy, d_every_c = (None if d is None else cuts.gather(d) for d in (grads.y, grads.c))
        dh_n, dc_n = (cuts.final_gradient(problem, d) for d in (grads.h_n, grads.c_n))
        h_wanted, c_wanted = needs[1] or needs[3], needs[2] or needs[4]
        dx, dh, dc, _, _, *dweights = (_Batch if ours.T else _Nothing)(ours).backward(
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


CPU = _Cpu()
