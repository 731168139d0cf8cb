"""The layers as torch.nn.Modules: state, copies and devices."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from helpers import LAYERS, STEPS
from torch import Tensor, nn

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


@pytest.mark.parametrize("packed", [False, True])
@layers
def test_helpers_of_subclasses(torch_kind: Any, kind: Any, options: Any, packed: bool) -> None:
    """The methods that a forward copied from torch.nn calls."""
    theirs, ours = (k(I, H, 2, batch_first=True, **options) for k in (torch_kind, kind))
    x = torch.randn(B + 1, I) if packed else torch.randn(B, T, I)
    sizes = torch.tensor([B, 1]) if packed else None
    order, (hx, wrong) = torch.randperm(B), (torch.randn(2, n, H) for n in (B, B + 1))
    if torch_kind is nn.LSTM:
        hx, wrong = (hx, hx + 1), (wrong, wrong)
    ours.check_forward_args(x, hx, sizes)
    torch.testing.assert_close(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order))
    assert ours.permute_hidden(hx, None) is hx
    if torch_kind is nn.LSTM:
        assert ours.get_expected_cell_size(x, sizes) == theirs.get_expected_cell_size(x, sizes)
    with pytest.raises(RuntimeError) as expected:
        theirs.check_forward_args(x, wrong, sizes)
    with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
        ours.check_forward_args(x, wrong, sizes)


@layers
def test_every_argument_by_position(torch_kind: Any, kind: Any, options: Any) -> None:
    """A proj_size of 0 by position is one that torch.nn.GRU and RNN take, too."""
    nonlinearity = [options.get("nonlinearity", "tanh")] if torch_kind is nn.RNN else []
    args = (I, H, 1, *nonlinearity, True, False, 0.0, False, 0, "cpu", torch.float64)
    theirs, ours = torch_kind(*args), kind(*args)
    assert repr(ours) == f"fastrnn.{theirs!r}"
    assert ours.proj_size == 0
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    if torch_kind is nn.LSTM:
        return
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        kind(I, H, proj_size=2, **options)


@layers
def test_output_edited_in_place_raises(torch_kind: Any, kind: Any, options: Any) -> None:
    """Before the backward pass, which reads it: never a wrong gradient."""
    y, _ = kind(I, H, **options)(torch.randn(T, B, I))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
