"""Which class a layer is, to code that asks."""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import io
import pickle
from abc import ABC
from typing import Any

import pytest
import torch
from helpers import LAYERS, STEPS, TORCH
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils import parametrizations, parametrize

import fastrnn

EVERYTHING: list[Any] = [case.values for case in [*LAYERS, *STEPS]]
everything = pytest.mark.parametrize(("torch_kind", "kind", "options"), [*LAYERS, *STEPS])
layers = pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
T, B, I, H = 5, 3, 4, 6


class Asks(nn.Module):
    """Its forward depends on the class of its layer."""

    def __init__(self, kind: type[nn.Module], asked: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.layer = kind(I, H, **options)
        self.asked = asked

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, self.asked):
            y: Tensor = self.layer(x)[0]
            return y
        return x


def test_a_layer_is_both_libraries() -> None:
    for torch_kind, kind, options in EVERYTHING:
        for module in (kind(I, H, **options), fastrnn.convert(torch_kind(I, H, **options))):
            assert type(module) is kind
            assert isinstance(module, torch_kind)
            assert isinstance(module, kind)
            base = nn.RNNBase if issubclass(torch_kind, nn.RNNBase) else RNNCellBase
            assert isinstance(module, base)
            for other, other_kind, _ in EVERYTHING:
                if other is not torch_kind:
                    assert not isinstance(module, (other, other_kind))
        assert not isinstance(torch_kind(I, H, **options), kind)


@everything
def test_the_class_that_a_layer_answers(torch_kind: Any, kind: Any, options: Any) -> None:
    layer = kind(I, H, **options)
    assert issubclass(layer.__class__, torch_kind)
    assert issubclass(layer.__class__, kind)
    assert layer.__class__.__name__ == kind.__name__
    assert pickle.loads(pickle.dumps(layer.__class__)) is layer.__class__
    again = layer.__class__(I, H, **options)
    assert type(again) is kind
    layer.__class__ = layer.__class__
    assert type(layer) is kind
    layer.__class__ = torch_kind
    assert type(layer) is torch_kind


def test_single_dispatch_finds_the_nearest() -> None:
    name = functools.singledispatch(lambda _: "none")
    name.register(nn.LSTM)(lambda _: "torch.nn")
    assert name(fastrnn.LSTM(2, 3)) == "torch.nn"
    name.register(fastrnn.LSTM)(lambda _: "fastrnn")
    assert name(fastrnn.LSTM(2, 3)) == "fastrnn"
    assert name(nn.LSTM(2, 3)) == "torch.nn"


def test_initialisation_by_class() -> None:
    def initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.LSTM, nn.GRUCell)):
            for weight in module.parameters():
                nn.init.constant_(weight, 0.5)

    model = nn.Sequential(fastrnn.LSTM(I, H), fastrnn.GRUCell(I, H), fastrnn.GRU(I, H))
    kept = [p.clone() for p in model[2].parameters()]
    model.apply(initialise)
    assert all((p == 0.5).all() for module in model[:2] for p in module.parameters())
    assert all(map(torch.equal, model[2].parameters(), kept))


@everything
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(torch_kind: Any, kind: Any, options: Any, protocol: int) -> None:
    layer = kind(I, H, **options)
    again = pickle.loads(pickle.dumps(layer, protocol))
    assert type(again) is kind
    assert all(map(torch.equal, again.parameters(), layer.parameters()))


@everything
def test_pickles_made_before_layers_answered_for_torch(
    torch_kind: Any, kind: Any, options: Any
) -> None:
    """pickle wrote ``copyreg.__newobj__`` of the class and the state then."""
    layer = kind(I, H, **options)

    class Old:
        __class__ = property(lambda _: kind)  # type: ignore[assignment]

        def __reduce_ex__(self, protocol: Any) -> Any:
            return copyreg.__newobj__, (kind,), layer.__reduce_ex__(2)[2]  # type: ignore[attr-defined]

    again = pickle.loads(pickle.dumps(Old()))
    assert type(again) is kind
    assert all(map(torch.equal, again.parameters(), layer.parameters()))


@everything
def test_torch_load_of_weights_and_allowed_classes_only(
    torch_kind: Any, kind: Any, options: Any
) -> None:
    layer, file = kind(I, H, **options), io.BytesIO()
    torch.save(layer, file)
    with torch.serialization.safe_globals([kind, set]):
        again = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert type(again) is kind
    assert all(map(torch.equal, again.parameters(), layer.parameters()))


def test_a_pickle_makes_layers_only() -> None:
    from fastrnn.modules import identity

    with pytest.raises(TypeError, match="Linear is not a class of fastrnn's layers"):
        identity.make(nn.Linear)  # type: ignore[arg-type]


class Mine(fastrnn.LSTM):
    made = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__class__.made += 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_subclass_answers_for_itself() -> None:
    layer = Mine(I, H)
    assert layer.__class__ is Mine
    assert Mine.made == 1
    assert repr(layer) == "Mine(4, 6)"
    assert type(pickle.loads(pickle.dumps(layer))) is Mine
    assert type(copy.deepcopy(layer)) is Mine
    assert layer(torch.randn(T, B, I))[0].shape == (T, B, H)


