"""Which tensors a kernel may read where they lie, and what they are."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from . import _C
except ImportError:
    _C = None  # type: ignore[assignment]

_CLASSES = (Tensor, torch.nn.Parameter)


def signature(tensors: tuple[Tensor | None, ...]) -> bytes | None:
    """The dtypes, devices and shapes of dense tensors: equal where all of these are.

    None unless all are plain, while torch compiles or traces, for it wants to see how they are
    used, and without the extension or a torch that lets it look into tensors (2.10).
    """
    if _C is None or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    return _C.signature(tensors)


def all_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether their memory holds their values: no subclasses, and no view that negates."""
    if _C is not None and _C.reads_by_table():
        return _C.signature(tensors) is not None
    return all(t is None or (type(t) in _CLASSES and not t.is_neg()) for t in tensors)
