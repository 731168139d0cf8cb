"""The CUDA kernels: persistent scans over time, in one cooperative launch for all groups.

Here tensors become addresses. The input's product, dx and the weights' gradients are torch's, large
products over all timesteps; the kernels do what depends on the step before. Everything they write,
workspaces included, is allocated here by torch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _torch, missing
from .base import (
    UNVALIDATED,
    Grads,
    Inputs,
    Outputs,
    Problem,
    SavedShape,
    bias_gradients,
    unpacked,
)

try:
    from .. import _cuda as _extension

    _MODULE: ModuleType | None = _extension
    _MISSING = ""
except ImportError as error:
    _MODULE = None
    _MISSING = missing.reason("_cuda", error)

_PRECISIONS = {torch.bfloat16: 2, torch.float16: 3}
_F32, _TF32 = 0, 1
# Looks at a flag before a wait gives up: some ten seconds on a device, where a step takes
# microseconds.
_POLL_LIMIT = 1 << 24


def _allows_tf32() -> bool:
    """Whether torch would let cuDNN's recurrent layers use TF32."""
    return _torch.cudnn_allows_tf32()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _Rows:
    """The rows of a layer call, time after time, and what the kernels ask about them."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        self.problem, self.inputs = problem, inputs
        x, sizes, device = inputs.x, inputs.batch_sizes, problem.device
        self.lengths, self.alive, self.offsets = inputs.lengths, None, None
        if sizes is not None:
            self.lengths, self.offsets = unpacked(sizes, problem.B, device)
            self.x = x
            return
        if self.lengths is not None:
            # Nobody has looked at values on the device; a kernel would read past the batch's end.
            self.lengths = self.lengths.clamp(0, problem.T)
            steps = torch.arange(problem.T, device=device)
            self.alive = steps[:, None] < self.lengths  # [T, B]
            x = x.masked_fill(~self.alive.unsqueeze(-1), 0)  # padding may be NaN
        self.x = x.reshape(-1, x.shape[-1])

    @property
    def count(self) -> int:
        return self.x.shape[0]

    def input(self, g: int) -> Tensor:
        """What group g reads, [N, I]."""
        I = self.problem.I
        return self.x[:, g * I : (g + 1) * I] if self.problem.grouped else self.x

    def make(self, *shape: int) -> Tensor:
        """For values of every row: zeros where a row may have ended."""
        return self.x.new_empty(shape) if self.alive is None else self.x.new_zeros(shape)

    def pass_steps(self, rows: int) -> Tensor | None:
        """The most steps that any of each `rows` rows of the batch has."""
        if self.lengths is None:
            return None
        missing = -len(self.lengths) % rows
        return torch.nn.functional.pad(self.lengths, (0, missing)).view(-1, rows).amax(1)

    def h_before(self, g: int, y: Tensor) -> Tensor:
        """h that each row's step of group g started from, [N, H]."""
        T, B, H, G = self.problem.T, self.problem.B, self.problem.H, self.problem.G
        backwards = self.problem.reverse[g]
        h0, h_reset = (
            self.x.new_zeros(B, H) if s is None else s[g]
            for s in (self.inputs.h0, self.inputs.h_reset)
        )
        if self.offsets is not None:
            own = y.view(-1, G, H)[:, g]
            return torch.cat([own, h0]).index_select(0, self._packed_before(backwards))
        own = y.view(T, B, G, H)[:, :, g]
        parts = [own[1:], h0[None]] if backwards else [h0[None], own[:-1]]
        before = torch.cat(parts)
        if backwards and self.lengths is not None:
            steps = torch.arange(1, T + 1, device=y.device)
            first = (steps[:, None] == self.lengths).unsqueeze(-1)
            before = torch.where(first, h0, before)
        cut = self._cut(backwards)
        if cut is not None:
            before = torch.where(cut.unsqueeze(-1), h_reset, before)
        return before.view(-1, H)

    def _cut(self, backwards: bool) -> Tensor | None:
        """[T, B] whether a step starts from the reset states."""
        reset = self.inputs.reset
        if reset is None:
            return None
        if self.alive is not None:
            reset = reset & self.alive
        return torch.cat([reset[1:], torch.zeros_like(reset[:1])]) if backwards else reset

    def _packed_before(self, backwards: bool) -> Tensor:
        """Index of the row before, in [N + B], where those past N are the initial states."""
        assert self.lengths is not None
        assert self.offsets is not None
        step, column = self._places
        before = step + (1 if backwards else -1)
        inside = (before >= 0) & (before < self.lengths[column])
        last = self.problem.T - 1
        return torch.where(inside, self.offsets[before.clamp(0, last)], self.count) + column

    @functools.cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """The step and the batch row of each packed row, [N] twice."""
        assert self.offsets is not None
        rows = torch.arange(self.count, device=self.problem.device)
        step = torch.searchsorted(self.offsets, rows, right=True) - 1
        return step, rows - self.offsets[step]


