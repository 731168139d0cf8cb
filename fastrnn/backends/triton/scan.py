"""From tensors to launches: what surrounds the scans in plain torch, and how they are launched."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ... import _torch
from ..base import Grads, Inputs, Outputs, Problem, bias_gradients, unpacked
from . import handoff, kernels, plan
from .cells import TWINS

INTERPRETED = not isinstance(kernels.forward_scan, triton.runtime.JITFunction)
# What the interpreter pretends to be: small, so that small shapes reach every regime.
_PRETENDED = plan.Limits("cuda", shared=160 << 10, processors=64)


@lru_cache
def limits(device: torch.device) -> plan.Limits:
    if device.type == "cpu":
        return _PRETENDED
    about = torch.cuda.get_device_properties(device)
    kind = "hip" if torch.version.hip else "cuda"
    shared = getattr(about, "shared_memory_per_block_optin", about.shared_memory_per_block)
    return plan.Limits(kind, shared, about.multi_processor_count)


def _allows_tf32() -> bool:
    return _torch.allows_tf32(torch.backends.cuda.matmul)


def _device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


class Layer:
    """One call's problem in the form that the kernels take."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        self.problem = problem
        self.cell, self.twin = problem.cell, TWINS[problem.cell.name]
        self.T, self.B, self.H, self.G = problem.T, problem.B, problem.H, problem.G
        self.x = inputs.x.reshape(-1, inputs.x.shape[-1])  # [N, I] or [N, G*I]
        self.N = self.x.shape[0]
        w_ih, w_hh, b_ih, b_hh = (inputs.weights[k :: problem.per_group] for k in range(4))
        self.w_ih = [w for w in w_ih if w is not None]
        self.w_hh = _stacked([w for w in w_hh if w is not None])  # [G, gates*H, H]
        self.bias = _side_by_side(b_ih, b_hh)
        self.lengths, self.offsets = inputs.lengths, None
        if self.lengths is not None:
            # Nobody has looked at values on the device; a kernel would read past the batch's end.
            self.lengths = self.lengths.clamp(0, self.T)
        if inputs.batch_sizes is not None:
            self.lengths, self.offsets = unpacked(inputs.batch_sizes, self.B, self.x.device)
        self.reset = None
        if inputs.reset is not None:
            self.reset = inputs.reset.contiguous().view(torch.uint8)
        self.h_reset, self.c_reset = _both(inputs.h_reset, inputs.c_reset, self.cell.states)
        self.inputs = inputs
        # All bits where all groups go backwards: the shift then serves any number of groups.
        every = all(problem.reverse)
        self.backwards = -1 if every else sum(1 << g for g, r in enumerate(problem.reverse) if r)

        exact = problem.dtype == torch.float32 and not _allows_tf32()
        self.precision = "ieee" if exact else "tf32"
        scan = plan.Scan(self.cell, problem.dtype, exact, self.G, self.B, self.H)
        self.plan = plan.plan(scan, limits(self.x.device))

    def zeros(self) -> Tensor:
        """A state in float32: [G, B, H]."""
        return self.x.new_zeros((self.G, self.B, self.H), dtype=torch.float32)

    def state(self, value: Tensor | None) -> Tensor:
        """A float32 copy that a scan may write to."""
        if value is None:
            return self.zeros()
        return value.to(torch.float32, memory_format=torch.contiguous_format, copy=True)

    def initial(self) -> tuple[Tensor, Tensor | None]:
        """The states that the first step starts from."""
        states = [self.inputs.h0, self.inputs.c0][: self.cell.states]
        fresh = [self.h_reset, self.c_reset]
        made = [self.state(s) for s in states]
        if self.reset is not None:
            cut = self._cut_at_first()  # [G, B, 1]
            for k, s in enumerate(made):
                value = fresh[k]
                made[k] = torch.where(cut, 0.0 if value is None else value.float(), s)
        return made[0], made[1] if len(made) > 1 else None

    def _cut_at_first(self) -> Tensor:
        assert self.reset is not None
        cut = self.reset[0].bool()
        if self.lengths is not None:
            cut = cut & (self.lengths > 0)
        forward = [not r for r in self.problem.reverse]
        rows = [cut if f else torch.zeros_like(cut) for f in forward]
        return torch.stack(rows).unsqueeze(-1)

    def launch(self, kernel: Any, last: int, **arguments: Any) -> None:
        """Run the steps 0 to `last` - 1 of a scan, in one launch or in one a step."""
        p, cell = self.plan, self.cell
        waits = p.resident and not p.whole
        arrived = self.counters() if waits else None
        # The interpreter runs programs one after the other, so that none may wait for another of
        # its launch: there the resident grid takes one step a launch, through the same counters.
        once = p.whole or (p.resident and not INTERPRETED)
        spans = [(0, last)] if once else [(k, k + 1) for k in range(last)]
        with _device(self.x):
            for begin, end in spans:
                kernel[p.tiles, p.slices, self.G](
                    lengths=self.lengths, offsets=self.offsets,
                    reset=self.reset, arrived=arrived,
                    T=self.T, B=self.B, backwards=self.backwards, begin=begin, end=end,
                    GATES=cell.gates, STATES=cell.states, SAVED=cell.saved,
                    G=self.G, H=self.H, BU=p.BU, BB=p.BB, BK=p.BK, CHUNKS=p.chunks,
                    HELD=p.held, WHOLE=p.whole, JOINED=p.joined, PRECISION=self.precision,
                    num_warps=p.warps, num_stages=1, launch_cooperative_grid=waits,
                    **arguments,
                )  # fmt: skip

    def transposed(self) -> Tensor:
        """W_hh with each gate transposed: a product's left factor has its columns side by side, and
        tensor cores cannot turn float32 over."""
        gates = self.w_hh.view(self.G, self.cell.gates, self.H, self.H)
        return gates.transpose(2, 3).contiguous()

    def counters(self) -> Tensor:
        """Announcements so far, for each group and tile of the batch."""
        shape = (self.G, self.plan.tiles, handoff.APART.value)
        return torch.zeros(shape, dtype=torch.int32, device=self.x.device)

    def input_gates(self) -> Tensor:
        """x W_ih^T of every group: [N, G*gates*H]."""
        if not self.problem.grouped:
            return self.x @ torch.cat(self.w_ih).t()
        gates = self.x.new_empty((self.N, self.G, self.cell.gates * self.H))
        for g, w in enumerate(self.w_ih):
            torch.mm(self.columns(self.x, g), w.t(), out=gates[:, g])
        return gates.view(self.N, -1)

    def input_gradient(self, dgates: Tensor) -> Tensor:
        """dx, of the shape of x, from dgates [N, G, gates*H]."""
        if not self.problem.grouped:
            dx = dgates.view(self.N, -1) @ torch.cat(self.w_ih)
        else:
            dx = self.x.new_empty(self.x.shape)
            for g, w in enumerate(self.w_ih):
                torch.mm(dgates[:, g], w, out=self.columns(dx, g))
        return dx.view(self.inputs.x.shape)

    def columns(self, x: Tensor, g: int) -> Tensor:
        """What group g reads of x [N, ...]."""
        if not self.problem.grouped:
            return x
        return x[:, g * self.problem.I : (g + 1) * self.problem.I]

    def clean_x(self) -> Tensor:
        """x with zeros past the lengths: what stands there may be NaN, which times 0 is NaN."""
        if self.inputs.lengths is None:
            return self.x
        return self.x.masked_fill(self.active().logical_not().view(-1, 1), 0)

    def active(self) -> Tensor:
        """[T, B], whether row b has a step t."""
        assert self.lengths is not None
        return self.lengths > torch.arange(self.T, device=self.x.device).unsqueeze(1)

    def blocks(self, rows: Tensor, samples: int) -> Tensor:
        """[N, width] as one matrix for each block of the batch: [samples, N / samples, width]."""
        if samples == 1:
            return rows.unsqueeze(0)
        if self.offsets is not None:
            dense = rows.new_zeros((self.T, self.B, rows.shape[-1]))
            rows = dense.masked_scatter(self.active().unsqueeze(-1), rows)
        cut = rows.reshape(self.T, samples, self.B // samples, rows.shape[-1])
        return cut.transpose(0, 1).reshape(samples, -1, rows.shape[-1])

    def states_before(self, y: Tensor) -> Tensor:
        """h that every step started from: [N, G, H]."""
        units, rows = min(plan.power_of_two(self.H), 128), 16
        before = self.x.new_empty((self.N, self.G, self.H))
        h0 = self.inputs.h0
        tiles = (self.T * triton.cdiv(self.B, rows), triton.cdiv(self.H, units), self.G)
        with _device(self.x):
            kernels.gather_before[tiles](
                y=y.contiguous(), h0=None if h0 is None else h0.contiguous(), h_reset=self.h_reset,
                lengths=self.lengths, offsets=self.offsets, reset=self.reset, h_before=before,
                T=self.T, B=self.B, backwards=self.backwards,
                G=self.G, H=self.H, BU=units, BB=rows, num_warps=4,
            )  # fmt: skip
        return before


def forward(problem: Problem, inputs: Inputs, save: bool) -> Outputs:
    layer = Layer(problem, inputs)
    x, N, G, B, H = inputs.x, layer.N, problem.G, problem.B, problem.H
    h, c = layer.initial()
    lead = x.shape[:-1]
    y = x.new_empty((*lead, G * H))
    c_all = x.new_empty((*lead, G * H)) if problem.all_states and c is not None else None
    saved = (
        [x.new_empty(s, dtype=kind) for s, kind in plan.saved_shapes(problem, N)] if save else []
    )
    gates, c_before, *_ = [*saved, None, None]
    exchange = None
    if not layer.plan.whole:
        exchange = x.new_empty((2, G, B, H))
        exchange[0] = h
    layer.launch(
        kernels.forward_scan, problem.T, FORWARD=layer.twin.forward,
        w_hh=layer.w_hh, gates_x=layer.input_gates(), bias=layer.bias, h=h, c=c,
        h_reset=layer.h_reset, c_reset=layer.c_reset, exchange=exchange,
        y=y, c_all=c_all, saved=gates, c_before=c_before,
    )  # fmt: skip
    c_n = None if c is None else c.to(x.dtype)
    return Outputs(y, h.to(x.dtype), c_n, c_all, saved)


def backward(
    problem: Problem,
    inputs: Inputs,
    y: Tensor,
    saved: list[Tensor],
    grads: Grads,
    needs: Sequence[bool],
    samples: int,
) -> list[Tensor | None]:
    layer = Layer(problem, inputs)
    x, cell, N, G, H = layer.x, problem.cell, layer.N, problem.G, problem.H
    gates, c_before, *_ = [*saved, None]
    weights = needs[5:]
    needs_w_hh = any(weights[1 :: problem.per_group])
    h_before = layer.states_before(y) if needs_w_hh or layer.twin.reads_h else None

    dh = layer.state(grads.h_n)
    dc = layer.state(grads.c_n) if cell.states > 1 else None
    dh_reset = dc_reset = None
    if needs[3] or needs[4]:
        dh_reset, dc_reset = layer.zeros(), layer.zeros()
    dgates_h = x.new_empty((N, G, cell.gates * H))
    dgates_x = None if cell.shared_dgates else torch.empty_like(dgates_h)
    layer.launch(
        kernels.backward_scan, problem.T + (not layer.plan.whole), BACKWARD=layer.twin.backward,
        w_hh=layer.transposed(), dy=_contiguous(grads.y), dc_all=_contiguous(grads.c),
        saved=gates, c_before=c_before, h_before=h_before if layer.twin.reads_h else None,
        h=dh, c=dc, dh_reset=dh_reset, dc_reset=dc_reset, dgates_h=dgates_h, dgates_x=dgates_x,
    )  # fmt: skip
    if dgates_x is None:
        dgates_x = dgates_h

    dx = layer.input_gradient(dgates_x) if needs[0] else None
    states = zip((dh, dc, dh_reset, dc_reset), needs[1:5], strict=True)
    found = [dx, *(None if s is None or not needed else s.to(x.dtype) for s, needed in states)]
    read = layer.clean_x() if any(weights[0 :: problem.per_group]) else x
    for g in range(G):
        before = None if h_before is None else h_before[:, g]
        wanted = weights[g * problem.per_group :][: problem.per_group]
        found += _weight_gradients(
            layer, dgates_x[:, g], dgates_h[:, g], layer.columns(read, g), before, wanted, samples
        )
    return found


def _weight_gradients(
    layer: Layer,
    dgates_x: Tensor,
    dgates_h: Tensor,
    x: Tensor,
    h_before: Tensor | None,
    needs: Sequence[bool],
    samples: int,
) -> list[Tensor | None]:
    """Gradients of one group's w_ih, w_hh, b_ih and b_hh, from matrices of N rows."""
    need_w_ih, need_w_hh, *_ = needs

    def product(dgates: Tensor, read: Tensor | None) -> Tensor:
        assert read is not None
        left, right = layer.blocks(dgates, samples), layer.blocks(read, samples)
        return _one_or_all(left.transpose(1, 2) @ right, samples)

    def total(dgates: Tensor) -> Tensor:
        sums = layer.blocks(dgates, samples).sum(1, dtype=torch.float32)
        return _one_or_all(sums.to(dgates.dtype), samples)

    return [
        product(dgates_x, x) if need_w_ih else None,
        product(dgates_h, h_before) if need_w_hh else None,
        *bias_gradients(layer.problem.cell, total, (dgates_x, dgates_h), needs[2:]),
    ]


def _one_or_all(each: Tensor, samples: int) -> Tensor:
    return each if samples > 1 else each.squeeze(0)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0).contiguous() if len(tensors) == 1 else torch.stack(tensors)


def _side_by_side(b_ih: Sequence[Tensor | None], b_hh: Sequence[Tensor | None]) -> Tensor | None:
    """[G, 2, gates*H], or None if there are no biases."""
    flat = [b for pair in zip(b_ih, b_hh, strict=True) for b in pair]
    known = next((b for b in flat if b is not None), None)
    if known is None:
        return None
    filled = [torch.zeros_like(known) if b is None else b for b in flat]
    return torch.stack(filled).view(len(b_ih), 2, -1)


def _both(h: Tensor | None, c: Tensor | None, states: int) -> tuple[Tensor | None, Tensor | None]:
    """States in memory that a kernel can read, or none at all where all of them are zero."""
    given = [_contiguous(s) for s in (h, c)[:states]]
    known = next((s for s in given if s is not None), None)
    if known is None:
        return None, None
    filled = [torch.zeros_like(known) if s is None else s for s in given]
    return filled[0], filled[1] if states > 1 else None
