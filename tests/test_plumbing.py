"""The layers as torch.nn.Modules: state, copies, devices, and the ways weights are replaced."""

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
def test_state_dict_both_ways(torch_kind: Any, kind: Any, options: Any) -> None:
    for source, target in ((torch_kind, kind), (kind, torch_kind)):
        a, b = source(I, H, **options), target(I, H, **options)
        assert list(a.state_dict()) == list(b.state_dict())
        b.load_state_dict(a.state_dict())
        x = an_input(a)
        torch.testing.assert_close(first(a(x)), first(b(x)))


@everything
def test_load_state_dict_by_assignment(torch_kind: Any, kind: Any, options: Any) -> None:
    theirs = torch_kind(I, H, **options)
    ours = kind(I, H, device="meta", **options)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = an_input(ours)
    torch.testing.assert_close(first(ours(x)), first(theirs(x)))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert isinstance(p, nn.Parameter)
        assert p.data_ptr() == q.data_ptr()


@everything
def test_deepcopy_and_pickle(torch_kind: Any, kind: Any, options: Any) -> None:
    ours = kind(I, H, **options)
    x = an_input(ours)
    expected = first(ours(x))
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.copy(ours)):
        assert type(again) is kind
        assert torch.equal(first(again(x)), expected)
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(first(ours(x)), expected)
    assert not torch.equal(first(other(x)), expected)


@layers
def test_unpickled_without_proj_size(torch_kind: Any, kind: Any, options: Any) -> None:
    """As layers saved before there was one."""
    ours = kind(I, H, **options)
    state = ours.__getstate__()
    del state["proj_size"]
    again = kind.__new__(kind)
    again.__setstate__(state)
    assert again.proj_size == 0
    x = an_input(ours)
    assert torch.equal(again(x)[0], ours(x)[0])


@everything
def test_to_another_dtype_and_back(torch_kind: Any, kind: Any, options: Any) -> None:
    ours = kind(I, H, **options)
    x = an_input(ours)
    for change, dtype in (
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.float(), torch.float32),
    ):
        assert change(ours) is ours
        assert first(ours(x.to(dtype))).dtype == dtype


@everything
def test_meta_device(torch_kind: Any, kind: Any, options: Any) -> None:
    theirs = torch_kind(I, H, device="meta", **options)
    ours = kind(I, H, device="meta", **options)
    x = an_input(ours).to("meta").requires_grad_()
    y, expected = first(ours(x)), first(theirs(x))
    assert y.device.type == "meta"
    assert y.shape == expected.shape
    y.sum().backward()
    assert x.grad is not None
    ours.to_empty(device="cpu").reset_parameters()
    assert first(ours(an_input(ours))).isfinite().all()


@everything
def test_skip_init(torch_kind: Any, kind: Any, options: Any) -> None:
    ours = nn.utils.skip_init(kind, I, H, **options)
    assert type(ours) is kind
    assert all(p.device.type == "cpu" for p in ours.parameters())


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


@layers
def test_all_weights_and_flattening(torch_kind: Any, kind: Any, options: Any) -> None:
    args = {"num_layers": 2, "bidirectional": True, **options}
    theirs, ours = torch_kind(I, H, **args), kind(I, H, **args)
    ours.load_state_dict(theirs.state_dict())
    assert ours.flatten_parameters() is None
    assert ours._all_weights == theirs._all_weights
    for mine, their in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(map(torch.equal, mine, their))
    assert all(w is p for w, p in zip(ours._flat_weights, ours.parameters(), strict=True))


@layers
def test_replicas_for_data_parallel(torch_kind: Any, kind: Any, options: Any) -> None:
    """A replica's parameters are plain tensors, as nn.DataParallel makes them."""
    ours = kind(I, H, 2, **options)
    replica = ours._replicate_for_data_parallel()
    for name, p in ours.named_parameters():
        replica._parameters.pop(name, None)
        setattr(replica, name, p.detach().clone())
    x = an_input(ours)
    assert torch.equal(replica(x)[0], ours(x)[0])
    assert replica._flat_weights is not ours._flat_weights


@everything
def test_share_memory_and_requires_grad(torch_kind: Any, kind: Any, options: Any) -> None:
    ours = kind(I, H, **options).share_memory().requires_grad_(False)
    x = an_input(ours)
    assert not first(ours(x)).requires_grad
    assert first(ours(x.requires_grad_())).requires_grad


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


@everything
def test_hooks(torch_kind: Any, kind: Any, options: Any) -> None:
    ours = kind(I, H, **options)
    seen = []
    ours.register_forward_hook(lambda *_: seen.append("forward"))
    ours.register_full_backward_hook(lambda *_: seen.append("backward"))
    next(iter(ours.parameters())).register_post_accumulate_grad_hook(
        lambda _: seen.append("accumulated")
    )
    first(ours(an_input(ours).requires_grad_())).sum().backward()
    assert sorted(seen) == ["accumulated", "backward", "forward"]


@layers
def test_optimizer_step_trains(torch_kind: Any, kind: Any, options: Any) -> None:
    """Twenty steps of Adam from the same seed give torch.nn's losses, to rounding."""
    torch.manual_seed(1)
    theirs = torch_kind(I, H, dtype=torch.float64, **options)
    ours = kind(I, H, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    x, target = torch.randn(T, B, I).double(), torch.randn(T, B, H).double()
    losses: list[list[float]] = []
    for module in (theirs, ours):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = (module(x)[0] - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1][-1] < losses[1][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]))


def test_rnnbase_and_isinstance() -> None:
    assert isinstance(fastrnn.LSTM(2, 3), nn.RNNBase)
    assert isinstance(fastrnn.LSTMCell(2, 3), nn.modules.rnn.RNNCellBase)
    assert fastrnn.LSTM(2, 3).mode == "LSTM"
    assert fastrnn.RNN(2, 3, nonlinearity="relu").mode == "RNN_RELU"