class Cuda:
    """See :class:`fastrnn.backends.Backend`.

    Args:
        module: the extension, or None with the reason why it is missing.
        device: the kind of device whose tensors it takes; tests run the kernels' emulation.
    """

    name = "cuda"
    differentiable = False
    on_request: str | None = UNVALIDATED

    def __init__(self, module: ModuleType | None, missing: str = "", device: str = "cuda") -> None:
        self._module: Any = module
        self._missing = missing
        self._device = device
        self._cells = {} if module is None else module.cells()
        self._report: Tensor | None = None
        self.poll_limit = _POLL_LIMIT
        self._limits = functools.cache(self._find_limits)
        self._plan = functools.lru_cache(maxsize=1024)(self._find_plan)

    def supports(self, problem: Problem) -> str | None:
        if self._module is None:
            return self._missing
        if problem.device.type != self._device:
            return f"the kernels run on CUDA tensors, not on {problem.device.type}"
        if problem.dtype != torch.float32 and problem.dtype not in _PRECISIONS:
            return f"no kernel for {problem.dtype}; there is one for float32, bfloat16 and float16"
        if problem.cell.name not in self._cells:
            return f"no kernel for the cell {problem.cell.name}"
        if problem.P:
            return "proj_size is not supported by the kernels"
        if problem.stacked:
            return "the kernels take the weights of each group apart"
        # What is compiled serves other T and B too, which have a plan where a small one has.
        steps = (1, 1) if torch.compiler.is_compiling() else (problem.T, problem.B)
        sizes = (*steps, problem.H, problem.G)
        cell, dtype, device = problem.cell.name, problem.dtype, problem.device
        return self._unplanned(cell, dtype, sizes, problem.grad, device)

    def _unplanned(
        self,
        cell: str,
        dtype: torch.dtype,
        sizes: tuple[int, int, int, int],
        grad: bool,
        device: torch.device,
    ) -> str | None:
        """Why there is no plan on this machine, if there is none."""
        unavailable = self._module.unavailable()
        if unavailable:
            return str(unavailable)
        for backward in (False, True)[: 1 + grad]:
            plan = self._plan_for(cell, dtype, sizes, backward, device)
            if isinstance(plan, str):
                return plan
        return None

    # Dynamo takes it for a constant (see fastrnn.backends.asked).
    _unplanned._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def saved_shapes(self, problem: Problem, N: int) -> list[SavedShape]:
        """Shapes of what forward saves: post-activation gates, and cell states where there are."""
        G, H = problem.G, problem.H
        gates: SavedShape = ((G, N, problem.cell.saved * H), problem.dtype)
        cells: SavedShape = ((G, N, H), torch.float32)
        return [gates, cells] if problem.cell.states > 1 else [gates]

    @torch.no_grad()
    def forward(self, problem: Problem, inputs: Inputs, save: bool) -> Outputs:
        G, B, H, states = problem.G, problem.B, problem.H, problem.cell.states
        rows = _Rows(problem, inputs)
        x, N, lead = inputs.x, rows.count, inputs.x.shape[:-1]
        gates_x = x.new_empty(G, N, problem.cell.gates * H)
        for g in range(G):
            w_ih, _, b_ih, _ = inputs.weights[4 * g : 4 * g + 4]
            assert w_ih is not None
            if b_ih is None:
                torch.mm(rows.input(g), w_ih.t(), out=gates_x[g])
            else:
                torch.addmm(b_ih, rows.input(g), w_ih.t(), out=gates_x[g])
        y = rows.make(*lead, G * H)
        h_n = x.new_empty(G, B, H)
        c_n = x.new_empty(G, B, H) if states > 1 else None
        c = rows.make(*lead, G * H) if states > 1 and problem.all_states else None
        saved = [
            torch.empty(shape, dtype=dtype, device=x.device)
            for shape, dtype in (self.saved_shapes(problem, N) if save else [])
        ]
        tensors = {"gates_x": gates_x, "y": y, "h_n": h_n, "c_n": c_n, "c": c}
        self._run(problem, inputs, rows, saved, tensors, backward=False)
        return Outputs(y, h_n, c_n, c, saved)

    @torch.no_grad()
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
        G, B, H = problem.G, problem.B, problem.H
        rows = _Rows(problem, inputs)
        y = y.contiguous()
        dgates_x = rows.make(G, rows.count, problem.cell.gates * H)
        own = not problem.cell.shared_dgates
        dgates_h = rows.make(*dgates_x.shape) if own else None
        dstates = [y.new_empty(G, B, H) if needed else None for needed in needs[1:5]]
        names = ("dh0", "dc0", "dh_reset", "dc_reset")
        tensors = {
            "y": y,
            "dy": grads.y,
            "dc": grads.c,
            "dh_n": grads.h_n,
            "dc_n": grads.c_n,
            "dgates_x": dgates_x,
            "dgates_h": dgates_h,
            **dict(zip(names, dstates, strict=True)),
        }
        self._run(problem, inputs, rows, saved, tensors, backward=True)
        found: list[Tensor | None] = [None]
        if needs[0]:
            found = [_input_gradient(problem, inputs, dgates_x)]
        found += dstates
        sources = (dgates_x, dgates_x if dgates_h is None else dgates_h)
        found += _weight_gradients(problem, rows, sources, y, needs[5:], samples)
        return found

    def _run(
        self,
        problem: Problem,
        inputs: Inputs,
        rows: _Rows,
        saved: list[Tensor],
        tensors: dict[str, Tensor | None],
        backward: bool,
    ) -> None:
        self._check_report()
        device = problem.device
        sizes = (problem.T, problem.B, problem.H, problem.G)
        plan = self._plan_for(problem.cell.name, problem.dtype, sizes, backward, device)
        if isinstance(plan, str):
            raise RuntimeError(f"fastrnn backend {self.name!r} cannot serve this call: {plan}")
        one_state = problem.cell.states == 1
        h0, c0, h_reset, c_reset = inputs.states
        tensors = tensors | {
            "lengths": rows.lengths,
            "offsets": rows.offsets,
            "pass_steps": rows.pass_steps(plan.rows_a_pass),
            "reset": inputs.reset,
            "h0": h0,
            "c0": None if one_state else c0,
            "h_reset": h_reset,
            "c_reset": None if one_state else c_reset,
            "gates": saved[0] if saved else None,
            "cells": saved[1] if len(saved) > 1 else None,
            "workspace": torch.empty(plan.workspace_bytes + 1, dtype=torch.uint8, device=device),
            "flags": torch.zeros(plan.flag_words, dtype=torch.int32, device=device),
            "report": self._report,
        }
        # Kept alive until the launch is on the stream, after which the allocator's order holds.
        held = {name: t.contiguous() for name, t in tensors.items() if t is not None}
        weights = [_contiguous(w) for g in range(problem.G) for w in inputs.weights[4 * g :][1:4:2]]
        (self._module.backward if backward else self._module.forward)(
            plan,
            rows.count,
            [0 if w is None else w.data_ptr() for w in weights],
            list(problem.reverse),
            {name: t.data_ptr() for name, t in held.items()},
            self.poll_limit,
            device.index or 0,
            torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
        )

    def _check_report(self) -> None:
        """Raise if kernels of an earlier call gave up; they tell the host by themselves."""
        if self._report is None:
            pinned = self._device == "cuda"
            with torch.inference_mode(False):  # whatever the caller's: later calls write to it
                self._report = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=pinned)
        if int(self._report):
            self._report.zero_()
            raise RuntimeError(
                "a fastrnn CUDA kernel of an earlier call gave up waiting for its other blocks, "
                "and left NaN in its results"
            )

    def _plan_for(
        self,
        cell: str,
        dtype: torch.dtype,
        sizes: tuple[int, int, int, int],
        backward: bool,
        device: torch.device,
    ) -> Any:
        """The extension's plan, or the reason why there is none; `sizes` are T, B, H and G."""
        precision = _PRECISIONS.get(dtype, _TF32 if _allows_tf32() else _F32)
        return self._plan(self._cells[cell][0], precision, *sizes, backward, device.index or 0)

    def _find_plan(self, *arguments: Any) -> Any:
        *request, device = arguments
        try:
            return self._module.plan(*request, self._limits(device))
        except ValueError as error:
            return str(error)

    def _find_limits(self, device: int) -> Any:
        return self._module.device_limits(device)


