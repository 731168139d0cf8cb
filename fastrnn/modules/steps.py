"""RNNCell, LSTMCell and GRUCell: one step."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNCellBase

from .. import functional
from ..cells import CELLS, States
from .identity import AnswersAsTorch
from .layers import Device
from .tracing import NotScriptable, Proxy, record


class Step(AnswersAsTorch, NotScriptable, RNNCellBase):
    """What the cells share: one step of a layer. The parameters are RNNCellBase's."""

    _kind: ClassVar[str]

    @property
    def _cell(self) -> str:
        raise NotImplementedError

    def _run(self, input: Tensor, hx: States | None) -> States:
        if torch._C._is_any_autocast_enabled() and functional.is_autocast(input.device):
            return self._run_without_autocast(input, hx)
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        states = hx if batched or hx is None else tuple(s.unsqueeze(0) for s in hx)
        self._check(x, states)
        if states is not None:
            states = tuple(s.unsqueeze(0) for s in states)
        weights = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        _, ends, _ = functional.layer(self._cell, x.unsqueeze(0), states, weights)
        # In place, so that they are no views: those cannot be detached in place, as loops do.
        ends = tuple(s.squeeze_(0) for s in ends)
        return ends if batched else tuple(s.squeeze_(0) for s in ends)

    def _run_without_autocast(self, input: Tensor, hx: States | None) -> States:
        """In the dtype of the weights: a state handed on from step to step in 16 bits decays."""
        dtype = self.weight_ih.dtype
        with torch.autocast(input.device.type, enabled=False):
            states = None if hx is None else tuple(functional.cast(s, dtype) for s in hx)
            return self._run(functional.cast(input, dtype), states)

    def _check_rank(self, tensor: Tensor, name: str) -> None:
        if tensor.dim() not in (1, 2):
            raise ValueError(
                f"{self._kind}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead"
            )

    def _check(self, x: Tensor, states: States | None) -> None:
        if x.shape[1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {x.shape[1]} expected {self.input_size}"
            )
        for k, state in enumerate(states or ()):
            if state.dim() != 2:
                raise RuntimeError(f"hidden{k} should have as many dimensions as the input")
            if state.shape[0] != x.shape[0]:
                hint = functional.hint_to_expand((x.shape[0], state.shape[1]), state)
                raise RuntimeError(
                    f"Input batch size {x.shape[0]} doesn't match "
                    f"hidden{k} batch size {state.shape[0]}{hint}"
                )
            if state.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{k} has inconsistent hidden_size: "
                    f"got {state.shape[1]}, expected {self.hidden_size}"
                )


class _StepOfOneState(Step):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: input [B, input_size], hx and result [B, hidden_size]; or all without B."""
        if isinstance(input, Proxy):
            node: Tensor = record(self, input, hx)
            return node
        self._check_rank(input, "input")
        if hx is not None:
            self._check_rank(hx, "hidden")
        return self._run(input, None if hx is None else (hx,))[0]


class RNNCell(_StepOfOneState):
    """One step of :class:`RNN`, a drop-in for :class:`torch.nn.RNNCell`."""

    _kind = "RNNCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self.nonlinearity = nonlinearity

    @property
    def _cell(self) -> str:
        name = f"rnn_{self.nonlinearity}"
        if name not in CELLS:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return name


class LSTMCell(Step):
    """One step of :class:`LSTM`, a drop-in for :class:`torch.nn.LSTMCell`."""

    _kind = "LSTMCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)

    @property
    def _cell(self) -> str:
        return "lstm"

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step: input [B, input_size], hx and result (h, c), both [B, hidden_size]; or all
        without B."""
        if isinstance(input, Proxy):
            nodes: tuple[Tensor, Tensor] = record(self, input, hx)
            return nodes
        self._check_rank(input, "input")
        if hx is not None:
            if isinstance(hx, Tensor):
                raise TypeError(
                    "lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor"
                )
            for k, state in enumerate(hx):
                self._check_rank(state, f"hx[{k}]")
            if len(hx) != 2:
                raise RuntimeError("lstm_cell expects two hidden states")
        h, c = self._run(input, None if hx is None else tuple(hx))
        return h, c


class GRUCell(_StepOfOneState):
    """One step of :class:`GRU`, a drop-in for :class:`torch.nn.GRUCell`."""

    _kind = "GRUCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 3, device, dtype)

    @property
    def _cell(self) -> str:
        return "gru"
