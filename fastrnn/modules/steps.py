"""RNNCell, LSTMCell and GRUCell: one step."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNCellBase

from .. import _torch, by_torch, functional
from ..backends import StepInputs
from ..cells import CELLS, States
from ..plain import OverriddenError, put_aside_default_device, stop_at_overrides
from ..step import step, without_lead
from .identity import AnswersAsTorch
from .layers import Device, not_a_tensor
from .tracing import NotScriptable, Proxy, record

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Step(AnswersAsTorch, NotScriptable, RNNCellBase):
    """What the cells share: one step of a layer. The parameters are RNNCellBase's."""

    _kind: ClassVar[str]
    _state_names: ClassVar[tuple[str, ...]] = ("hidden",)
    _twin: ClassVar[Any]  # torch.nn's class of the same name

    @property
    def _cell(self) -> str:
        raise NotImplementedError

    def _step(self, x: Tensor, h: Tensor | None, c: Tensor | None) -> States:
        inputs = StepInputs(x, h, c, self._weights())
        aside = put_aside_default_device()
        try:
            if type(x) is not Tensor:
                stop_at_overrides((x,))
            return self._run(inputs)
        except OverriddenError:
            return self._step_of_torch(x, h, c)
        finally:
            if aside is not None:
                _torch.push_function_mode(aside)

    def _step_of_torch(self, x: Tensor, h: Tensor | None, c: Tensor | None) -> States:
        """A step by the forward of torch.nn's class, on the same weights."""
        raise NotImplementedError

    def _is_for_torch(self, input: Tensor, hx: Any = None) -> bool:
        """Whether torch's own function shall compute this call: see :mod:`fastrnn.by_torch`."""
        h = hx[0] if isinstance(hx, (tuple, list)) else hx
        inputs = StepInputs(input, h, None, self._weights())
        return by_torch.serves_step(self._cell, self.hidden_size, inputs)

    def _run(self, inputs: StepInputs) -> States:
        cell, H = self._cell, self.hidden_size
        if by_torch.serves_step(cell, H, inputs):
            return by_torch.step(cell, H, inputs)
        if _torch.autocast_active() and functional.is_autocast(inputs.x.device):
            return self._run_without_autocast(inputs)
        sizes = self.input_size, H
        if inputs.x.dim() == 2:
            return step(cell, inputs, self._check_batch, sizes)
        self._check_ranks(inputs)
        x, *states, weights = inputs
        h, c = (None if s is None else s.unsqueeze(0) for s in states)
        ends = step(cell, StepInputs(x.unsqueeze(0), h, c, weights), self._check, sizes)
        return tuple(without_lead(s) for s in ends)

    def _run_without_autocast(self, inputs: StepInputs) -> States:
        """In the dtype of the weights: a state handed on from step to step in 16 bits decays."""
        x, *states, weights = inputs
        dtype = self.weight_ih.dtype
        with torch.autocast(x.device.type, enabled=False):
            h, c = (None if s is None else functional.cast(s, dtype) for s in states)
            return self._run(StepInputs(functional.cast(x, dtype), h, c, weights))

    def _weights(self) -> list[Any]:
        """As they are now: parameters, parametrizations, plain tensors alike."""
        own = self._parameters
        return [own[name] if name in own else getattr(self, name) for name in _WEIGHTS]

    def _check_ranks(self, inputs: StepInputs) -> None:
        x, *states, _ = inputs
        names = ("input", *self._state_names)
        # c is there for cells without one too. Dynamo of torch 2.6 zips nothing of unequal length.
        for name, tensor in zip(names, (x, *states)[: len(names)], strict=True):
            if tensor is not None and tensor.dim() not in (1, 2):
                raise ValueError(
                    f"{self._kind}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead"
                )

    def _check_batch(self, inputs: StepInputs) -> None:
        self._check_ranks(inputs)
        self._check(inputs)

    def _check(self, inputs: StepInputs) -> None:
        x, *states, _ = inputs
        if x.shape[1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {x.shape[1]} expected {self.input_size}"
            )
        for k, state in enumerate(states):
            if state is None:
                continue
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


def _refuse_non_tensors(kind: str, given: dict[str, object]) -> None:
    """Name the argument that a step has failed on, if it is none that a step could read: looking
    only then costs the other calls nothing."""
    for name, value in given.items():
        if not hasattr(value, "dim"):
            raise TypeError(not_a_tensor(kind, name, value)) from None


class _StepOfOneState(Step):
    def _step_of_torch(self, x: Tensor, h: Tensor | None, c: Tensor | None) -> States:
        return (self._twin.forward(self, x, h),)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: input [B, input_size], hx and result [B, hidden_size]; or all without B."""
        if not isinstance(self, Step):  # called by who wrapped this method before revert()
            return type(self).forward(self, input, hx)  # type: ignore[unreachable]
        if isinstance(input, Proxy):
            node: Tensor = record(self, input, hx)
            return node
        try:
            return self._step(input, hx, None)[0]
        except (AttributeError, TypeError):
            states = {} if hx is None else {"hx": hx}
            _refuse_non_tensors(self._kind, {"input": input, **states})
            raise


class RNNCell(_StepOfOneState):
    """One step of :class:`RNN`, a drop-in for :class:`torch.nn.RNNCell`."""

    _kind = "RNNCell"
    _twin = torch.nn.RNNCell

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
    _state_names = ("hx[0]", "hx[1]")
    _twin = torch.nn.LSTMCell

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

    def _step_of_torch(self, x: Tensor, h: Tensor | None, c: Tensor | None) -> States:
        twin: Any = self._twin
        states: States = twin.forward(self, x, None if h is None else (h, c))
        return states

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step: input [B, input_size], hx and result (h, c), both [B, hidden_size]; or all
        without B."""
        if not isinstance(self, Step):  # called by who wrapped this method before revert()
            return type(self).forward(self, input, hx)  # type: ignore[unreachable]
        if isinstance(input, Proxy):
            nodes: tuple[Tensor, Tensor] = record(self, input, hx)
            return nodes
        h, c = (None, None) if hx is None else self._pair(hx)
        try:
            h_next, c_next = self._step(input, h, c)
        except (AttributeError, TypeError):
            states = {} if hx is None else {"hx[0]": h, "hx[1]": c}
            _refuse_non_tensors(self._kind, {"input": input, **states})
            raise
        return h_next, c_next

    def _pair(self, hx: Any) -> tuple[Tensor, Tensor]:
        """h and c; whether they are tensors is asked where a step with them fails, but for None,
        which a step takes for zeros."""
        if not isinstance(hx, (tuple, list)):
            raise TypeError(
                "lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, "
                f"not {type(hx).__name__}"
            )
        if len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        h, c = hx
        if h is None or c is None:
            _refuse_non_tensors(self._kind, {"hx[0]": h, "hx[1]": c})
        return h, c


class GRUCell(_StepOfOneState):
    """One step of :class:`GRU`, a drop-in for :class:`torch.nn.GRUCell`."""

    _kind = "GRUCell"
    _twin = torch.nn.GRUCell

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
