"""Which tensors a kernel may read where they lie, and what they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from . import _C
except ImportError:
    _C = None  # type: ignore[assignment]

_CLASSES = (Tensor, torch.nn.Parameter)


def signature(tensors: tuple[Tensor | None, ...]) -> bytes | None:
    """The dtypes, devices and shapes of dense tensors: equal where all of these are.

    None unless all are plain, where anybody wants to see how they are used or saved, and without
    the extension or a torch that lets it look into tensors (2.10).
    """
    if is_followed() or torch._C._are_functorch_transforms_active():
        return None
    return signature_below(tensors)


def signature_below(tensors: tuple[Tensor | None, ...]) -> bytes | None:
    """The same where nobody follows what is computed, of tensors without what torch.func's
    transforms have wrapped them in."""
    if _C is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    return _C.signature(tensors)


def is_followed() -> bool:
    """Whether anybody watches, records, or differentiates forward."""
    return (
        is_watched() or torch._C._get_tracing_state() is not None or forward_ad._current_level >= 0
    )


def is_watched() -> bool:
    """Whether torch compiles, or anybody watches the dispatcher: no kernel may read memory then."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    )


def all_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether their memory holds their values: no subclasses, and no view that negates."""
    if _C is not None and _C.reads_by_table():
        return _C.signature(tensors) is not None
    return all(t is None or (type(t) in _CLASSES and not t.is_neg()) for t in tensors)