def _input_gradient(problem: Problem, inputs: Inputs, dgates: Tensor) -> Tensor:
    """dgates [G, N, gates*H] -> dx of x's shape."""
    weights = [inputs.weights[4 * g] for g in range(problem.G)]
    parts = [d @ w for d, w in zip(dgates, weights, strict=True) if w is not None]
    dx = torch.cat(parts, -1) if problem.grouped else functools.reduce(Tensor.add_, parts)
    return dx.view(inputs.x.shape)


def _weight_gradients(
    problem: Problem,
    rows: _Rows,
    sources: tuple[Tensor, Tensor],
    y: Tensor,
    needs: Sequence[bool],
    samples: int,
) -> list[Tensor | None]:
    """Per group dw_ih, dw_hh, db_ih, db_hh, None where not needed."""

    def blocks(t: Tensor) -> Tensor:
        """[N, W] -> [samples, N / samples, W]"""
        if samples == 1:
            return t.unsqueeze(0)
        t = t.view(problem.T, samples, -1, t.shape[-1])
        return t.transpose(0, 1).flatten(1, 2)

    def product(dgates: Tensor, factor: Tensor) -> Tensor:
        return blocks(dgates).mT @ blocks(factor)

    def total(dgates: Tensor) -> Tensor:
        return blocks(dgates).sum(1)

    found: list[Tensor | None] = []
    for g in range(problem.G):
        dx, dr = sources[0][g], sources[1][g]
        w_ih, w_hh, b_ih, b_hh = needs[4 * g : 4 * g + 4]
        group = [
            product(dx, rows.input(g)) if w_ih else None,
            product(dr, rows.h_before(g, y)) if w_hh else None,
            *bias_gradients(problem.cell, total, (dx, dr), (b_ih, b_hh)),
        ]
        found += [d if d is None or samples > 1 else d[0] for d in group]
    return found


CUDA = Cuda(_MODULE, _MISSING)
