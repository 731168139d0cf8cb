"""Which tensors a kernel may read where they lie, and what they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from . import _torch

try:
    from . import _C
except ImportError:
    _C = None  # type: ignore[assignment]

_CLASSES = (Tensor, torch.nn.Parameter)


def signature(tensors: tuple[Tensor | None, ...]) -> bytes | None:
    """The dtypes, devices and shapes of dense tensors: equal where all of these are.

    None unless all are plain, where anybody wants to see how they are used or saved, and without
    the extension or a torch that lets it look into tensors (2.10).

    Raises:
        OverriddenError: see :func:`stop_at_overrides`.
    """
    read = None
    if not is_followed() and not _torch.transforms_active():
        read = signature_below(tensors)
    if read is None:
        stop_at_overrides(tensors)
    return read


def signature_below(tensors: tuple[Tensor | None, ...]) -> bytes | None:
    """The same where nobody follows what is computed, of tensors without what torch.func's
    transforms have wrapped them in."""
    if _C is None or _torch.saves_elsewhere():
        return None
    return _C.signature(tensors)


class OverriddenError(TypeError):
    """An argument decides by itself what torch's functions do with it."""


def stop_at_overrides(tensors: tuple[object, ...]) -> None:
    """Look for ``__torch_function__`` methods that torch does not have for tensors of its own.

    Such a class may know torch.nn's layers, but neither our operators nor what a call does to a
    tensor before it gets to one: torch's expanded weights refuse even to tell their strides.

    Raises:
        OverriddenError: there is one.
    """
    if torch.compiler.is_compiling() or not _torch.any_overrides(tensors):
        return
    for tensor in tensors:
        function = getattr(type(tensor), "__torch_function__", None)
        if getattr(function, "__func__", function) not in _TORCHS_OWN:
            raise OverriddenError(
                f"{type(tensor).__name__} has a __torch_function__ that fastrnn does not know"
            )


# What Tensor itself has, and what switches it off: for parameters, DTensor and the like.
_TORCHS_OWN = (
    None,
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    _torch.disabled_override,
)


def is_followed() -> bool:
    """Whether anybody watches, records, or differentiates forward."""
    return is_watched() or _torch.tracing_state() is not None or _torch.is_forward_differentiated()


def is_watched() -> bool:
    """Whether torch compiles, or anybody watches the dispatcher: no kernel may read memory then."""
    return bool(
        torch.compiler.is_compiling()
        or _torch.dispatch_modes()
        or _torch.records_above_autograd()
        or (_torch.function_modes() and not _has_only_default_device())
    )


def _has_only_default_device() -> bool:
    """Whether the one mode that sees torch's functions is a default device (``torch.device`` as a
    context, ``torch.set_default_device``), of which there is never more than one. It changes where
    a factory function without a device puts its tensor, and nothing else."""
    alone: bool = _torch.function_modes() == 1
    return alone and type(_torch.function_mode_at(0)) is DeviceContext


def put_aside_default_device() -> Any:
    """Take a default device that alone sees torch's functions out of the way, and return it for
    `_torch.push_function_mode` to put it back; None where there is none, or others watch too.

    It costs 1 to 6 microseconds in every function of torch. Code that names the device of what it
    allocates, and runs nothing of the user's, is spared them."""
    if torch.compiler.is_compiling() or not _has_only_default_device():
        return None
    return _torch.pop_function_mode()


def all_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether their memory holds their values: no subclasses, and no view that negates."""
    if _C is not None and _C.reads_by_table():
        return _C.signature(tensors) is not None
    return all(t is None or (type(t) in _CLASSES and not t.is_neg()) for t in tensors)
