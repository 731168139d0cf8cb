"""The states of every step: ``return_states=True`` and, of every layer, ``return_layers=True``."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import BACKEND_NAMES, LAYERS, using
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn

each_layer = pytest.mark.parametrize(("theirs", "ours", "options"), LAYERS)
pytestmark = pytest.mark.parametrize("backend", BACKEND_NAMES)
T, B, I, H = 6, 3, 4, 5


def make(**options: object) -> fastrnn.LSTM:
    return fastrnn.LSTM(I, H, dtype=torch.float64, return_states=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_first", [False, True])
def test_equals_the_loop_over_the_cell(backend: str, batch_first: bool) -> None:
    layer, step = make(batch_first=batch_first), torch.nn.LSTMCell(I, H, dtype=torch.float64)
    step.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    state = (torch.zeros(B, H).double(), torch.zeros(B, H).double())
    cells = []
    for row in x:
        state = step(row, state)
        cells.append(state[1])
    with using(backend):
        y, (h_n, c_n), c = layer(x.transpose(0, 1) if batch_first else x)
    if batch_first:
        y, c = y.transpose(0, 1), c.transpose(0, 1)
    torch.testing.assert_close(c, torch.stack(cells))
    assert torch.equal(c[-1], c_n[0])
    assert torch.equal(y[-1], h_n[0])
    ours = torch.autograd.grad((c * c.cos()).sum(), [x, *layer.parameters()])
    theirs = torch.stack(cells)
    expected = torch.autograd.grad((theirs * theirs.cos()).sum(), [x, *step.parameters()])
    torch.testing.assert_close(ours, expected)


def test_last_layer_and_both_directions(backend: str) -> None:
    layer = make(num_layers=2, bidirectional=True)
    with using(backend):
        y, (_, c_n), c = layer(torch.randn(T, B, I, dtype=torch.float64))
    assert c.shape == y.shape == (T, B, 2 * H)
    torch.testing.assert_close(c[-1, :, :H], c_n[2])
    torch.testing.assert_close(c[0, :, H:], c_n[3])


def test_with_a_projection(backend: str) -> None:
    layer = make(proj_size=2)
    with using(backend):
        y, (_, c_n), c = layer(torch.randn(T, B, I, dtype=torch.float64))
    assert y.shape == (T, B, 2)
    assert c.shape == (T, B, H)
    torch.testing.assert_close(c[-1], c_n[0])


def test_packed_unbatched_and_lengths(backend: str) -> None:
    layer = make()
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.tensor([2, 6, 3])
    with using(backend):
        _, _, packed = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        _, _, dense = layer(x, lengths=lengths)
        _, _, alone = layer(x[:2, 0])
    assert isinstance(packed, PackedSequence)
    padded, _ = pad_packed_sequence(packed)
    torch.testing.assert_close(padded, dense)
    torch.testing.assert_close(alone, dense[:2, 0])


def test_survives_pickle_and_deepcopy(backend: str) -> None:
    for layer in (copy.deepcopy(make()), pickle.loads(pickle.dumps(make()))):
        with using(backend):
            assert len(layer(torch.randn(T, B, I, dtype=torch.float64))) == 3


@pytest.mark.parametrize("kind", [fastrnn.GRU, fastrnn.RNN])
def test_where_h_is_the_only_state_it_is_the_output(backend: str, kind: Any) -> None:
    layer, x = kind(I, H, return_states=True), torch.randn(T, B, I)
    packed = pack_padded_sequence(x, torch.tensor([6, 3, 2]))
    with using(backend):
        y, h_n, h = layer(x)
        packed_y, _, packed_h = layer(packed)
    assert torch.equal(h, y)
    assert torch.equal(h[-1], h_n[0])
    assert torch.equal(packed_h.data, packed_y.data)


def layer_by_layer(layer: nn.RNNBase, x: Tensor) -> list[Any]:
    """What :attr:`return_layers` gives, from layers that are made and called one after the other,
    on x [T, B, I]."""
    D, weights = 2 if layer.bidirectional else 1, layer.state_dict()
    found = []
    for k in range(layer.num_layers):
        own: Any = {"nonlinearity": "relu"} if layer.mode == "RNN_RELU" else {}
        own |= {"bidirectional": layer.bidirectional, "dtype": x.dtype}
        alone = type(layer)(D * H if k else I, H, return_states=True, **own)
        mine = {n.replace(f"_l{k}", "_l0"): w for n, w in weights.items() if f"_l{k}" in n}
        alone.load_state_dict(mine)
        x, _, c = alone(x)
        found.append((x, c) if layer.mode == "LSTM" else x)
    return found


@pytest.mark.parametrize("layout", ["dense", "batch_first", "packed", "unbatched", "lengths"])
@each_layer
def test_states_of_every_layer(
    backend: str, theirs: Any, ours: Any, options: dict[str, Any], layout: str
) -> None:
    layer = ours(
        I, H, 3, batch_first=layout == "batch_first", bidirectional=layout != "lengths",
        dtype=torch.float64, return_layers=True, **options,
    )  # fmt: skip
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.full((B,), T)
    given: Any = {
        "batch_first": lambda: x.transpose(0, 1),
        "packed": lambda: pack_padded_sequence(x, lengths),
        "unbatched": lambda: x[:, 0],
    }.get(layout, lambda: x)()
    with using(backend):
        y, _, every = layer(given, lengths=lengths) if layout == "lengths" else layer(given)
        expected = layer_by_layer(layer, x[:, :1] if layout == "unbatched" else x)
    assert torch.equal(y.data, (every[-1][0] if ours is fastrnn.LSTM else every[-1]).data)

    def time_first(steps: Any) -> Tensor:
        if layout == "packed":
            return pad_packed_sequence(steps)[0]
        if layout == "unbatched":
            return steps.unsqueeze(1)  # type: ignore[no-any-return]
        return steps.transpose(0, 1) if layout == "batch_first" else steps  # type: ignore[no-any-return]

    assert len(every) == 3
    for states, wanted in zip(every, expected, strict=True):
        if ours is fastrnn.LSTM:
            torch.testing.assert_close(tuple(map(time_first, states)), wanted)
        else:
            torch.testing.assert_close(time_first(states), wanted)


def test_every_layer_with_projection_and_gradients(backend: str) -> None:
    layer = make(num_layers=2, proj_size=2, return_layers=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    with using(backend):
        y, _, c, every = layer(x)
        lowest = torch.autograd.grad(every[0][1].square().sum(), list(layer.parameters())[:5])
        first = make(proj_size=2)
        first.load_state_dict({n: w for n, w in layer.state_dict().items() if "_l0" in n})
        expected = torch.autograd.grad(first(x)[2].square().sum(), list(first.parameters()))
    assert [tuple(s.shape[-1] for s in states) for states in every] == [(2, H), (2, H)]
    assert torch.equal(every[1][0], y)
    assert torch.equal(every[1][1], c)
    torch.testing.assert_close(lowest, expected)


@each_layer
def test_return_layers_is_an_option_like_the_others(
    backend: str, theirs: Any, ours: Any, options: dict[str, Any]
) -> None:
    layer, x = ours(I, H, 2, return_layers=True, **options), torch.randn(T, B, I)
    assert "return_layers=True" in repr(layer)
    assert "return_layers" not in vars(ours(I, H, **options))
    with using(backend):
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert len(again(x)) == 3
        with pytest.raises(ValueError, match=r"torch\.nn has no return_layers"):
            fastrnn.revert(layer)
        layer.return_layers = False
        assert len(fastrnn.revert(layer)(x)) == 2


def test_explain_tells_of_states_in_every_layer(backend: str) -> None:
    layer = fastrnn.LSTM(I, H, 2, return_layers=True)
    assert all(e.problem.all_states for e in fastrnn.explain(layer, torch.randn(T, B, I)))
