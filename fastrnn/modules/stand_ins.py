"""What `layer.__class__` answers: classes that are torch.nn's and fastrnn's. No layer's type is one
of them, and calling one makes a layer of fastrnn's class."""

# mypy: disable-error-code="misc,override"
from __future__ import annotations

from typing import Any

from torch import nn

from . import layers, steps
from .identity import answer_as


class StandIn:
    """The first base of a stand-in; the second is the class that layers have for a type."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.__bases__[1](*args, **kwargs)


class RNN(StandIn, layers.RNN, nn.RNN): ...


class LSTM(StandIn, layers.LSTM, nn.LSTM): ...


class GRU(StandIn, layers.GRU, nn.GRU): ...


class RNNCell(StandIn, steps.RNNCell, nn.RNNCell): ...


class LSTMCell(StandIn, steps.LSTMCell, nn.LSTMCell): ...


class GRUCell(StandIn, steps.GRUCell, nn.GRUCell): ...


for _stand_in in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell):
    answer_as(_stand_in, _stand_in.__bases__[1])
