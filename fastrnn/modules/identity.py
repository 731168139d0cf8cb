"""Which class a layer says it is, to code that asks for torch.nn's."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from .. import _torch

# What `layer.__class__` answers for the type of a layer, and back: filled by `stand_ins`.
ANSWERS: dict[type, type] = {}
_REAL: dict[type, type] = {}

_object_class: Any = object.__dict__["__class__"]


class AnswersAsTorch(nn.Module):
    """What makes ``isinstance(layer, torch.nn.LSTM)`` hold for a layer whose type is no subclass of
    it, which torch.compile would refuse to look into.

    ``isinstance`` asks a class about ``type(layer)`` first and about ``layer.__class__`` then. The
    latter answers a stand-in, a subclass of both libraries' classes (`stand_ins`). Subclasses of
    the layers answer for themselves, and so does every layer to torch.compile."""

    def _answered_class(self) -> type:
        own = type(self)
        if _torch.CompileContext.try_get() is None or _is_asked_for_traced_code():
            return ANSWERS.get(own, own)
        return own

    _torch.leave_uncompiled(_answered_class)

    def _become(self, kind: type) -> None:
        _object_class.__set__(self, real_class(kind))

    __class__ = property(_answered_class, _become)

    def _get_name(self) -> str:
        """What repr() begins with; a class that is derived from a layer's has its own name."""
        name = type(self).__name__
        return f"fastrnn.{name}" if type(self) in ANSWERS else name

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) not in ANSWERS:
            return super().__reduce_ex__(protocol)
        # pickle compares the class that is to be made anew with __class__, unless told how to.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, args, *state = reduced
        return (make, args, *state)


def _is_asked_for_traced_code() -> bool:
    """Whether Dynamo evaluates an ``isinstance`` of the code that it traces, which must come out as
    it does without torch.compile."""
    asking = sys._getframe(2)  # past _answered_class; isinstance itself has no frame
    return asking.f_globals.get("__name__") == "torch._dynamo.variables.builtin"


def make(kind: type[AnswersAsTorch]) -> AnswersAsTorch:
    """A layer without a state: what pickles of layers call."""
    if not issubclass(kind, AnswersAsTorch):
        raise TypeError(f"{kind.__name__} is not a class of fastrnn's layers")
    return kind.__new__(kind)


# torch.load(weights_only=True) then asks for the layers' classes alone.
torch.serialization.add_safe_globals([make])


def answer_as(stand_in: type, kind: type) -> None:
    """Let layers whose type is `kind` answer that their class is `stand_in`."""
    ANSWERS[kind], _REAL[stand_in] = stand_in, kind


def real_class(kind: type) -> type:
    """The type of the layers that answer `kind`, if it is a stand-in; `kind` itself, if not."""
    return _REAL.get(kind, kind)


def derived_from(bases: tuple[type, ...], kind: type) -> type:
    """A class as `kind`, with the same attributes, but derived from `bases`."""
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__", "__doc__")}
    return type(kind)(kind.__name__, bases, own)
