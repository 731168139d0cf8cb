"""One step at a time: inference on data that arrives as it is made, with carried states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import functional, ops
from .backends import Inputs, Outputs, Prepares, choose
from .cells import CELLS, States
from .modules import Layers
from .plain import all_plain


def stream(layer: torch.nn.Module, batch_size: int | None = None, hx: Any = None) -> Stream:
    """A step function of `layer` that carries the states from call to call, for inference.

    >>> import torch, fastrnn
    >>> step = fastrnn.stream(fastrnn.LSTM(8, 16), batch_size=3)
    >>> step(torch.randn(3, 8)).shape
    torch.Size([3, 16])

    Args:
        layer: a fastrnn RNN, LSTM or GRU of any depth, in one direction.
        batch_size: rows of every step; None for one sequence without a batch dimension.
        hx: the states to begin with, and to return to at a reset, as the layer takes them; None for
            zeros.

    Raises:
        TypeError: `layer` is not a fastrnn layer.
        ValueError: `layer` is bidirectional, or a size does not fit.
    """
    if not isinstance(layer, Layers):
        raise TypeError(f"a stream is made of a fastrnn layer, not of {type(layer).__name__}")
    if layer.bidirectional:
        raise ValueError("a bidirectional layer needs the future, which a stream has not")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size should be at least 1, got {batch_size}")
    return Stream(layer, batch_size, hx)


class Stream:
    """What :func:`stream` returns: ``y = step(x)`` is one step, x [batch_size, I] and y
    [batch_size, out], or [I] and [out] without a batch size. Nothing is differentiated, and dropout
    and autocast are off, whatever modes are set.

    Where the backend can, all but the arithmetic is done beforehand: it is chosen, sizes are
    checked and addresses taken. Weights are read where they are at every step, and when other
    tensors take their places (``layer.to(..)``, ``load_state_dict(assign=True)``,
    parametrizations) the next step notices. Layers whose weights are computed go the ordinary way.
    """

    def __init__(self, layer: Layers, batch_size: int | None, hx: Any) -> None:
        self._layer, self._batch = layer, batch_size
        widths = (layer.proj_size or layer.hidden_size, layer.hidden_size)
        shapes = [(layer.num_layers, batch_size or 1, width) for width in widths]
        self._shapes = shapes[: CELLS[layer._cell].states]
        zeros = tuple(torch.zeros(shape, device="cpu") for shape in self._shapes)
        self._first = zeros if hx is None else self._given(hx)
        self._carried = self._first
        self.refresh()

    def __call__(self, x: Tensor) -> Tensor:
        """One step.

        Raises:
            ValueError: x is not of the expected shape, dtype or device.
        """
        if self._addresses_now() != self._addresses:
            self.refresh()
        if x.shape != self._shape or x.dtype is not self._dtype or x.device != self._device:
            raise ValueError(
                f"expected x of shape {self._shape}, {self._dtype} on {self._device}, "
                f"got {tuple(x.shape)}, {x.dtype} on {x.device}"
            )
        self._x.copy_(x.detach() if x.requires_grad else x)
        if self._steps is None:
            self._carry(self._run(), slice(None))
        else:
            for step in self._steps:
                step()
        return self._y.clone()

    @property
    def states(self) -> Any:
        """A copy of h, or of (h, c), shaped as the layer returns them. Assign to it to go on from
        other states."""
        carried = tuple(s.clone() if self._batch else s.squeeze(1).clone() for s in self._carried)
        return self._layer._hidden(carried)

    @states.setter
    def states(self, hx: Any) -> None:
        self._carry(self._given(hx), slice(None))

    def reset(self, rows: Any = None) -> None:
        """Return to the first states: all rows, or those that `rows` indexes: an int, a slice, a
        list or tensor of indices, or a bool mask [batch_size]."""
        self._carry(self._first, slice(None) if rows is None else rows)

    def refresh(self) -> None:
        """Choose the backend and take addresses, dtype, device and the number of threads anew; the
        states stay as they are."""
        weights = self._layer._weights()
        like, lead = weights[0][0], () if self._batch is None else (self._batch,)
        self._dtype, self._device = like.dtype, like.device
        with torch.inference_mode(False), torch.no_grad():
            self._first = tuple(s.to(like) for s in self._first)
            self._carried = tuple(s.to(like, copy=True) for s in self._carried)
            self._shape = (*lead, self._layer.input_size)
            self._input = like.new_zeros(1, self._batch or 1, self._layer.input_size)
            self._x, self._y = self._input.view(self._shape), self._carried[0][-1].view(*lead, -1)
        self._run()  # checks what is not checked here
        self._addresses = self._addresses_now()
        self._steps = self._prepared(weights)

    def _addresses_now(self) -> list[int]:
        return [w.data_ptr() for w in self._layer._parameters.values() if w is not None]

    def _prepared(self, weights: list[list[Any]]) -> list[Callable[[], None]] | None:
        """A call for each layer, or None where not all can be prepared."""
        steps = []
        x = self._input
        for k, flat in enumerate(weights):
            h, c = [*(s[k : k + 1] for s in self._carried), None][:2]
            assert h is not None
            held = [None if w is None else w.detach() for w in flat]
            inputs = Inputs(x, None, None, None, (h, c, None, None), held)
            problem = ops.describe(self._layer._cell, inputs, (False,), x.shape[1], False, False)
            backend = choose(problem)
            if not isinstance(backend, Prepares) or not all(map(_stays, flat)):
                return None
            outputs = Outputs(torch.empty_like(h), h, c, None, [])
            steps.append(backend.prepare(problem, inputs, outputs))
            x = h
        return steps

    def _run(self) -> States:
        """The states after a step of the ordinary kind."""
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            cell, weights = self._layer._cell, self._layer._weights()
            return functional.stack(cell, self._input, self._carried, weights)[1]

    def _given(self, hx: Any) -> States:
        batched = self._batch is not None
        states = self._layer._states(hx, 3 if batched else 2)
        states = states if batched else tuple(s.unsqueeze(1) for s in states)
        for state, shape in zip(states, self._shapes, strict=True):
            if state.shape != shape:
                raise ValueError(f"expected a state of shape {shape}, got {tuple(state.shape)}")
        return tuple(s.detach().clone() for s in states)

    def _carry(self, states: States, rows: Any) -> None:
        with torch.no_grad():
            for mine, state in zip(self._carried, states, strict=True):
                mine[:, rows] = state[:, rows].to(mine)


def _stays(weight: Tensor | None) -> bool:
    """Whether a weight is read where it lies, and not a copy or computed for each call."""
    if weight is None:
        return True
    return type(weight) is torch.nn.Parameter and weight.is_contiguous() and all_plain((weight,))
