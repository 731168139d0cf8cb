"""The fused C++ kernels on CPU tensors: packed weight panels, the cell in the GEMM's epilogue.

Here tensors become addresses. Everything the kernels write, workspaces included, is allocated
here by torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import Problem

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

Weights = Sequence[Tensor | None]


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
        if problem.P:
            return "proj_size is not supported by the kernels"
        if problem.G > _C.max_groups:
            return f"the kernels take at most {_C.max_groups} groups, not {problem.G}"
        if problem.B == 0:
            return "an empty batch leaves the kernels nothing to do"
        return None

    def saved_shapes(
        self, problem: Problem, rows: int
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes of what forward saves: post-activation gates, and cell states where there are."""
        dtype = _accumulate_dtype(problem.dtype)
        units = _padded(problem.H)
        gates = ((problem.G, rows, problem.cell.saved * units), dtype)
        cells = ((problem.G, rows, units), dtype)
        return [gates, cells] if problem.cell.states > 1 else [gates]

    def forward(
        self,
        problem: Problem,
        x: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Weights,
        reverse: Sequence[bool],
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        cell, T, B, I, H, G = problem.cell, problem.T, problem.B, problem.I, problem.H, problem.G
        N = T * B if batch_sizes is None else x.shape[0]
        code, dtype, threads = _CELLS[cell.name][0], _DTYPES[problem.dtype], torch.get_num_threads()
        if x.stride(-1) != 1 and I > 1:
            x = x.contiguous()
        weights = [_contiguous(w) for w in weights]
        h0, c0 = _contiguous(h0), _contiguous(c0)
        y = x.new_empty((*x.shape[:-1], G * H))
        h_n = x.new_empty((G, B, H))
        c_n = x.new_empty((G, B, H)) if cell.states > 1 else None
        saved = []
        if save:
            shapes = self.saved_shapes(problem, N)
            saved = [torch.empty(shape, dtype=kind) for shape, kind in shapes]
        _workspace.run(
            _C.forward,
            code,
            dtype,
            threads,
            T,
            B,
            N,
            I,
            H,
            reverse,
            [_address(w) for w in weights],
            _address(batch_sizes),
            x.data_ptr(),
            x.stride(0) if batch_sizes is None else 0,
            x.stride(-2),
            _address(h0),
            _address(c0),
            y.data_ptr(),
            h_n.data_ptr(),
            _address(c_n),
            saved[0].data_ptr() if save else 0,
            saved[1].data_ptr() if len(saved) > 1 else 0,
        )
        return y, h_n, c_n, saved

    def backward(
        self,
        problem: Problem,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        x: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Weights,
        reverse: Sequence[bool],
        y: Tensor,
        saved: list[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor]:
        cell, T, B, I, H, G = problem.cell, problem.T, problem.B, problem.I, problem.H, problem.G
        N = T * B if batch_sizes is None else x.shape[0]
        code, dtype, threads = _CELLS[cell.name][0], _DTYPES[problem.dtype], torch.get_num_threads()
        if x.stride(-1) != 1 and I > 1:
            x = x.contiguous()
        weights = [_contiguous(w) for w in weights]
        dy, dh_n, dc_n = _contiguous(dy), _contiguous(dh_n), _contiguous(dc_n)
        h0, c0, y = _contiguous(h0), _contiguous(c0), y.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype) if needs[0] else None
        dh0 = x.new_empty((G, B, H)) if needs[1] else None
        dc0 = x.new_empty((G, B, H)) if needs[2] else None
        dweights = [
            torch.empty_like(w) if needed and w is not None else None
            for w, needed in zip(weights, needs[3:], strict=True)
        ]
        sizes = (code, dtype, threads, T, B, N, I, H)
        outputs = [_address(d) for d in dweights]
        _workspace.run(
            _C.backward,
            *sizes,
            reverse,
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
            outputs,
        )
        grads = [dx, dh0, dc0, *dweights]
        return [g for g, needed in zip(grads, needs, strict=True) if needed and g is not None]


CPU = _Cpu()
