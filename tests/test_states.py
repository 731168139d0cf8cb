"""c of every step: ``LSTM(..., return_states=True)``."""

from __future__ import annotations

import pytest
import torch
from helpers import BACKEND_NAMES, using
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn

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
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(packed)
    torch.testing.assert_close(padded, dense)
    torch.testing.assert_close(alone, dense[:2, 0])


def test_survives_pickle_and_deepcopy(backend: str) -> None:
    import copy
    import pickle

    for layer in (copy.deepcopy(make()), pickle.loads(pickle.dumps(make()))):
        with using(backend):
            assert len(layer(torch.randn(T, B, I, dtype=torch.float64))) == 3