@everything
def test_classes_derived_from_the_answer(torch_kind: Any, kind: Any, options: Any) -> None:
    """As parametrizations make them, which set attributes on the class that a layer answers."""
    layer = kind(I, H, **options)
    name = "weight_hh_l0" if issubclass(kind, nn.RNNBase) else "weight_hh"
    parametrizations.weight_norm(layer, name)
    assert isinstance(layer, kind)
    assert type(layer).__bases__ == (kind,)
    assert not hasattr(torch_kind, name)
    assert not hasattr(layer.__class__.__bases__[0], name)
    assert type(copy.deepcopy(layer)).__bases__ == (kind,)
    parametrize.remove_parametrizations(layer, name)
    assert type(layer) is kind


class Marked:
    """An ordinary base class of a user's."""


@everything
@pytest.mark.parametrize("others", [(), (Marked,), (ABC,)], ids=["alone", "mixed", "ABC"])
def test_a_user_derives_a_class_from_the_answer(
    torch_kind: Any, kind: Any, options: Any, others: tuple[type, ...]
) -> None:
    answered = kind(I, H, **options).__class__

    class Derived(*others, answered):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().forward(*args, **kwargs)

    layer, x = Derived(I, H, **options), torch.randn(B, I)
    assert type(layer) is layer.__class__ is Derived
    assert Derived.__bases__ == (*others, kind)
    assert issubclass(Derived, answered)
    assert isinstance(layer, answered)
    assert repr(layer).startswith("Derived(4, 6")
    expected = answered.forward(layer, x)
    for copied in (layer, copy.copy(layer), copy.deepcopy(layer)):
        assert type(copied) is Derived
        torch.testing.assert_close(copied(x), expected)
        assert copied.calls == 1
    assert fastrnn.revert(fastrnn.convert(layer)) is layer
    assert type(layer) is Derived
    name = "weight_hh_l0" if issubclass(kind, nn.RNNBase) else "weight_hh"
    parametrizations.weight_norm(layer, name)
    assert type(layer).__bases__ == (Derived,)
    torch.testing.assert_close(layer(x), expected)


Answered: Any = fastrnn.LSTM(1, 1).__class__


class OfTheAnswer(Answered):
    """What pickle finds by its name."""


def test_pickle_of_a_class_derived_from_the_answer() -> None:
    layer = OfTheAnswer(I, H)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(layer, protocol))
        assert type(again) is OfTheAnswer
        assert all(map(torch.equal, again.parameters(), layer.parameters()))


@layers
def test_a_class_derived_from_the_answer_compiles(torch_kind: Any, kind: Any, options: Any) -> None:
    torch.compiler.reset()
    answered = kind(I, H, **options).__class__
    derived, x = type("Derived", (answered,), {}), torch.randn(T, B, I)
    layer = derived(I, H, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@everything
def test_layers_made_of_the_answer(torch_kind: Any, kind: Any, options: Any) -> None:
    layer = kind(I, H, **options)
    answered = layer.__class__
    assert inspect.signature(answered) == inspect.signature(kind)
    assert type(torch.nn.utils.skip_init(answered, I, H, **options)) is kind
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        answered()
    empty = answered.__new__(answered)
    assert type(empty) is kind
    empty.__dict__.update(layer.__dict__)
    x = torch.randn(B, I)
    torch.testing.assert_close(empty(x), layer(x))


def test_whose_instances_the_answer_knows() -> None:
    layer = fastrnn.LSTM(I, H)
    answered = layer.__class__
    assert isinstance(layer, answered)
    assert isinstance(Mine(I, H), answered)
    assert issubclass(answered, answered)
    assert issubclass(fastrnn.LSTM, answered)
    for other in (nn.LSTM(I, H), fastrnn.GRU(I, H), fastrnn.LSTMCell(I, H)):
        assert not isinstance(other, answered)


@layers
@pytest.mark.parametrize("asks", ["torch.nn", "fastrnn"])
def test_compiled_code_gets_the_same_answer(
    torch_kind: Any, kind: Any, options: Any, asks: str
) -> None:
    torch.compiler.reset()
    model = Asks(kind, torch_kind if asks == "torch.nn" else kind, **options)
    x = torch.randn(T, B, I)
    expected = model(x)
    assert expected.shape == (T, B, H)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    other = nn.GRU if torch_kind is nn.LSTM else nn.LSTM
    refused = torch.compile(Asks(kind, other, **options), fullgraph=True, backend="eager")
    assert torch.equal(refused(x), x)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_code_gets_the_same_answer(strict: bool) -> None:
    model, x = Asks(fastrnn.GRU, nn.GRU), torch.randn(T, B, I)
    program = torch.export.export(model, (x,), strict=strict)
    # Strict export of torch 2.9 and before goes by the type of a module: see docs/versions.md.
    expected = x if strict and TORCH < (2, 10) else model(x)
    torch.testing.assert_close(program.module()(x), expected)
