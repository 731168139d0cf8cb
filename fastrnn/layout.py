"""Which dimension of an input is time, for layers, models around layers, and wrappers of both."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

from torch import Tensor, nn

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: Any) -> Any:
    """What `model` calls in the end, where it is a wrapper that hides attributes: a
    functools.partial, a bound method, a decorated or compiled function, a compiled module, or
    torch's data-parallel ones."""
    inner = _wrapped_by(model)
    return model if inner is None else unwrapped(inner)


def _wrapped_by(model: Any) -> Any:
    if isinstance(model, functools.partial):
        return model.func
    if isinstance(model, MethodType):
        return model.__self__ if isinstance(model.__self__, nn.Module) else None
    if isinstance(model, _WRAPPERS):
        return model.module
    if isinstance(model, nn.Module):  # asked by name, for torch._dynamo takes long to import
        return model._modules.get("_orig_mod")
    return getattr(model, "__wrapped__", None)


def time_axis(model: Any, x: Tensor, batch_first: bool | None) -> int:
    """The dimension of x that is time: 1 if the batch comes first, else 0.

    Args:
        model: what x is handed to.
        x: [T, B, ..], [B, T, ..] or, without a batch, [T, ..].
        batch_first: what the caller says; None to learn it from the model: from its attribute of
            this name or, where it has none, from those of the modules inside it.

    Raises:
        ValueError: the caller does not say, and the model does not tell.
    """
    inner = unwrapped(model)
    if x.dim() == 1 or (isinstance(inner, nn.RNNBase) and x.dim() == 2):
        return 0  # a sequence without a batch, in whichever order batches are
    if batch_first is not None:
        return int(batch_first)
    told = is_batch_first(inner)
    if told is None:
        raise ValueError(
            f"{type(inner).__name__} does not tell whether time is the first dimension of x or the "
            "second: say batch_first=False or batch_first=True"
        )
    if told and x.dim() == 2 and x.is_floating_point():
        raise ValueError(
            "x of two dimensions may be [batch, time], or [time, features] without a batch: say "
            "batch_first=True or batch_first=False"
        )
    return int(told)


def is_batch_first(model: Any) -> bool | None:
    """What the model's attribute ``batch_first`` says or, where it has none, what those of all
    modules inside it say; None where there are none, or they differ."""
    own = getattr(model, "batch_first", None)
    if isinstance(own, bool) or not isinstance(model, nn.Module):
        return own if isinstance(own, bool) else None
    inside = {getattr(module, "batch_first", None) for module in model.modules()} - {None}
    return bool(inside.pop()) if len(inside) == 1 else None
