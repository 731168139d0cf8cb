"""What `layer.__class__` answers: classes that are torch.nn's and fastrnn's. No layer's type is one
of them, nor derived from one: whoever makes a layer or a class of a stand-in gets fastrnn's."""

# mypy: disable-error-code="misc,override"
from __future__ import annotations

import inspect
from abc import ABCMeta
from typing import Any

from torch import nn

from . import layers, steps
from .identity import answer_as, real_class


class Kind(ABCMeta):
    """The class of the stand-ins: of `ABCMeta`, so that one may be a base next to an ABC."""

    def __new__(
        cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any], **options: Any
    ) -> Any:
        """A stand-in, or a class of a user's, of parametrizations' or of FSDP2's that names one
        among its bases, and derives from the type of the layers instead."""
        real = tuple(dict.fromkeys(map(real_class, bases)))
        if real == bases:
            return super().__new__(cls, name, bases, attributes, **options)
        return type(name, real, attributes, **options)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return real_class(cls)(*args, **kwargs)

    @property
    def __signature__(cls) -> inspect.Signature:
        return inspect.signature(real_class(cls))

    def __subclasscheck__(cls, kind: type) -> bool:
        """Of what names the stand-in among its bases, too."""
        return issubclass(real_class(kind), real_class(cls))


class StandIn:
    """The first base of a stand-in; the second is the class that layers have for a type."""

    def __new__(cls) -> Any:
        return object.__new__(real_class(cls))


class RNN(StandIn, layers.RNN, nn.RNN, metaclass=Kind): ...


class LSTM(StandIn, layers.LSTM, nn.LSTM, metaclass=Kind): ...


class GRU(StandIn, layers.GRU, nn.GRU, metaclass=Kind): ...


class RNNCell(StandIn, steps.RNNCell, nn.RNNCell, metaclass=Kind): ...


class LSTMCell(StandIn, steps.LSTMCell, nn.LSTMCell, metaclass=Kind): ...


class GRUCell(StandIn, steps.GRUCell, nn.GRUCell, metaclass=Kind): ...


for _stand_in in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell):
    answer_as(_stand_in, _stand_in.__bases__[1])
