"""Turn the torch.nn recurrent layers of a model into fastrnn's, and back; tell which are which."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils import parametrize

from . import modules
from .modules.identity import derived_from

_TO_FAST: dict[type, type] = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: modules.RNNCell,
    nn.LSTMCell: modules.LSTMCell,
    nn.GRUCell: modules.GRUCell,
}
_TO_TORCH = {fast: theirs for theirs, fast in _TO_FAST.items()}
_NAMES = {kind.__name__ for kind in _TO_FAST}

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` makes of one recurrent layer or cell.

    Attributes:
        name: of the layer in the model; empty for the model itself.
        kind: the name of its class.
        fast: whether it is fastrnn's.
        reason: why convert() passes over a layer that is not; empty for one that it would convert.
    """

    name: str
    kind: str
    fast: bool
    reason: str = ""

    def __str__(self) -> str:
        name = self.name or "(the model)"
        if self.reason:
            return f"{name}: {self.kind}, passed over: {self.reason}"
        return f"{name}: {self.kind}, {'fastrnn' if self.fast else 'torch.nn'}"


class Conversions(tuple[Conversion, ...]):
    """One :class:`Conversion` a layer, printed one a line."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "no recurrent layers"

    __str__ = __repr__


def convert(module: M, *, verbose: bool = False) -> M:
    """Make every torch.nn recurrent layer and cell inside `module` a fastrnn one, in place.

    The layers stay the same objects with the same Parameters, buffers, hooks, flags and attributes:
    only their class changes, so optimizers, references held elsewhere and checkpoints go on
    working. `module`, which is returned, may itself be a layer. Parametrized layers are converted.
    :func:`revert` undoes it.

    Passed over, with a UserWarning that says why, are subclasses of torch.nn's layers, which may
    override what fastrnn would replace; layers that torch.jit or torch.ao.quantization has made
    something else of; and layers whose ``forward`` has been replaced on the instance, by what would
    go on calling torch.nn's. :func:`converted` lists them, and `verbose` prints that list.

    ``isinstance(layer, torch.nn.LSTM)`` holds before and after; ``type(layer)`` is
    :class:`fastrnn.LSTM`, no subclass of torch.nn's, from then on."""
    for _, layer in _recurrent(module):
        if not _is_fast(layer) and not _obstacle(layer):
            _exchange(layer, _TO_FAST)
    table = converted(module)
    passed_over = [str(one) for one in table if one.reason]
    if passed_over:
        warnings.warn("fastrnn.convert: " + "; ".join(passed_over), stacklevel=2)
    if verbose:
        print(table)
    return module


def converted(module: nn.Module) -> Conversions:
    """Which recurrent layers and cells inside `module` are fastrnn's, and why the others are not.

    >>> import torch, fastrnn
    >>> model = fastrnn.convert(torch.nn.Sequential(torch.nn.LSTM(4, 6), torch.nn.Linear(6, 2)))
    >>> fastrnn.converted(model)
    0: LSTM, fastrnn
    """
    return Conversions(
        Conversion(name, _kind(layer), _is_fast(layer), "" if _is_fast(layer) else _obstacle(layer))
        for name, layer in _recurrent(module)
    )


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
    for layer in module.modules():
        _exchange(layer, _TO_TORCH)
    return module


def _recurrent(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.RNNBase, RNNCellBase)) or _is_made_into_something_else(layer):
            yield name, layer


def _is_made_into_something_else(layer: nn.Module) -> bool:
    if _kind(layer) not in _NAMES:
        return False
    return isinstance(layer, torch.jit.ScriptModule) or _is_quantized(layer)


def _is_quantized(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("torch.ao.nn.")


def _kind(layer: nn.Module) -> str:
    name: str = getattr(layer, "original_name", type(layer).__name__)  # of a ScriptModule
    return name


def _is_fast(layer: nn.Module) -> bool:
    return isinstance(layer, (modules.Layers, modules.Step))


def _obstacle(layer: nn.Module) -> str:
    """Why convert() passes over a recurrent layer that is not fastrnn's, or nothing."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "torch.jit has compiled it; convert the model before"
    if _is_quantized(layer):
        return "it is torch.ao's, quantized or to be"
    if _counterpart(layer, _TO_FAST) is None:
        base = next((kind for kind in type(layer).__mro__ if kind in _TO_FAST), None)
        if base is None:
            return "a kind of layer that torch.nn does not have"
        return (
            f"a subclass of torch.nn.{base.__name__}, which may override what would be replaced; "
            f"derive it from fastrnn.{base.__name__}"
        )
    if "forward" in vars(layer) and not any(
        _rebound(value, layer, type(layer)) for value in vars(layer).values()
    ):
        return "its forward has been replaced on the instance; convert the model before"
    return ""


def _exchange(layer: nn.Module, classes: dict[type, type]) -> None:
    old, new = type(layer), _counterpart(layer, classes)
    if new is None:
        return
    layer.__class__ = new
    for name, value in list(vars(layer).items()):
        method = _rebound(value, layer, old)
        if method is not None:
            vars(layer)[name] = method
    if isinstance(layer, nn.RNNBase):
        layer.flatten_parameters()  # for cuDNN, if it is torch's now


def _rebound(value: object, layer: nn.Module, kind: type) -> Any:
    """A method of `kind` that has been bound to `layer` and kept, as accelerate keeps the forward
    that it wraps, or a partial call of one: the same of the layer's class. None for other values.
    """
    if isinstance(value, functools.partial):
        method = _rebound(value.func, layer, kind)
        return method and functools.partial(method, *value.args, **value.keywords)
    if not isinstance(value, MethodType) or value.__self__ is not layer:
        return None
    name = value.__name__
    if value.__func__ is not getattr(kind, name, None):
        return None
    return getattr(type(layer), name).__get__(layer)


def _counterpart(layer: nn.Module, classes: dict[type, type]) -> type | None:
    kind: type[Any] = type(layer)
    if kind in classes:
        return classes[kind]
    base = kind.__bases__[0]
    if base not in classes or not parametrize.is_parametrized(layer):
        return None
    # parametrize gives each layer a class of its own, with the properties that compute its weights.
    return derived_from((classes[base],), kind)
