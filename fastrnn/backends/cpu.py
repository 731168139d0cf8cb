"""The fused C++ kernels on CPU tensors: packed weight panels, the cell in the GEMM's epilogue.

Here tensors become addresses. Everything the kernels write, workspaces included, is allocated
here by torch. The gradients that are plain matrix products over all timesteps (dx, dW, db) are
left to torch's GEMM.
"""

from __future__ import annotations

from collections.abc import Sequence

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
_UNIT_PAD = 16

Weights = Sequence[Tensor | None]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _padded(units: int) -> int:
    return -(-units // _UNIT_PAD) * _UNIT_PAD


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
        if problem.B == 0:
            return "an empty batch leaves the kernels nothing to do"
        return None

    def saved_shapes(self, problem: Problem, rows: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
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
        size = _C.forward_bytes(code, dtype, threads, T, B, N, I, H, G, save)
        workspace = torch.empty(size, dtype=torch.uint8)
        _C.forward(
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
            workspace.data_ptr(),
            size,
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
        cell, T, B, H, G = problem.cell, problem.T, problem.B, problem.H, problem.G
        N = T * B if batch_sizes is None else x.shape[0]
        code, dtype, threads = _CELLS[cell.name][0], _DTYPES[problem.dtype], torch.get_num_threads()
        shape = (G, N, cell.gates * _padded(H))
        dgates_x = x.new_empty(shape)
        dgates_h = dgates_x if cell.shared_dgates else x.new_empty(shape)
        dh0 = x.new_empty((G, B, H)) if needs[1] else None
        dc0 = x.new_empty((G, B, H)) if needs[2] else None
        contiguous = [_contiguous(w) for w in weights]
        dy, dh_n, dc_n = _contiguous(dy), _contiguous(dh_n), _contiguous(dc_n)
        h0, c0, y = _contiguous(h0), _contiguous(c0), y.contiguous()
        size = _C.backward_bytes(code, dtype, threads, T, B, N, H, G, needs[1])
        workspace = torch.empty(size, dtype=torch.uint8)
        _C.backward(
            code,
            dtype,
            threads,
            T,
            B,
            N,
            H,
            reverse,
            [_address(w) for w in contiguous],
            _address(batch_sizes),
            _address(h0),
            _address(c0),
            y.data_ptr(),
            saved[0].data_ptr(),
            saved[1].data_ptr() if len(saved) > 1 else 0,
            _address(dy),
            _address(dh_n),
            _address(dc_n),
            dgates_x.data_ptr(),
            0 if cell.shared_dgates else dgates_h.data_ptr(),
            _address(dh0),
            _address(dc0),
            workspace.data_ptr(),
            size,
        )
        products = _Products(problem, x, batch_sizes, h0, y, reverse, dgates_x, dgates_h)
        grads = [products.dx(weights) if needs[0] else None, dh0, dc0]
        for g in range(G):
            grads += products.dweights(g, weights[4 * g : 4 * g + 4], needs[3 + 4 * g : 7 + 4 * g])
        return [grad for grad, needed in zip(grads, needs, strict=True) if needed and grad is not None]


class _Products:
    """The gradients that are matrix products of dgates `[G, N, gates * Hp]` over all timesteps."""

    def __init__(
        self,
        problem: Problem,
        x: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        y: Tensor,
        reverse: Sequence[bool],
        dgates_x: Tensor,
        dgates_h: Tensor,
    ) -> None:
        self.problem = problem
        self.shape = x.shape
        self.x = x.reshape(-1, x.shape[-1])  # [N, I]
        self.batch_sizes = batch_sizes
        self.h0 = h0
        self.y = y.view(-1, problem.G, problem.H)  # [N, G, H]
        self.reverse = reverse
        self.dgates_x, self.dgates_h = dgates_x, dgates_h

    def dx(self, weights: Weights) -> Tensor:
        total = self._dx_of_group(0, weights)
        for g in range(1, self.problem.G):
            total.addmm_(self.dgates_x[g], self._pad_gates(weights[4 * g]))
        return total.view(self.shape)

    def _dx_of_group(self, g: int, weights: Weights) -> Tensor:
        return self.dgates_x[g] @ self._pad_gates(weights[4 * g])

    def dweights(self, g: int, weights: Weights, needs: Sequence[bool]) -> list[Tensor | None]:
        dx, dh = self.dgates_x[g], self.dgates_h[g]
        dw_ih = self._unpad_gates(dx.t() @ self.x) if needs[0] else None
        dw_hh = self._unpad_gates(self._dw_hh(g)) if needs[1] else None
        db_ih = self._unpad_gates(dx.sum(0)) if needs[2] else None
        if not needs[3]:
            return [dw_ih, dw_hh, db_ih, None]
        shared = db_ih is not None and dx is dh
        db_hh = db_ih.clone() if shared else self._unpad_gates(dh.sum(0))
        return [dw_ih, dw_hh, db_ih, db_hh]

    def _pad_gates(self, w: Tensor) -> Tensor:
        """[gates * H, K] -> [gates * Hp, K], the padding zero."""
        H, Hp = self.problem.H, _padded(self.problem.H)
        if H == Hp:
            return w
        rows = w.view(self.problem.cell.gates, H, -1)
        return torch.nn.functional.pad(rows, (0, 0, 0, Hp - H)).flatten(0, 1)

    def _unpad_gates(self, grad: Tensor) -> Tensor:
        H, Hp = self.problem.H, _padded(self.problem.H)
        if H == Hp:
            return grad
        return grad.unflatten(0, (self.problem.cell.gates, Hp))[:, :H].flatten(0, 1)

    def _dw_hh(self, g: int) -> Tensor:
        """Sum over all rows of dgates^T h_before, where h_before is y one step earlier, or h0."""
        if self.batch_sizes is not None:
            return self.dgates_h[g].t() @ self._h_before_packed(g)
        B = self.problem.B
        N = self.y.shape[0]
        later, earlier, first = slice(B, N), slice(0, N - B), slice(0, B)
        if self.reverse[g]:
            later, earlier, first = slice(0, N - B), slice(B, N), slice(N - B, N)
        dgates = self.dgates_h[g]
        total = dgates[later].t() @ self.y[earlier, g]
        if self.h0 is not None:
            total.addmm_(dgates[first].t(), self.h0[g])
        return total

    def _h_before_packed(self, g: int) -> Tensor:
        """[N, H] for rows sorted by length, step by step."""
        assert self.batch_sizes is not None
        sizes = self.batch_sizes.tolist()
        start = self.y.new_zeros(self.problem.B, self.problem.H) if self.h0 is None else self.h0[g]
        steps = self.y[:, g].split(sizes)
        if self.reverse[g]:
            after = [*steps[1:], steps[0][:0]]
            rows = [torch.cat((s, start[len(s) : n])) for s, n in zip(after, sizes, strict=True)]
        else:
            rows = [start, *(s[:n] for s, n in zip(steps, sizes[1:], strict=False))]
        return torch.cat(rows)


CPU = _Cpu()
