"""The torch.library operators ``fastrnn::forward`` and ``fastrnn::backward``.

They are what torch.compile, export and tracing see of a kernel: one layer, all its groups, all
timesteps. Their fake kernels give shapes without running, for symbolic sizes too. Only backends
that autograd does not see through go through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import Backend, Problem, Weights, by_name, check_batch_sizes
from .cells import CELLS

_LIBRARY: Any = torch.library.Library("fastrnn", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "forward(str cell, str backend, Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0,"
    " Tensor?[] weights, bool[] reverse, SymInt batch, bool save) -> Tensor[]"
)
_LIBRARY.define(
    "backward(str cell, str backend, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x,"
    " Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor?[] weights, bool[] reverse,"
    " SymInt batch, Tensor y, Tensor[] saved, bool[] needs) -> Tensor[]"
)


def describe(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    weights: Weights,
    reverse: Sequence[bool],
    batch: int,
    grad: bool,
) -> Problem:
    """The problem that these arguments pose; `batch` is that of the first step when packed."""
    kind = CELLS[cell]
    groups = len(reverse)
    w_ih = weights[0]
    assert w_ih is not None
    proj = weights[4] if len(weights) == 5 * groups else None
    return Problem(
        kind,
        x.dtype,
        x.device,
        x.shape[0] if batch_sizes is None else batch_sizes.shape[0],
        batch,
        x.shape[-1],
        w_ih.shape[0] // kind.gates,
        0 if proj is None else proj.shape[0],
        groups,
        batch_sizes is not None,
        grad,
    )


def forward(
    cell: str,
    backend: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Weights,
    reverse: Sequence[bool],
    batch: int,
    save: bool,
) -> list[Tensor]:
    """What the operator does: [y, h_n, c_n (empty for cells without), *saved]."""
    problem = describe(cell, x, batch_sizes, weights, reverse, batch, save)
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, x.shape[0])
    y, h_n, c_n, saved = _kernels(backend).forward(
        problem, x, batch_sizes, h0, c0, weights, reverse, save
    )
    return [y, h_n, x.new_empty(0) if c_n is None else c_n, *saved]


def _forward_fake(
    cell: str,
    backend: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Weights,
    reverse: Sequence[bool],
    batch: int,
    save: bool,
) -> list[Tensor]:
    problem = describe(cell, x, batch_sizes, weights, reverse, batch, save)
    rows = x.shape[0] if problem.packed else problem.T * problem.B
    y = x.new_empty((*x.shape[:-1], problem.G * problem.out))
    h_n = x.new_empty((problem.G, batch, problem.out))
    c_n = x.new_empty((problem.G, batch, problem.H) if problem.cell.states > 1 else 0)
    shapes = _kernels(backend).saved_shapes(problem, rows) if save else []
    return [y, h_n, c_n, *(x.new_empty(shape, dtype=dtype) for shape, dtype in shapes)]


def backward(
    cell: str,
    backend: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Weights,
    reverse: Sequence[bool],
    batch: int,
    y: Tensor,
    saved: list[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """What the operator does: the needed gradients, in the order x, h0, c0, *weights."""
    problem = describe(cell, x, batch_sizes, weights, reverse, batch, True)
    with torch._C._DisableAutocast():  # which forward() may not have been called under
        return _kernels(backend).backward(
            problem, dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, reverse, y, saved, needs
        )


def _backward_fake(
    cell: str,
    backend: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Weights,
    reverse: Sequence[bool],
    batch: int,
    y: Tensor,
    saved: list[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs = (x, h0, c0, *weights)
    return [
        torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t, needed in zip(inputs, needs, strict=True)
        if needed and t is not None
    ]


def _kernels(name: str) -> Backend:
    backend = by_name(name)
    if backend.differentiable:
        raise RuntimeError(f"backend {name!r} is plain torch: call it directly")
    return backend


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("forward", forward, _key)
    _LIBRARY.impl("backward", backward, _key)
torch.library.register_fake("fastrnn::forward", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("fastrnn::backward", _backward_fake, lib=_LIBRARY)
