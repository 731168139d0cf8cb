"""Weights as people use them: parametrized, normed, dropped, tied, frozen, given from outside."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from helpers import LAYERS, STEPS
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastrnn

layers = pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
everything = pytest.mark.parametrize(("torch_kind", "kind", "options"), [*LAYERS, *STEPS])
T, B, I, H = 5, 3, 4, 6


def first(result: Any) -> Tensor:
    """A layer's output, or a cell's h."""
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor


def an_input(module: nn.Module) -> Tensor:
    return torch.randn(T, B, I) if isinstance(module, nn.RNNBase) else torch.randn(B, I)


@everything
def test_functional_call(torch_kind: Any, kind: Any, options: Any) -> None:
    theirs, ours = torch_kind(I, H, **options), kind(I, H, **options)
    given = {n: torch.randn_like(p).requires_grad_() for n, p in ours.named_parameters()}
    x = an_input(ours)
    found = first(torch.func.functional_call(ours, given, (x,)))
    expected = first(torch.func.functional_call(theirs, given, (x,)))
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(found.sum(), list(given.values()))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), list(given.values())))
    assert all(p.grad is None for p in ours.parameters())


@everything
def test_parametrized_weight(torch_kind: Any, kind: Any, options: Any) -> None:
    name = "weight_hh_l0" if isinstance(kind(I, H, **options), nn.RNNBase) else "weight_hh"
    theirs, ours = torch_kind(I, H, **options), kind(I, H, **options)
    ours.load_state_dict(theirs.state_dict())
    x = an_input(ours)
    for module in (theirs, ours):
        parametrizations.weight_norm(module, name)
        with torch.no_grad():
            module.parametrizations[name].original0.mul_(0.5)
    with parametrize.cached():
        torch.testing.assert_close(first(ours(x)), first(theirs(x)))
    found, expected = first(ours(x)), first(theirs(x))
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@layers
def test_old_weight_norm(torch_kind: Any, kind: Any, options: Any) -> None:
    theirs, ours = torch_kind(I, H, **options), kind(I, H, **options)
    ours.load_state_dict(theirs.state_dict())
    x = an_input(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (theirs, ours):
            nn.utils.weight_norm(module, "weight_ih_l0")
    for _ in range(2):
        found, expected = ours(x)[0], theirs(x)[0]
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        expected.sum().backward()
        for module in (theirs, ours):
            torch.optim.SGD(module.parameters(), lr=0.1).step()


@layers
def test_weight_drop(torch_kind: Any, kind: Any, options: Any) -> None:
    """A weight that is a plain tensor, computed anew before every call."""
    theirs, ours = torch_kind(I, H, **options), kind(I, H, **options)
    ours.load_state_dict(theirs.state_dict())
    x = an_input(ours)
    for module in (theirs, ours):
        raw = module.weight_hh_l0
        del module._parameters["weight_hh_l0"]
        module.register_parameter("weight_hh_l0_raw", raw)
    for seed in range(3):
        outputs = []
        for module in (theirs, ours):
            torch.manual_seed(seed)
            dropped = nn.functional.dropout(module.weight_hh_l0_raw, 0.5)
            module.weight_hh_l0 = dropped
            outputs.append(module(x)[0])
            module.zero_grad()
            outputs[-1].sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0])
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


@layers
def test_a_replaced_parameter_is_used_at_once(torch_kind: Any, kind: Any, options: Any) -> None:
    ours = kind(I, H, **options)
    x = an_input(ours)
    before = ours(x)[0]
    ours.weight_ih_l0 = nn.Parameter(torch.zeros_like(ours.weight_ih_l0))
    replaced = ours(x)[0]
    assert not torch.equal(replaced, before)
    ours._parameters["weight_ih_l0"] = nn.Parameter(torch.ones_like(ours.weight_ih_l0))
    assert not torch.equal(ours(x)[0], replaced)
    with torch.no_grad():
        ours.weight_ih_l0.zero_()
    assert torch.equal(ours(x)[0], replaced)
    ours.weight_ih_l0.data = torch.ones_like(ours.weight_ih_l0)
    assert not torch.equal(ours(x)[0], replaced)


@layers
def test_weights_shared_by_two_layers(torch_kind: Any, kind: Any, options: Any) -> None:
    a, b = kind(I, H, **options), kind(I, H, **options)
    for name in dict(a.named_parameters()):
        setattr(b, name, getattr(a, name))
    x = an_input(a)
    assert torch.equal(a(x)[0], b(x)[0])
    (a(x)[0] + b(x)[0]).sum().backward()
    both = a.weight_hh_l0.grad.clone()
    a.zero_grad()
    a(x)[0].sum().backward()
    torch.testing.assert_close(both, 2 * a.weight_hh_l0.grad)


@everything
def test_frozen_weights_with_input_gradients(torch_kind: Any, kind: Any, options: Any) -> None:
    theirs, ours = torch_kind(I, H, **options), kind(I, H, **options)
    ours.load_state_dict(theirs.state_dict())
    data, grads = an_input(ours), []
    for module in (theirs, ours):
        module.requires_grad_(False)
        x = data.clone().requires_grad_()
        first(module(x)).sum().backward()
        grads.append(x.grad)
        assert all(p.grad is None for p in module.parameters())
    torch.testing.assert_close(grads[1], grads[0])
    single = next(iter(ours.parameters())).requires_grad_()
    first(ours(data)).sum().backward()
    assert single.grad is not None


@layers
@pytest.mark.parametrize("how", ["spectral_norm", "orthogonal", "weight_norm"])
def test_every_recurrent_weight_parametrized(
    torch_kind: Any, kind: Any, options: Any, how: str
) -> None:
    """Two layers in two directions, trained for three steps; in eval mode, where spectral_norm does
    not go on iterating at every access of a weight."""
    args = {"num_layers": 2, "bidirectional": True, **options}
    theirs = torch_kind(I, H, dtype=torch.float64, **args)
    ours = fastrnn.convert(copy.deepcopy(theirs))
    x = an_input(ours).double()
    for module in (theirs, ours):
        torch.manual_seed(0)
        for name in [n for n, _ in module.named_parameters() if n.startswith("weight_hh")]:
            getattr(parametrizations, how)(module, name)
        module.eval()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x)[0].square().sum().backward()
            optimizer.step()
    assert parametrize.is_parametrized(ours, "weight_hh_l1_reverse")
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@layers
def test_parametrized_and_compiled(torch_kind: Any, kind: Any, options: Any) -> None:
    torch._dynamo.reset()
    layer = parametrizations.weight_norm(kind(I, H, **options), "weight_hh_l0")
    x = an_input(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x)[0].square().sum(), list(layer.parameters()))
    expected = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    torch.testing.assert_close(found, expected)


@layers
def test_weights_tied_between_directions(torch_kind: Any, kind: Any, options: Any) -> None:
    """One Parameter under two names gets the sum of both gradients."""
    theirs = torch_kind(I, H, bidirectional=True, **options)
    ours = kind(I, H, bidirectional=True, **options)
    ours.load_state_dict(theirs.state_dict())
    x = an_input(ours)
    for module in (theirs, ours):
        for name in ("weight_hh_l0", "bias_ih_l0"):
            setattr(module, f"{name}_reverse", getattr(module, name))
        module(x)[0].square().sum().backward()
    assert len(list(ours.parameters())) == 6
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def recurrent(layer: nn.RNNBase) -> list[str]:
    return [name for name, _ in layer.named_parameters() if name.startswith("weight_hh")]


@layers
def test_weight_dropout_is_dropout_of_the_recurrent_weights(
    torch_kind: Any, kind: Any, options: Any
) -> None:
    """The same as torch.nn's layer over weights that torch has dropped from the same seed, in
    every layer and direction; gradients reach what was kept, scaled."""
    args = {"num_layers": 2, "bidirectional": True, **options}
    theirs = torch_kind(I, H, **args)
    ours = kind(I, H, weight_dropout=0.4, **args)
    ours.load_state_dict(theirs.state_dict())
    x = an_input(ours)
    torch.manual_seed(5)
    found, _ = ours(x)
    torch.manual_seed(5)
    dropped = {n: nn.functional.dropout(getattr(theirs, n), 0.4) for n in recurrent(theirs)}
    expected, _ = torch.func.functional_call(theirs, dropped, (x,))
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
        if name in dropped:
            assert ((dropped[name] != 0) | (p.grad == 0)).all()


@layers
def test_weight_dropout_draws_a_mask_a_call(torch_kind: Any, kind: Any, options: Any) -> None:
    layer = kind(I, H, weight_dropout=0.5, **options)
    plain = kind(I, H, **options)
    plain.load_state_dict(layer.state_dict())
    x = an_input(layer)
    torch.manual_seed(1)
    one, two = layer(x)[0], layer(x)[0]
    torch.manual_seed(1)
    assert torch.equal(layer(x)[0], one)
    assert not torch.equal(one, two)
    assert torch.equal(one[0], layer(x)[0][0])  # the first step has no recurrent input
    torch.manual_seed(1)
    fastrnn.explain(layer, x)
    assert torch.equal(layer(x)[0], one)
    assert torch.equal(layer.eval()(x)[0], plain(x)[0])
    one_step, _ = layer.train()(x, lengths=torch.tensor([1, 1, 1]))
    torch.testing.assert_close(one_step[0], plain(x)[0][0])


def test_weight_dropout_of_everything_and_with_a_projection() -> None:
    layer = fastrnn.LSTM(I, H, 2, proj_size=2, weight_dropout=1.0)
    x = torch.randn(T, B, I, requires_grad=True)
    layer(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert (layer.weight_hh_l0.grad == 0).all()
    assert (layer.weight_hr_l0.grad != 0).any()


@layers
def test_weight_dropout_is_an_option_like_the_others(
    torch_kind: Any, kind: Any, options: Any
) -> None:
    layer = kind(I, H, weight_dropout=0.25, **options)
    assert repr(layer).endswith(", weight_dropout=0.25)")
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.weight_dropout == 0.25
    assert "weight_dropout" not in vars(kind(I, H, weight_dropout=0, **options))
    assert list(layer.state_dict()) == list(torch_kind(I, H, **options).state_dict())
    for wrong in (-0.1, 1.1, True, float("nan")):
        with pytest.raises(ValueError, match="weight_dropout should be a number in range"):
            kind(I, H, weight_dropout=wrong, **options)


def test_revert_refuses_what_torch_lacks() -> None:
    model = nn.Sequential(fastrnn.GRU(I, H), fastrnn.LSTM(H, H, return_states=True))
    with pytest.raises(ValueError, match=r"torch\.nn has no return_states, which layer '1' uses"):
        fastrnn.revert(model)
    assert type(model[0]) is fastrnn.GRU
    model[1].return_states = False
    assert type(fastrnn.revert(model)[1]) is nn.LSTM
    layer = parametrizations.weight_norm(fastrnn.GRU(I, H, weight_dropout=0.5), "weight_ih_l0")
    with pytest.raises(ValueError, match=r"torch\.nn has no weight_dropout, which layer uses"):
        fastrnn.revert(layer)


@layers
def test_spectral_norm_iterates_once_a_call(torch_kind: Any, kind: Any, options: Any) -> None:
    layer = parametrizations.spectral_norm(kind(I, H, **options), "weight_hh_l0")
    norm, x = layer.parametrizations.weight_hh_l0[0], an_input(layer)
    twin = copy.deepcopy(norm)
    layer(x)
    twin(layer.parametrizations.weight_hh_l0.original)
    assert torch.equal(norm._u, twin._u)
