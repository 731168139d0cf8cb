"""Who computes a layer: the backends in order of preference, and the choice among them."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .. import _torch, record
from .aten import ATEN
from .base import (
    Backend,
    ComputesNothing,
    Grads,
    Inputs,
    Outputs,
    Prepares,
    Problem,
    SavedShape,
    StepInputs,
    TakesSteps,
    Weights,
    check_lengths,
)
from .cpu import CPU
from .cuda import CUDA
from .recompute import MARK, Recompute
from .reference import REFERENCE
from .triton import TRITON
from .widened import WIDENED, pays

__all__ = [
    "BACKENDS",
    "REFERENCE",
    "Backend",
    "ComputesNothing",
    "Grads",
    "Inputs",
    "Outputs",
    "Prepares",
    "Problem",
    "Recompute",
    "SavedShape",
    "StepInputs",
    "TakesSteps",
    "Weights",
    "asked",
    "backend",
    "by_name",
    "check_batch_sizes",
    "check_lengths",
    "choose",
    "only",
    "refusal",
    "timed_as",
    "transforms_refusal",
]

BACKENDS: list[Backend] = [CPU, CUDA, TRITON, WIDENED, ATEN, REFERENCE]


def by_name(name: str) -> Backend:
    """The backend called `name`; ValueError if there is none."""
    inner, recompute, every = name.partition(MARK)
    for backend in BACKENDS:
        if backend.name == inner:
            return Recompute(backend, int(every)) if recompute else backend
    raise ValueError(f"unknown fastrnn backend {name!r}: choose from {[b.name for b in BACKENDS]}")


_ENVIRONMENT = os.environ.get("FASTRNN_BACKEND") or None
if _ENVIRONMENT is not None:
    by_name(_ENVIRONMENT)
_forced: ContextVar[str | None] = ContextVar("fastrnn_backend", default=_ENVIRONMENT)


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Let one backend, and no other, serve every layer called inside the ``with`` block.

    A layer that it cannot serve raises a RuntimeError with its reason. ``None`` restores the
    automatic choice. The environment variable ``FASTRNN_BACKEND``, read at import, does the same
    for the whole process. The choice holds for the current thread (or asyncio task); a backward
    pass uses the backend of its forward pass, and a compiled function the one that was chosen when
    it was compiled.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name is not None:
        by_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def only(candidate: Backend) -> Iterator[None]:
    """Let a backend that is none of the list serve every layer called inside the ``with`` block."""
    BACKENDS.append(candidate)  # the last, after one that serves everything: only chosen by name
    try:
        with backend(candidate.name):
            yield
    finally:
        BACKENDS.remove(candidate)


def asked() -> str | None:
    """The name of the backend that alone may serve, if one was asked for."""
    return _forced.get()


# As torch.compiler.assume_constant_result does, but without importing Dynamo, which takes a second.
asked._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refusal(candidate: Backend, problem: Problem) -> str | None:
    """None if `candidate` serves the problem here and now, or its reason."""
    if not candidate.differentiable:
        if problem.B == 0 or problem.I == 0 or problem.H == 0:
            return "a batch, an input or a state of size 0 leaves the kernels nothing to do"
        reason = transforms_refusal()
        if reason is not None:
            return reason
        if _torch.is_forward_differentiated():
            return "forward-mode differentiation is active, and the kernels have none"
        if _torch.tracing_state() is not None:
            return "torch.jit.trace is recording, and cannot record the kernels"
    reason = candidate.supports(problem)
    return _objection(candidate, problem) if reason is None else reason


def _objection(candidate: Backend, problem: Problem) -> str | None:
    """Why a backend that supports the problem does not serve it on this machine; None if it does.

    The device's record decides: see :mod:`fastrnn.record`."""
    kernel = candidate.name, problem.cell.name, problem.dtype, problem.device
    if record.is_wrong(*kernel):
        dtype = str(problem.dtype).removeprefix("torch.")
        return (
            f"`python -m fastrnn check` found its {problem.cell.name} {dtype} kernel wrong on this "
            "machine"
        )
    if asked() == candidate.name or (record.is_right(*kernel) and record.is_timed(*kernel)):
        return None
    return candidate.on_request


def transforms_refusal() -> str | None:
    """Why the kernels, which :mod:`fastrnn.transforms` runs, do not serve what of torch.func is
    active; None if they do."""
    if not _torch.transforms_active():
        return None
    if torch.compiler.is_compiling():
        return "a torch.func transform is being compiled, which needs plain torch operations"
    for level in _torch.interpreters() or ():
        kind = level.key()
        if kind == _torch.TransformType.Functionalize:
            return "torch.func.functionalize is active, which needs plain torch operations"
        if kind == _torch.TransformType.Vmap and _torch.CVmapInterpreterPtr(level).batchSize() == 0:
            return "a vmap over nothing leaves the kernels nothing to do"
    return None


def choose(problem: Problem) -> Backend:
    """The backend asked for by name, or else the first that serves the problem, in the order of
    preference or, where the device's record has times, the fastest first."""
    name = asked()
    if name is not None:
        chosen = by_name(name)
        reason = refusal(chosen, problem)
        if reason is not None:
            raise RuntimeError(f"fastrnn backend {name!r} was asked for, but refuses: {reason}")
        return chosen
    reasons = []
    for candidate in _in_order(problem):
        reason = refusal(candidate, problem)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    raise RuntimeError("no fastrnn backend serves this layer: " + "; ".join(reasons))


def _in_order(problem: Problem) -> list[Backend]:
    """The backends in which one is looked for: those that `tune` has measured come first."""
    if not record.has_times(problem.device):
        is_small = problem.dtype == torch.float16 and not _pays(problem)
        return [b for b in BACKENDS if b is not WIDENED] if is_small else BACKENDS
    names = record.fastest(*timed_as(problem))
    measured = [backend for name in names for backend in BACKENDS if backend.name == name]
    return [*measured, *(backend for backend in BACKENDS if backend.name not in names)]


def _pays(problem: Problem) -> bool:
    """See :func:`fastrnn.backends.widened.pays`; what is made of a call that is compiled or traced
    serves other sizes too."""
    if torch.compiler.is_compiling() or _torch.tracing_state() is not None:
        return True
    cell, _, _, T, B, I, H, *_ = problem
    return pays(cell, T, T * B, I, H, problem.grad)


def timed_as(problem: Problem) -> tuple[str, torch.dtype, torch.device, bool, int, int | None]:
    """What of a problem its time is looked up by in a record: cell, dtype, device, whether
    gradients are wanted, H and B. While a call is compiled or traced B is None, and all B count
    together: what is made of it serves other batches too."""
    traced = torch.compiler.is_compiling() or not isinstance(problem.B, int)
    H, B = operator.index(problem.H), None if traced else problem.B
    return problem.cell.name, problem.dtype, problem.device, problem.grad, H, B


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    """Raise unless `batch_sizes` describes a packed sequence of `rows` rows: kernels trust it."""
    if (
        batch_sizes.dim() != 1
        or batch_sizes.dtype != torch.int64
        or batch_sizes.device.type != "cpu"
    ):
        raise RuntimeError(
            "batch_sizes should always be a 1-D int64 CPU tensor, got "
            f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        )
    sizes: list[int] = _torch.to_list(batch_sizes)
    if not sizes:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if sizes[-1] <= 0 or sizes != sorted(sizes, reverse=True):
        raise RuntimeError("batch_sizes must be positive and must not increase")
    if sum(sizes) != rows:
        raise RuntimeError(f"batch_sizes sum to {sum(sizes)}, but the packed input has {rows} rows")
