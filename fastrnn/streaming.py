"""One step at a time: inference on data that arrives as it is made, with carried states."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from . import _torch, functional, ops
from .backends import Inputs, Outputs, Prepares, choose
from .cells import States
from .layout import is_batch_first, unwrapped
from .memory import Memory, lent
from .modules import GRUCell, Layers, LSTMCell, RNNCell, Step
from .plain import all_plain
from .rows import indices, mask


def stream(
    layer: nn.Module,
    batch_size: int | None = None,
    hx: Any = None,
    *,
    batch_first: bool | None = None,
    keeps_time: bool | None = None,
) -> Stream:
    """A step function of `layer` that carries the states from call to call, for inference.

    >>> import torch, fastrnn
    >>> step = fastrnn.stream(fastrnn.LSTM(8, 16), batch_size=3)
    >>> step(torch.randn(3, 8)).shape
    torch.Size([3, 16])

    Args:
        layer: a fastrnn layer of any depth in one direction, a fastrnn cell, or a model that calls
            such ones, each once in a step and without ``hx``.
        batch_size: rows of every step; None for one sequence without a batch dimension.
        hx: the states to begin with, and to return to at a reset, as the layer or cell takes them;
            for a model, a dict of them by the names of its layers. None for zeros.
        batch_first: of a model, whether it is called with [B, T, ..]; None to learn it from its
            attribute of this name or from those of its layers.
        keeps_time: of a model, whether the tensor that it returns has the time dimension; None to
            learn it from the shape.

    Raises:
        TypeError: `layer` is not a fastrnn layer or cell, nor contains any, or contains torch.nn's.
        ValueError: a layer is bidirectional, a size does not fit, or a model's layers do not agree
            on ``batch_first``.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size should be at least 1, got {batch_size}")
    model = unwrapped(layer) if isinstance(layer, nn.Module) else layer
    modules = _recurrent(model)
    if isinstance(model, (Layers, Step)):
        return LayerStream(model, [Memory("", model, batch_size, hx)], batch_size, keeps_time)
    hx = {} if hx is None else hx
    if not isinstance(hx, dict) or not hx.keys() <= modules.keys():
        raise ValueError(f"hx should be a dict of the states of layers, by the names {[*modules]}")
    memories = [Memory(name, m, batch_size, hx.get(name)) for name, m in modules.items()]
    return Stream(
        model, memories, batch_size, _time_axis(model, batch_size, batch_first), keeps_time
    )


def _recurrent(model: Any) -> dict[str, Layers | Step]:
    """The layers and cells in a model, of which a stream can be made, by name."""
    found: dict[str, Layers | Step] = {}
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, (Layers, Step)):
            if getattr(module, "bidirectional", False):
                raise ValueError("a bidirectional layer needs the future, which a stream has not")
            found[name] = module
        elif isinstance(module, (nn.RNNBase, RNNCellBase)):
            raise TypeError(
                f"a stream is made of a fastrnn layer, not of {type(module).__name__} of torch.nn: "
                "call fastrnn.convert() first"
            )
    if not found:
        raise TypeError(
            f"a stream is made of a fastrnn layer, not of {type(model).__name__}, which contains "
            "none"
        )
    return found


def _time_axis(model: nn.Module, batch: int | None, batch_first: bool | None) -> int | None:
    """The dimension of the model's input that is time; None of a model of cells, which has none."""
    if not any(isinstance(module, Layers) for module in model.modules()):
        return None
    if batch is None:
        return 0
    told = is_batch_first(model) if batch_first is None else batch_first
    if told is None:
        raise ValueError(
            "the modules of the model do not agree on batch_first: say batch_first=False or "
            "batch_first=True, as its input is"
        )
    return int(told)


