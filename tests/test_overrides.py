"""A ``__torch_function__`` that fastrnn does not know: torch.nn's forward serves."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import pytest
import torch
from helpers import LAYERS, STEPS
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map

import fastrnn
from fastrnn.plain import OverriddenError, stop_at_overrides

everything = pytest.mark.parametrize(("torch_kind", "kind", "options"), [*LAYERS, *STEPS])
layers = pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
T, B, I, H = 5, 3, 4, 6

FUSED = {"rnn_tanh", "rnn_relu", "lstm", "gru"}


class Watching(Tensor):
    """Takes down which functions of torch it goes through."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


class Plain(Tensor):
    """A subclass without a behaviour of its own."""


class Holds:
    """No tensor, but it says what torch's functions do with it: what they do with the one held."""

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __getattr__(self, name: str) -> Any:
        return getattr(self.held, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda v: v.held if isinstance(v, cls) else v, (args, kwargs or {}))
        return func(*args, **kwargs)


def an_input(module: nn.Module) -> Tensor:
    return torch.randn(T, B, I) if isinstance(module, nn.RNNBase) else torch.randn(B, I)


def twins(torch_kind: Any, kind: Any, options: Any) -> tuple[nn.Module, nn.Module]:
    theirs, ours = torch_kind(I, H, **options), kind(I, H, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_equal(found: Any, expected: Any) -> None:
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    assert all(torch.equal(f.as_subclass(Tensor), e.as_subclass(Tensor)) for f, e in pairs)


@everything
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_input_that_watches(
    torch_kind: Any, kind: Any, options: Any, dtype: torch.dtype | None
) -> None:
    if dtype is not None and torch_kind is nn.LSTM:
        return  # oneDNN has no such LSTM where the CPU has no bfloat16
    theirs, ours = twins(torch_kind, kind, options)
    x = an_input(ours).as_subclass(Watching)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        expected = theirs(x)
        Watching.seen.clear()
        assert_equal(ours(x), expected)
    assert any(name.removesuffix("_cell") in FUSED for name in Watching.seen)


@everything
def test_a_weight_that_watches(torch_kind: Any, kind: Any, options: Any) -> None:
    theirs, ours = twins(torch_kind, kind, options)
    x = an_input(ours)
    for name, weight in theirs.named_parameters():
        given = {name: weight.detach().as_subclass(Watching)}
        expected = torch.func.functional_call(theirs, given, (x,))
        Watching.seen.clear()
        assert_equal(torch.func.functional_call(ours, given, (x,)), expected)
        assert any(seen.removesuffix("_cell") in FUSED for seen in Watching.seen)


@pytest.mark.parametrize("num_layers", [1, 2])
@layers
def test_states_that_watch(torch_kind: Any, kind: Any, options: Any, num_layers: int) -> None:
    theirs, ours = twins(torch_kind, kind, {**options, "num_layers": num_layers})
    h = torch.randn(num_layers, B, H).as_subclass(Watching)
    hx = (h, h) if torch_kind is nn.LSTM else h
    x = torch.randn(T, B, I)
    expected = theirs(x, hx)
    Watching.seen.clear()
    assert_equal(ours(x, hx), expected)
    assert FUSED & set(Watching.seen)


@layers
def test_packed_data_that_watches(torch_kind: Any, kind: Any, options: Any) -> None:
    theirs, ours = twins(torch_kind, kind, options)
    data, sizes, *order = pack_padded_sequence(torch.randn(T, B, I), [T, 3, 1])
    packed = PackedSequence(data.as_subclass(Watching), sizes, *order)
    expected = theirs(packed)[0].data
    Watching.seen.clear()
    assert_equal(ours(packed)[0].data, expected)
    assert FUSED & set(Watching.seen)


@everything
def test_an_input_that_is_no_tensor(torch_kind: Any, kind: Any, options: Any) -> None:
    theirs, ours = twins(torch_kind, kind, options)
    x = an_input(ours)
    assert_equal(ours(Holds(x)), theirs(Holds(x)))


@pytest.mark.parametrize("batch_first", [False, True])
@layers
def test_expanded_weights(torch_kind: Any, kind: Any, options: Any, batch_first: bool) -> None:
    if torch_kind is nn.LSTM:  # without a projection torch takes oneDNN's, which they do not know
        options = {**options, "proj_size": 2}
    theirs, ours = twins(torch_kind, kind, {**options, "batch_first": batch_first})
    x = torch.randn(B, T, I) if batch_first else torch.randn(T, B, I)
    for module in (theirs, ours):
        call = call_for_per_sample_grads(module, batch_size=B, batch_first=batch_first)
        call(x)[0].square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.grad_sample.shape == (B, *p.shape)
        torch.testing.assert_close(p.grad_sample, q.grad_sample)


@everything
def test_what_overrides_nothing_stays_with_the_kernels(
    torch_kind: Any, kind: Any, options: Any
) -> None:
    _, ours = twins(torch_kind, kind, options)
    x = an_input(ours)
    with fastrnn.backend("cpu"):  # a plain step in training might be torch's
        plain = tree_leaves(ours(x))[0]
        subclassed = tree_leaves(ours(x.as_subclass(Plain)))[0]
    assert torch.equal(subclassed.as_subclass(Tensor), plain)
    stop_at_overrides((x, x.as_subclass(Plain), nn.Parameter(x), nn.Buffer(x), None))


@pytest.mark.parametrize(
    ("options", "given", "name"),
    [
        ({}, {"lengths": torch.tensor([5, 2, 0])}, "lengths"),
        ({}, {"reset": torch.zeros(T, B, dtype=torch.bool)}, "reset"),
        ({"weight_dropout": 0.5}, {}, "weight_dropout"),
        ({"return_states": True}, {}, "return_states"),
    ],
)
def test_what_torch_nn_does_not_have_is_refused(options: Any, given: Any, name: str) -> None:
    layer = fastrnn.LSTM(I, H, **options)
    text = f"Watching has a __torch_function__ that fastrnn does not know; .* has no {name}"
    with pytest.raises(TypeError, match=text):
        layer(torch.randn(T, B, I).as_subclass(Watching), **given)


def test_explain_says_who_serves() -> None:
    layer, x = fastrnn.GRU(I, H), torch.randn(T, B, I)
    text = "torch.nn's forward serves: Watching has a __torch_function__ that fastrnn does not know"
    watched = x.as_subclass(Watching)
    packed = PackedSequence(watched[:, 0], torch.ones(T, dtype=torch.int64))
    for given in (watched, packed):
        explanations = fastrnn.explain(layer, given)
        assert not explanations
        assert str(explanations) == text
    model = nn.Sequential(layer)
    assert str(fastrnn.explain(model, watched)) == f"0: {text}"
    assert fastrnn.explain(model, x)[0].serves
    assert fastrnn.explain(layer, x.as_subclass(Plain))[0].serves


def test_functions_of_fastrnn_say_what_they_do_not_know() -> None:
    x = torch.randn(T, B, I).as_subclass(Watching)
    text = re.escape("Watching has a __torch_function__ that fastrnn does not know")
    with pytest.raises(OverriddenError, match=text):
        fastrnn.functional.layer("gru", x, None, fastrnn.GRU(I, H)._weights()[0])
