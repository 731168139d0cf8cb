"""The torch.library operators ``fastrnn::forward`` and ``fastrnn::backward``.

They are what torch.compile, export and tracing see of a kernel: one layer, all its groups, all
timesteps. Their fake kernels give shapes without running, for symbolic sizes too. Only backends
that autograd does not see through go through them.

In both, `states` is [h0, c0, h_reset, c_reset], `grads` are those of y, h_n, c_n and c, and None
stands for zeros; the rest is as in :class:`fastrnn.backends.Inputs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torch
from .backends import (
    Backend,
    Grads,
    Inputs,
    Outputs,
    Problem,
    Weights,
    by_name,
    check_batch_sizes,
)
from .cells import CELLS

LIBRARY: Any = torch.library.Library("fastrnn", "DEF")  # type: ignore[no-untyped-call]
_INPUTS = (
    "Tensor x, Tensor? batch_sizes, Tensor? lengths, Tensor? reset, Tensor?[] states,"
    " Tensor?[] weights, bool[] reverse, SymInt batch"
)
LIBRARY.define(f"forward(str cell, str backend, {_INPUTS}, bool save, bool all_states) -> Tensor[]")
LIBRARY.define(
    f"backward(str cell, str backend, {_INPUTS}, Tensor y, Tensor[] saved, Tensor?[] grads,"
    " bool[] needs, SymInt samples) -> Tensor[]"
)


def describe(
    cell: str,
    inputs: Inputs,
    reverse: Sequence[bool],
    batch: int,
    all_states: bool,
    grad: bool,
) -> Problem:
    """The problem that these arguments pose; `batch` is that of the first step when packed."""
    kind = CELLS[cell]
    x, batch_sizes, weights = inputs.x, inputs.batch_sizes, inputs.weights
    groups = len(reverse)
    w_ih = weights[0]
    assert w_ih is not None
    *stack, rows, width = w_ih.shape
    stacked, shape = bool(stack), x.shape
    proj = weights[4] if len(weights) == (5 if stacked else 5 * groups) else None
    return Problem(
        kind,
        x.dtype,
        x.device,
        shape[0] if batch_sizes is None else batch_sizes.shape[0],
        batch,
        width,
        rows // kind.gates,
        0 if proj is None else proj.shape[-2],
        tuple(reverse),
        groups > 1 and shape[-1] != width,
        batch_sizes is not None,
        inputs.lengths is not None,
        inputs.reset is not None,
        all_states and kind.states > 1,
        grad,
        stacked,
    )


def flat(outputs: Outputs) -> list[Tensor]:
    """What the operator returns: [y, h_n, c_n, c, *saved], empty tensors for what there is not."""
    y, h_n, c_n, c, saved = outputs
    return [y, h_n, *(y.new_empty(0) if t is None else t for t in (c_n, c)), *saved]


def structured(problem: Problem, tensors: Sequence[Tensor]) -> Outputs:
    """Undo :func:`flat`."""
    y, h_n, c_n, c, *saved = tensors
    has_c = problem.cell.states > 1
    return Outputs(y, h_n, c_n if has_c else None, c if problem.all_states else None, saved)


def forward(
    cell: str,
    backend: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Weights,
    reverse: Sequence[bool],
    batch: int,
    save: bool,
    all_states: bool,
) -> list[Tensor]:
    """What the operator does: see :func:`flat`."""
    inputs = Inputs(x, batch_sizes, lengths, reset, _read(states), _read(weights))
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, x.shape[0])
    problem, kernels = describe(cell, inputs, reverse, batch, all_states, save), _kernels(backend)
    return flat(kernels.forward(problem, inputs, save and bool(kernels.saved_shapes(problem, 0))))


def _forward_fake(
    cell: str,
    backend: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Weights,
    reverse: Sequence[bool],
    batch: int,
    save: bool,
    all_states: bool,
) -> list[Tensor]:
    inputs = Inputs(x, batch_sizes, lengths, reset, states, weights)
    problem = describe(cell, inputs, reverse, batch, all_states, save)
    G, H, out = problem.G, problem.H, problem.out
    rows = x.shape[0] if problem.packed else problem.T * problem.B
    has_c = problem.cell.states > 1
    shapes = _kernels(backend).saved_shapes(problem, rows) if save else []
    return flat(
        Outputs(
            x.new_empty((*x.shape[:-1], G * out)),
            x.new_empty((G, batch, out)),
            x.new_empty((G, batch, H)) if has_c else None,
            x.new_empty((*x.shape[:-1], G * H)) if problem.all_states else None,
            [x.new_empty(shape, dtype=dtype) for shape, dtype in shapes],
        )
    )


def backward(
    cell: str,
    backend: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Weights,
    reverse: Sequence[bool],
    batch: int,
    y: Tensor,
    saved: list[Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    samples: int,
) -> list[Tensor]:
    """What the operator does: the needed gradients, in the order x, *states, *weights."""
    inputs = Inputs(x, batch_sizes, lengths, reset, _read(states), _read(weights))
    problem = describe(cell, inputs, reverse, batch, False, True)
    run = _kernels(backend).backward
    with _torch.DisableAutocast():  # which forward() may not have been called under
        found = run(problem, inputs, y, saved, Grads(*_read(grads)), needs, samples)
    return [d for d in found if d is not None]


def _backward_fake(
    cell: str,
    backend: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Weights,
    reverse: Sequence[bool],
    batch: int,
    y: Tensor,
    saved: list[Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    samples: int,
) -> list[Tensor]:
    given = (x, *states, *weights)
    lead = [()] * 5 + [() if samples == 1 else (samples,)] * len(weights)
    return [
        torch.empty((*first, *t.shape), dtype=t.dtype, device=t.device)
        for t, needed, first in zip(given, needs, lead, strict=True)
        if needed and t is not None
    ]


def _read(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As they are in memory: torch sees to views that negate, but not in lists with gaps."""
    return [None if t is None else t.resolve_neg() for t in tensors]


def _kernels(name: str) -> Backend:
    backend = by_name(name)
    if backend.differentiable:
        raise RuntimeError(f"backend {name!r} is plain torch: call it directly")
    return backend


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("forward", forward, _key)
    LIBRARY.impl("backward", backward, _key)
torch.library.register_fake("fastrnn::forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fastrnn::backward", _backward_fake, lib=LIBRARY)