class Stream:
    """What :func:`stream` returns: ``y = step(x)`` is one step, x [batch_size, ..] and y
    [batch_size, ..], or without a batch dimension. Nothing is differentiated, and dropout and
    autocast are off, whatever modes are set.

    A model is called with x, to which a time dimension is added unless it has nothing but cells,
    and with whatever else the step is given. The tensor that it returns loses the time dimension;
    other structures are returned as they are. Hooks hold, and what torch.compile would compile is
    run as it is written. Streams take turns where several threads step models; a step that raises
    leaves the states as they were.

    Copies, by :mod:`copy` or by pickle, go on on their own; those of copy.copy share the model.
    """

    def __init__(
        self,
        model: nn.Module,
        memories: list[Memory],
        batch: int | None,
        time: int | None,
        keeps_time: bool | None = None,
    ) -> None:
        self._model, self._memories, self._batch = model, memories, batch
        self._time, self._keeps_time = time, keeps_time
        self.refresh()

    def __call__(self, x: Tensor, *others: Any, **options: Any) -> Any:
        """One step.

        Raises:
            TypeError: x is not a tensor.
            ValueError: the input that reaches a layer is not one step of the stream, or the shape
                of a model's result does not tell whether it has a time dimension.
            RuntimeError: a layer is not called just once, is called with hx, or the model has got
                other layers since the stream was made.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"a step takes a tensor, got {type(x).__name__}")
        self._require_the_same_layers()
        x = x if self._time is None else x.unsqueeze(self._time)
        eager = torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()
        autocast = torch.autocast(x.device.type, enabled=False)
        with eager, autocast, lent(self._model, self._memories):
            return self._without_time(self._model(x, *others, **options))

    @property
    def states(self) -> Any:
        """A copy of h, or of (h, c), shaped as the layer or cell returns them; of a model, a dict
        of these by the layers' names. Assign to it to go on from other states."""
        return {memory.name: memory.states for memory in self._memories}

    @states.setter
    def states(self, hx: Any) -> None:
        names = [memory.name for memory in self._memories]
        if not isinstance(hx, dict) or hx.keys() != set(names):
            raise ValueError(f"expected a dict with the states of each of {names}")
        for memory in self._memories:
            memory.states = hx[memory.name]

    def reset(self, rows: Any = None) -> None:
        """Return to the first states: all rows, or those that `rows` tells: an int, a slice, a
        sequence of indices, or a mask [batch_size] of bools, or of floats that are 0 or 1. Lists,
        tuples, arrays and tensors will do. Integers are always indices.

        Raises:
            IndexError: there is no such row.
            ValueError: a mask has another shape or other values, or a row is named twice, as in a
                mask of integers.
            TypeError: `rows` are of a dtype that may be either, or is neither.
        """
        chosen = None if rows is None else mask(rows, self._batch or 1)
        for memory in self._memories:
            memory.reset(chosen)

    def reorder(self, rows: Any) -> None:
        """Let row b go on from where row ``rows[b]`` is, for all b: what a beam search does with
        the beams that it keeps.

        Args:
            rows: integers [batch_size], in a list, tuple, array or tensor.

        Raises:
            IndexError: there is no such row.
            ValueError: `rows` has another shape.
            TypeError: `rows` are no integers.
        """
        batch = self._batch or 1
        chosen = indices(rows, batch)
        if chosen.shape != (batch,):
            raise ValueError(f"expected rows of shape ({batch},), got {tuple(chosen.shape)}")
        for memory in self._memories:
            memory.reorder(chosen)

    def refresh(self) -> None:
        """Look anew at what was decided when the stream was made; the states stay as they are."""
        # Asked by name, for torch._dynamo takes long to import.
        self._compiled = any(
            module._compiled_call_impl is not None or "_orig_mod" in module._modules
            for module in self._model.modules()
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._memories = [memory.twin() for memory in self._memories]

    def _require_the_same_layers(self) -> None:
        modules = self._model.modules()
        now = [m for m in modules if isinstance(m, (nn.RNNBase, RNNCellBase))]
        if now != [memory.module for memory in self._memories]:
            raise RuntimeError(
                "the model has other recurrent layers than when the stream was made: make another"
            )

    def _without_time(self, y: Any) -> Any:
        """A tensor that the model returned, without its time dimension."""
        time, batch = self._time, self._batch
        if time is None or self._keeps_time is False or not isinstance(y, Tensor):
            return y
        lead = (1,) if batch is None else (batch, 1) if time else (1, batch)
        has_time = y.shape[: len(lead)] == lead
        if self._keeps_time and not has_time:
            raise ValueError(f"expected a result of shape {lead} and more, got {tuple(y.shape)}")
        without = batch is None or y.shape[:1] == (batch,)  # and what follows are features
        if self._keeps_time is None and has_time and without and y.dim() == len(lead):
            raise ValueError(
                f"the model's result of shape {tuple(y.shape)} may have a time dimension or one "
                "feature: say keeps_time=True or keeps_time=False"
            )
        return y.squeeze(time) if has_time else y


class LayerStream(Stream):
    """The stream of one layer or cell: x [batch_size, I] and y [batch_size, out], or [I] and [out]
    without a batch size.

    Where the backend can, all but the arithmetic is done beforehand: it is chosen, sizes are
    checked and addresses taken. Weights are read where they are at every step, and when other
    tensors take their places (``layer.to(..)``, ``load_state_dict(assign=True)``,
    parametrizations) the next step notices. Layers whose weights are computed go the ordinary way;
    those with hooks, or a forward of their own, are called as modules are.
    """

    _model: Layers | Step

    def __init__(
        self,
        layer: Layers | Step,
        memories: list[Memory],
        batch: int | None,
        keeps_time: bool | None,
    ) -> None:
        time = None if isinstance(layer, Step) else int(batch is not None and layer.batch_first)
        keeps_time = time is not None if keeps_time is None else keeps_time
        super().__init__(layer, memories, batch, time, keeps_time)

    def __call__(self, x: Tensor) -> Tensor:
        """One step.

        Raises:
            ValueError: x is not of the expected shape, dtype or device.
        """
        if self._key_now() != self._key:
            self.refresh()
        if x.shape != self._shape or x.dtype is not self._dtype or x.device != self._device:
            raise ValueError(
                f"expected x of shape {self._shape}, {self._dtype} on {self._device}, "
                f"got {tuple(x.shape)}, {x.dtype} on {x.device}"
            )
        if self._steps is None:
            return self._unprepared(x)
        self._x.copy_(x.detach() if x.requires_grad else x)
        for step in self._steps:
            step()
        return self._y.clone()

    @property
    def states(self) -> Any:
        """A copy of h, or of (h, c), shaped as the layer or cell returns them. Assign to it to go
        on from other states."""
        return self._memory.states

    @states.setter
    def states(self, hx: Any) -> None:
        self._memory.states = hx

    def refresh(self) -> None:
        """Choose the backend and take addresses, dtype, device and the number of threads anew; the
        states stay as they are."""
        super().refresh()
        layer, memory = self._model, self._memory
        self._own = layer.__dict__  # with `forward`, if that is replaced on the instance
        self._hooks = (
            layer._forward_pre_hooks,
            layer._forward_hooks,
            *_torch.global_hooks,
        )
        self._key = self._key_now()
        self._intercepted = _INTERCEPTED in self._key or not _is_called_as_made(type(layer))
        # A hook may make the weights in a call only.
        weights = [] if self._intercepted else _flat_weights(layer)
        like = weights[0][0] if weights else next(layer.parameters())
        self._dtype, self._device = like.dtype, like.device
        memory.follow(like)
        lead = () if self._batch is None else (self._batch,)
        self._shape = (*lead, layer.input_size)
        with torch.inference_mode(False), torch.no_grad():
            self._input = like.new_zeros(1, self._batch or 1, layer.input_size)
            self._x, self._y = self._input.view(self._shape), memory.carried[0][-1].view(*lead, -1)
        self._steps = None
        if not self._intercepted:
            self._run()  # checks what is not checked here
            self._steps = self._prepared(weights)

    def __getstate__(self) -> dict[str, Any]:
        unseen: dict[str, Any] = {"_key": None, "_own": {}, "_hooks": ((),) * 4, "_steps": None}
        return self.__dict__ | unseen  # so that the next step looks anew

    @property
    def _memory(self) -> Memory:
        return self._memories[0]

    def _key_now(self) -> list[int]:
        """What differs once other weights are in place, or hooks have come or gone."""
        weights = self._model._parameters.values()
        try:
            key = [*map(_address, weights)]
        except TypeError:  # a cell without biases has None in their places
            key = [_address(w) for w in weights if w is not None]
        a, b, c, d = self._hooks
        if a or b or c or d or "forward" in self._own:
            key.append(_INTERCEPTED)
        return key

    def _unprepared(self, x: Tensor) -> Tensor:
        if self._intercepted:
            return super().__call__(x)  # type: ignore[no-any-return]
        self._x.copy_(x.detach() if x.requires_grad else x)
        self._memory.keep(self._run())
        return self._y.clone()

    def _prepared(self, weights: list[list[Any]]) -> list[Callable[[], None]] | None:
        """A call for each layer, or None where not all can be prepared."""
        steps = []
        x = self._input
        for k, flat in enumerate(weights):
            h, c = [*(s[k : k + 1] for s in self._memory.carried), None][:2]
            assert h is not None
            held = [None if w is None else w.detach() for w in flat]
            inputs = Inputs(x, None, None, None, (h, c, None, None), held)
            problem = ops.describe(self._model._cell, inputs, (False,), x.shape[1], False, False)
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
            cell, weights = self._model._cell, _flat_weights(self._model)
            return functional.stack(cell, self._input, self._memory.carried, weights)[1]

    def _without_time(self, y: Any) -> Any:
        # A layer's result is (y, states), a cell's h or (h, c).
        return super()._without_time(y[0] if isinstance(y, (tuple, list)) else y)


_address: Callable[[Any], int] = Tensor.data_ptr
_INTERCEPTED = -1  # no address
_FORWARDS = (Layers.forward, RNNCell.forward, LSTMCell.forward, GRUCell.forward)


def _is_called_as_made(kind: type[nn.Module]) -> bool:
    """Whether no subclass has changed what a call of a layer or cell does."""
    forward: Any = kind.forward
    return forward in _FORWARDS and kind.__call__ is nn.Module.__call__


def _flat_weights(layer: Layers | Step) -> list[list[Any]]:
    """A list of weights for each layer; a cell is one."""
    return [layer._weights()] if isinstance(layer, Step) else layer._weights()


def _stays(weight: Tensor | None) -> bool:
    """Whether a weight is read where it lies, and not a copy or computed for each call."""
    if weight is None:
        return True
    return type(weight) is torch.nn.Parameter and weight.is_contiguous() and all_plain((weight,))
