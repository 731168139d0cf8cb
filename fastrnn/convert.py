"""Turn the torch.nn recurrent layers of a model into fastrnn's, and back."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from . import modules

_TO_FAST: dict[type, type] = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: modules.RNNCell,
    nn.LSTMCell: modules.LSTMCell,
    nn.GRUCell: modules.GRUCell,
}
_TO_TORCH = {fast: theirs for theirs, fast in _TO_FAST.items()}

M = TypeVar("M", bound=nn.Module)


def convert(module: M) -> M:
    """Make every torch.nn recurrent layer and cell inside `module` a fastrnn one, in place.

    The layers stay the same objects with the same Parameters, buffers, hooks, flags and attributes:
    only their class changes, so optimizers, references held elsewhere and checkpoints go on
    working. `module`, which is returned, may itself be a layer. Subclasses of torch.nn's layers are
    left alone, because they may override what fastrnn would replace; parametrized layers are
    converted. :func:`revert` undoes it.

    ``isinstance(layer, torch.nn.LSTM)`` holds before and after; ``type(layer)`` is
    :class:`fastrnn.LSTM`, no subclass of torch.nn's, from then on."""
    return _exchange(module, _TO_FAST)


def revert(module: M) -> M:
    """Undo :func:`convert`: make every fastrnn layer and cell inside `module` a torch.nn one, in
    place.

    Raises:
        ValueError: a layer uses an option that torch.nn does not have; nothing has been changed.
    """
    for name, layer in module.named_modules():
        used = [o for o in modules.OWN_OPTIONS if getattr(layer, o, None)]
        if used and _counterpart(layer, _TO_TORCH) is not None:
            where = f" {name!r}" if name else ""
            raise ValueError(
                f"torch.nn has no {used[0]}, which layer{where} uses: turn it off before revert()"
            )
    return _exchange(module, _TO_TORCH)


def _exchange(module: M, classes: dict[type, type]) -> M:
    for layer in module.modules():
        new = _counterpart(layer, classes)
        if new is not None:
            layer.__class__ = new
            if isinstance(layer, nn.RNNBase):
                layer.flatten_parameters()  # for cuDNN, if it is torch's now
    return module


def _counterpart(layer: nn.Module, classes: dict[type, type]) -> type | None:
    kind: type[Any] = type(layer)
    if kind in classes:
        return classes[kind]
    base = kind.__bases__[0]
    if base not in classes or not parametrize.is_parametrized(layer):
        return None
    # parametrize gives each layer a class of its own, with the properties that compute its weights.
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__", "__doc__")}
    return type(kind.__name__, (classes[base],), own)
