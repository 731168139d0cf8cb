"""The fused C++ kernels on CPU tensors: packed weight panels, the cell in the GEMM's epilogue.

Here tensors become addresses. Everything the kernels write, workspaces included, is allocated
here by torch.
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

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _padded(units: int) -> int:
    return -(-units // _C.unit_pad) * _C.unit_pad


class _Workspace(threading.local):
    """The kernels' scratch memory, kept from call to call: fresh pages cost a training step 5%.

    Each thread has its own, and no call leaves anything in it for the next.
    """

    def __init__(self, keep: int = 64 << 20) -> None:
        self._most = keep  # bytes; a larger one goes back at once
        self._keep(torch.empty(0, dtype=torch.uint8))

    def run(self, kernel: Callable[..., int], *arguments: object) -> None:
        """Call `kernel` with scratch memory; it answers how much it takes if that is too little."""
        needed = kernel(*arguments, self._start, self._size)
        if not needed:
            return
        fresh = torch.empty(needed, dtype=torch.uint8)
        if needed <= self._most:
            self._keep(fresh)
        kernel(*arguments, fresh.data_ptr(), needed)

    def _keep(self, memory: Tensor) -> None:
        self._memory, self._start, self._size = memory, memory.data_ptr(), memory.numel()


_workspace = _Workspace()


class _Cpu:
    """See :class:`fastrnn.backends.Backend`."""

    name = "cpu"
    differentiable = False

    def supports(self, problem: Problem) -> str | None:
        if _MISSING is not None:
            return _MISSING
        if problem.device.type != "cpu":
            return f"the kernels run on CPU tensors, not on {problem.device.type}"
        if problem.dtype not in _DTYPES:
            return f"no kernel for {problem.dtype}; there is one for float32, float64 and bfloat16"
        if problem.cell.name not in _CELLS:
            return f"no kernel for the cell {problem.cell.name}"
        if problem.grouped:
            return "inputs of each group's own are not supported by the kernels"
        if problem.all_states:
            return "c of every step is not supported by the kernels"
        if problem.P:
            return "proj_size is not supported by the kernels"
        if problem.G > _C.max_groups:
            return f"the kernels take at most {_C.max_groups} groups, not {problem.G}"
        if problem.B == 0:
            return "an empty batch leaves the kernels nothing to do"
        return None

    def saved_shapes(self, problem: Problem, N: int) -> list[SavedShape]:
        """Shapes of what forward saves: post-activation gates, and cell states where there are."""
        dtype = _accumulate_dtype(problem.dtype)
        units = _padded(problem.H)
        gates = ((problem.G, N, problem.cell.saved * units), dtype)
        cells = ((problem.G, N, units), dtype)
        return [gates, cells] if problem.cell.states > 1 else [gates]

    def forward(self, problem: Problem, inputs: Inputs, save: bool) -> Outputs:
        saved = []
        if save:
            N = problem.T * problem.B if inputs.batch_sizes is None else inputs.x.shape[0]
            saved = [
                torch.empty(shape, dtype=kind) for shape, kind in self.saved_shapes(problem, N)
            ]
        if inputs.lengths is None and inputs.reset is None:
            return _forward(problem, inputs, saved)
        ours, given, cuts = packed(problem, inputs)
        y, h_n, c_n, _, _ = _forward(ours, given, saved)
        return Outputs(
            cuts.scatter(y, problem.T, problem.B),
            cuts.final(problem, h_n, inputs.h0),
            None if c_n is None else cuts.final(problem, c_n, inputs.c0),
            None,
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
    ) -> list[Tensor]:
        if inputs.lengths is None and inputs.reset is None:
            return _needed(_backward(problem, inputs, y, saved, grads, needs), needs)
        ours, given, cuts = packed(problem, inputs)
        dy = None if grads.y is None else cuts.gather(grads.y)
        dh_n, dc_n = (cuts.final_gradient(problem, d) for d in (grads.h_n, grads.c_n))
        h_wanted, c_wanted = needs[1] or needs[3], needs[2] or needs[4]
        dx, dh, dc, _, _, *dweights = _backward(
            ours,
            given,
            cuts.gather(y),
            saved,
            Grads(dy, dh_n, dc_n, None),
            (needs[0], h_wanted, c_wanted, False, False, *needs[5:]),
        )
        h_grads = (None, None) if dh is None else cuts.initial_gradient(problem, dh, grads.h_n)
        c_grads = (None, None) if dc is None else cuts.initial_gradient(problem, dc, grads.c_n)
        if dx is not None:
            dx = cuts.scatter(dx, problem.T, problem.B)
        states = chain.from_iterable(zip(h_grads, c_grads, strict=True))
        return _needed((dx, *states, *dweights), needs)

    def prepare(self, problem: Problem, inputs: Inputs, outputs: Outputs) -> Callable[[], None]:
        arguments = _arguments(problem, inputs, outputs)

        def run(_tensors: object = (inputs, outputs)) -> None:  # which it keeps alive
            _workspace.run(_C.forward, *arguments)

        return run


def _needed(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [g for g, needed in zip(grads, needs, strict=True) if needed and g is not None]


def _sizes(problem: Problem, inputs: Inputs) -> tuple[int, ...]:
    T, B = problem.T, problem.B
    N = T * B if inputs.batch_sizes is None else inputs.x.shape[0]
    code, dtype = _CELLS[problem.cell.name][0], _DTYPES[problem.dtype]
    return code, dtype, torch.get_num_threads(), T, B, N, problem.I, problem.H


def _readable(x: Tensor) -> Tensor:
    return x.contiguous() if x.stride(-1) != 1 and x.shape[-1] > 1 else x


def _forward(problem: Problem, inputs: Inputs, saved: list[Tensor]) -> Outputs:
    """A dense batch, or a packed one."""
    G, B, H = problem.G, problem.B, problem.H
    x = _readable(inputs.x)
    weights = [_contiguous(w) for w in inputs.weights]
    h0, c0 = _contiguous(inputs.h0), _contiguous(inputs.c0)
    y = x.new_empty((*x.shape[:-1], G * H))
    h_n = x.new_empty((G, B, H))
    c_n = x.new_empty((G, B, H)) if problem.cell.states > 1 else None
    outputs = Outputs(y, h_n, c_n, None, saved)
    given = inputs._replace(x=x, weights=weights, states=(h0, c0, None, None))
    _workspace.run(_C.forward, *_arguments(problem, given, outputs))
    return outputs


def _arguments(problem: Problem, inputs: Inputs, outputs: Outputs) -> tuple[object, ...]:
    """What _C.forward takes, but for the workspace."""
    x, batch_sizes, saved = inputs.x, inputs.batch_sizes, outputs.saved
    return (
        *_sizes(problem, inputs),
        problem.reverse,
        [_address(w) for w in inputs.weights],
        _address(batch_sizes),
        x.data_ptr(),
        x.stride(0) if batch_sizes is None else 0,
        x.stride(-2),
        _address(inputs.h0),
        _address(inputs.c0),
        outputs.y.data_ptr(),
        outputs.h_n.data_ptr(),
        _address(outputs.c_n),
        saved[0].data_ptr() if saved else 0,
        saved[1].data_ptr() if len(saved) > 1 else 0,
    )


def _backward(
    problem: Problem,
    inputs: Inputs,
    y: Tensor,
    saved: list[Tensor],
    grads: Grads,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """A dense batch, or a packed one: gradients of x, h0, c0, the two states at resets (None), and
    the weights."""
    G, B, H = problem.G, problem.B, problem.H
    x, batch_sizes, y = _readable(inputs.x), inputs.batch_sizes, y.contiguous()
    weights = [_contiguous(w) for w in inputs.weights]
    h0, c0 = _contiguous(inputs.h0), _contiguous(inputs.c0)
    dy, dh_n, dc_n = _contiguous(grads.y), _contiguous(grads.h_n), _contiguous(grads.c_n)
    dx = torch.empty(x.shape, dtype=x.dtype) if needs[0] else None
    dh0 = x.new_empty((G, B, H)) if needs[1] else None
    dc0 = x.new_empty((G, B, H)) if needs[2] else None
    dweights = [
        torch.empty_like(w) if needed and w is not None else None
        for w, needed in zip(weights, needs[5:], strict=True)
    ]
    _workspace.run(
        _C.backward,
        *_sizes(problem, inputs),
        problem.reverse,
        [_address(w) for w in weights],
        _address(batch_sizes),
        x.data_ptr(),
        x.stride(0) if batch_sizes is None else 0,
        x.stride(-2),
        _address(h0),
        _address(c0),
        y.data_ptr(),
        saved[0].data_ptr(),
        saved[1].data_ptr() if len(saved) > 1 else 0,
        _address(dy),
        _address(dh_n),
        _address(dc_n),
        _address(dx),
        _address(dh0),
        _address(dc0),
        [_address(d) for d in dweights],
    )
    return [dx, dh0, dc0, None, None, *dweights]


CPU = _Cpu()
