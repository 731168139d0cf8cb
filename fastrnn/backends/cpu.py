"""The fused C++ kernels on CPU tensors: packed weight panels, the cell in the GEMM's epilogue.

Everything the kernels write, workspaces included, is allocated here by torch.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cores, missing
from .base import Grads, Inputs, Outputs, Problem, SavedShape, StepInputs
from .segments import packed

try:
    from .. import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _MISSING: str | None = missing.reason("_C", error)
    _CELLS: dict[str, tuple[int, int, int, int, bool]] = {}
else:
    _MISSING = None
    _CELLS = _C.cells()
    if (_limit := cores.quota()) is not None:
        _C.limit_cores(_limit)

_DEVICE = torch.device("cpu")  # comparing devices takes torch less than telling their types
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
        """Call `kernel` with scratch memory. Where that is too little, it does nothing but answer
        how much it takes, which may be more by the next call: each thread takes its own, and the
        cores that the process may use change while it runs."""
        memory = self._memory
        while needed := kernel(memory, *arguments):
            memory = torch.empty(needed, dtype=torch.uint8, device="cpu")
            if needed <= self._most:
                self._memory = memory


_workspace = _Workspace()


class _Cpu:
    """See :class:`fastrnn.backends.Backend`."""

    name = "cpu"
    differentiable = False
    on_request: str | None = None

    def supports(self, problem: Problem) -> str | None:
        if _MISSING is not None:
            return _MISSING
        if problem.device != _DEVICE:
            return f"the kernels run on CPU tensors, not on {problem.device.type}"
        if problem.dtype not in _DTYPES:
            return f"no kernel for {problem.dtype}; there is one for float32, float64 and bfloat16"
        if problem.cell.name not in _CELLS:
            return f"no kernel for the cell {problem.cell.name}"
        if problem.P and problem.cell.states == 1:
            return f"the kernels have no projection for the cell {problem.cell.name}"
        groups = len(problem.reverse)
        if groups > _C.max_groups:
            return f"the kernels take at most {_C.max_groups} groups, not {groups}"
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
        run = _forward_cut if problem.lengths or problem.reset else _forward
        return run(problem, inputs, save)

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
        run = _backward_cut if problem.lengths or problem.reset else _backward
        return run(problem, inputs, y, saved, grads, needs, samples)

    def step(
        self, problem: Problem, inputs: StepInputs, save: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        x, h0, c0, weights = inputs
        shape = (problem.B, problem.H)
        h = x.new_empty(shape) if h0 is None else _empty_like(h0)
        c = None
        if problem.cell.states > 1:
            c = x.new_empty(shape) if c0 is None else _empty_like(c0)
        saved = _shapes(problem, (1, problem.B)).empty_saved(x) if save else []
        _workspace.run(
            _C.forward, _CELLS[problem.cell.name][0], torch.get_num_threads(), problem.reverse,
            problem.B, x, None, h0, c0, weights, h, h, c, None, saved,
        )  # fmt: skip
        return h, c, saved

    def step_backward(
        self,
        problem: Problem,
        inputs: StepInputs,
        saved: list[Tensor],
        grads: tuple[Tensor | None, Tensor | None],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        x, h0, c0, weights = inputs
        dx, dh0, dc0, *dweights = [
            _empty_like(t) if needed and t is not None else None
            for t, needed in zip((x, h0, c0, *weights), needs, strict=True)
        ]
        dh, dc = grads
        _workspace.run(
            _C.backward, _CELLS[problem.cell.name][0], torch.get_num_threads(), problem.reverse,
            problem.B, x, None, h0, c0, weights, None, saved, (dh, None, dc, None),
            (dx, dh0, dc0), dweights, 1, None,
        )  # fmt: skip
        return [dx, dh0, dc0, *dweights]

    def prepare(self, problem: Problem, inputs: Inputs, outputs: Outputs) -> Callable[[], None]:
        y, h_n, c_n, _, _ = outputs
        cell, threads = _CELLS[problem.cell.name][0], torch.get_num_threads()
        kernel = _C.Prepared(
            cell, threads, inputs.x, inputs.h0, inputs.c0, inputs.weights, y, h_n, c_n
        )
        return functools.partial(_workspace.run, kernel)


class _Shapes(NamedTuple):
    """Of outputs; the dtypes of what is saved are None where they are x's: torch takes longer when
    told."""

    y: tuple[int, ...]
    h_n: tuple[int, ...]
    c_n: tuple[int, ...] | None
    c: tuple[int, ...] | None
    saved: list[tuple[tuple[int, ...], torch.dtype | None]]

    def empty(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """y, h_n, c_n and c."""
        _, _, c_n, c, _ = self
        return (
            x.new_empty(self.y),
            x.new_empty(self.h_n),
            None if c_n is None else x.new_empty(c_n),
            None if c is None else x.new_empty(c),
        )

    def empty_saved(self, x: Tensor) -> list[Tensor]:
        return [
            x.new_empty(shape) if dtype is None else x.new_empty(shape, dtype=dtype)
            for shape, dtype in self.saved
        ]


@functools.lru_cache(maxsize=4096)  # finding them takes as long as a small kernel
def _shapes(problem: Problem, steps: tuple[int, ...]) -> _Shapes:
    """`steps` is what comes before the last dimension of x."""
    G, B, H, dtype = problem.G, problem.B, problem.H, problem.dtype
    has_c = problem.cell.states > 1
    shapes = CPU.saved_shapes(problem, math.prod(steps))
    return _Shapes(
        (*steps, G * problem.out),
        (G, B, problem.out),
        (G, B, H) if has_c else None,
        (*steps, G * H) if has_c and problem.all_states else None,
        [(shape, None if kind == dtype else kind) for shape, kind in shapes],
    )


def _steps_of(problem: Problem, x: Tensor) -> tuple[int, ...]:
    return x.shape[:1] if problem.packed else (problem.T, problem.B)


def _forward(
    problem: Problem, inputs: Inputs, save: bool, room: list[Tensor] | None = None
) -> Outputs:
    """Of a dense batch, or of a packed one, which may be one of no steps. `room` is where to save,
    if that is there already."""
    x, batch_sizes, _, _, (h0, c0, _, _), weights = inputs
    shapes = _shapes(problem, _steps_of(problem, x))
    y, h_n, c_n, c = shapes.empty(x)
    if room is None:
        room = shapes.empty_saved(x) if save else []
    if problem.T:
        _workspace.run(
            _C.forward, _CELLS[problem.cell.name][0], torch.get_num_threads(), problem.reverse,
            problem.B, x, batch_sizes, h0, c0, weights, y, h_n, c_n, c, room,
        )  # fmt: skip
    return Outputs(y, h_n, c_n, c, room)


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
    """No gradients of states at resets, which are cuts of a batch."""
    x, batch_sizes, _, _, (h0, c0, _, _), weights = inputs
    shapes = _shapes(problem, _steps_of(problem, x))
    dx = _empty_like(x) if needs[0] else None
    dh0 = x.new_empty(shapes.h_n) if needs[1] else None
    dc0 = x.new_empty(shapes.c_n) if needs[2] and shapes.c_n is not None else None
    wanted = [w if needed else None for w, needed in zip(weights, needs[5:], strict=True)]
    if samples == 1:
        dweights = [None if w is None else _empty_like(w) for w in wanted]
    else:
        dweights = _empty_gradients(problem, wanted, samples)
    if problem.T:
        _workspace.run(
            _C.backward, _CELLS[problem.cell.name][0], torch.get_num_threads(), problem.reverse,
            problem.B, x, batch_sizes, h0, c0, weights, y, saved, grads, (dx, dh0, dc0), dweights,
            samples, sample_of_row,
        )  # fmt: skip
    else:
        dweights = [None if d is None else d.zero_() for d in dweights]
    if samples > 1 and problem.stacked:
        dweights = [None if d is None else d.transpose(0, 1) for d in dweights]
    return [dx, dh0, dc0, None, None, *dweights]


def _forward_cut(problem: Problem, inputs: Inputs, save: bool) -> Outputs:
    """Of a batch with lengths or resets: that of the packed batch of its segments."""
    T, B, x = problem.T, problem.B, inputs.x
    ours, given, cuts = packed(problem, inputs)
    room = _shapes(problem, (T, B)).empty_saved(x) if save else []  # whatever the cuts are
    y, h_n, c_n, c, _ = _forward(ours, given, save, room)
    return Outputs(
        cuts.scatter(y, T, B),
        cuts.final(problem, h_n, inputs.h0),
        None if c_n is None else cuts.final(problem, c_n, inputs.c0),
        None if c is None else cuts.scatter(c, T, B),
        room,
    )


def _backward_cut(
    problem: Problem,
    inputs: Inputs,
    y: Tensor,
    saved: list[Tensor],
    grads: Grads,
    needs: Sequence[bool],
    samples: int,
) -> list[Tensor | None]:
    ours, given, cuts = packed(problem, inputs)
    dy, d_every_c = (None if d is None else cuts.gather(d) for d in (grads.y, grads.c))
    dh_n, dc_n = (cuts.final_gradient(problem, d) for d in (grads.h_n, grads.c_n))
    h_wanted, c_wanted = needs[1] or needs[3], needs[2] or needs[4]
    dx, dh, dc, _, _, *dweights = _backward(
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


def _empty_like(tensor: Tensor) -> Tensor:
    """Contiguous memory; saying so takes torch longer."""
    if tensor.is_contiguous():
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _empty_gradients(
    problem: Problem, weights: Sequence[Tensor | None], samples: int
) -> list[Tensor | None]:
    """As the kernels fill them: [samples, *weight.shape], or, of stacked weights, [G, samples,
    ...].

    They are large, come and go together, and so are one allocation: of several, malloc returns to
    the system what it takes again in the next call, page by page."""
    memory, offsets = None, [0]
    for w in weights:  # each from a cache line of its own on
        offsets.append(offsets[-1] + (0 if w is None else -(-w.numel() * samples // 64) * 64))
    found: list[Tensor | None] = []
    for w, offset in zip(weights, offsets, strict=False):
        if w is None:
            found.append(None)
            continue
        memory = memory or w.new_empty(offsets[-1]).untyped_storage()
        shape = (problem.G, samples, *w.shape[1:]) if problem.stacked else (samples, *w.shape)
        found.append(w.new_empty(0).set_(memory, offset, shape))  # type: ignore[call-overload]
    return found


CPU = _Cpu()
