"""Rows that end early without a PackedSequence: ``layer(x, hx, lengths=...)``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import BACKEND_NAMES, LAYERS, assert_close, using
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn

pytestmark = [
    pytest.mark.parametrize("backend", BACKEND_NAMES),
    pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS),
]
T, B, I, H = 11, 5, 4, 7
LENGTHS = torch.tensor([3, 11, 1, 7, 7])


def hidden(kind: Any, groups: int, batch: int = B) -> Any:
    h = torch.randn(groups, batch, H, dtype=torch.float64)
    return (h, torch.randn_like(h)) if kind is fastrnn.LSTM else h


def flat(result: Any) -> list[Tensor]:
    y, ends = result
    return [y, *(ends if isinstance(ends, tuple) else [ends])]


def make(kind: Any, options: dict[str, Any], **more: Any) -> Any:
    return kind(I, H, 2, bidirectional=True, dtype=torch.float64, **options, **more)


def packed_by_hand(layer: Any, x: Tensor, hx: Any, lengths: Tensor, batch_first: bool) -> Any:
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    y, ends = layer(packed, hx)
    steps = x.shape[1 if batch_first else 0]
    return pad_packed_sequence(y, batch_first=batch_first, total_length=steps)[0], ends


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_equals_a_packed_sequence_of_torch_nn(
    torch_kind: Any,
    kind: Any,
    options: Any,
    backend: str,
    batch_first: bool,
    given: bool,
    dtype: torch.dtype,
) -> None:
    theirs = make(torch_kind, options, batch_first=batch_first)
    ours = make(kind, options, batch_first=batch_first)
    ours.load_state_dict(theirs.state_dict())
    hx = hidden(kind, 4) if given else None
    results, gradients = [], []
    for layer in (theirs, ours):
        x = torch.linspace(-1, 1, B * T * I, dtype=torch.float64).reshape(
            (B, T, I) if batch_first else (T, B, I)
        )
        x.requires_grad_()
        if layer is theirs:
            found = flat(packed_by_hand(layer, x, hx, LENGTHS, batch_first))
        else:
            with using(backend):
                found = flat(layer(x, hx, lengths=LENGTHS.to(dtype)))
        loss = torch.stack([(o * o.cos()).sum() for o in found]).sum()
        gradients.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
        results.append(found)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_nan_in_padding_never_leaks(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    """Neither forward nor backward, nor does a NaN in the gradient of a padded output."""
    layer = make(kind, options)
    clean = torch.randn(T, B, I, dtype=torch.float64)
    beyond = (torch.arange(T)[:, None] >= LENGTHS).unsqueeze(-1)
    weight = torch.randn(T, B, 2 * H, dtype=torch.float64)
    found = []
    for filler in (0.0, math.nan, math.inf):
        x = clean.masked_fill(beyond, filler).requires_grad_()
        with using(backend):
            outputs = flat(layer(x, lengths=LENGTHS))
        leaves = [x, *layer.parameters()]
        grads = [weight.masked_fill(beyond, filler), *map(torch.ones_like, outputs[1:])]
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    y, dx = found[1][0], found[1][1 + len(outputs) - 1]
    assert (y[beyond.squeeze(-1)] == 0).all()
    assert (dx[beyond.squeeze(-1)] == 0).all()


def test_rows_of_length_zero(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    """Their output is zero, and they hand their initial state and its gradient on."""
    layer = make(kind, options)
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.tensor([4, 0, 11, 0, 2])
    hx = hidden(kind, 4)
    leaves = [s.requires_grad_() for s in (hx if isinstance(hx, tuple) else (hx,))]
    with using(backend):
        y, *ends = flat(layer(x, hx, lengths=lengths))
    empty = lengths == 0
    assert (y[:, empty] == 0).all()
    for state, end in zip(leaves, ends, strict=True):
        assert torch.equal(end[:, empty], state[:, empty])
    grads = torch.autograd.grad([e.sum() for e in ends], leaves)
    assert all((g[:, empty] == 1).all() for g in grads)


def test_nothing_but_empty_rows(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    layer = make(kind, options)
    x = torch.full((T, B, I), math.nan, dtype=torch.float64, requires_grad=True)
    with using(backend):
        y, *ends = flat(layer(x, lengths=torch.zeros(B, dtype=torch.int64)))
    assert all((o == 0).all() for o in (y, *ends))
    grads = torch.autograd.grad((y.sum(), *(e.sum() for e in ends)), [x, *layer.parameters()])
    assert all((g == 0).all() for g in grads)


def test_full_lengths_change_nothing(
    torch_kind: Any, kind: Any, options: Any, backend: str
) -> None:
    layer = make(kind, options)
    x = torch.randn(T, B, I, dtype=torch.float64)
    with using(backend):
        plain, ragged = flat(layer(x)), flat(layer(x, lengths=torch.full((B,), T)))
    for a, b in zip(plain, ragged, strict=True):
        assert_close(b, a, T * B + I + H, torch.float64)


@pytest.mark.parametrize(
    "change",
    [
        Tensor.tolist,
        lambda lengths: tuple(lengths.tolist()),
        lambda lengths: list(lengths.unbind()),
        Tensor.numpy,
        lambda lengths: lengths.flip(0).numpy()[::-1],  # which torch takes no view of
        lambda lengths: lengths.numpy().astype("int32"),
    ],
    ids=["list", "tuple", "tensors", "array", "backwards", "int32"],
)
def test_lengths_that_are_no_tensor(
    torch_kind: Any, kind: Any, options: Any, backend: str, change: Any
) -> None:
    layer, x = kind(I, H, batch_first=True, **options), torch.randn(B, T, I)
    with using(backend):
        for a, b in zip(
            flat(layer(x, lengths=LENGTHS)), flat(layer(x, lengths=change(LENGTHS))), strict=True
        ):
            assert torch.equal(a, b)
        with torch.device("meta"):  # where a list would become a tensor without values
            assert torch.equal(layer(x, lengths=change(LENGTHS))[0], layer(x, lengths=LENGTHS)[0])


def test_no_lengths_of_no_rows(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    layer = kind(I, H, **options)
    with using(backend):
        assert layer(torch.randn(T, 0, I), lengths=[])[0].shape == (T, 0, H)


@pytest.mark.parametrize(
    ("lengths", "error", "text"),
    [
        ([3, 11, 1], RuntimeError, r"Expected lengths size \(5,\), got \[3\]"),
        ([3, 11, 1, 7, 12], ValueError, "lengths must be between 0 and 11"),
        ([3.0] * B, RuntimeError, "lengths must be integers, got torch.float32"),
        (5, RuntimeError, r"Expected lengths size \(5,\), got \[\]"),
        ("text", TypeError, "lengths should be a tensor, a NumPy array or a list, got str"),
        ([[1], [2, 3]], TypeError, "lengths should be a tensor, a NumPy array or a list, got list"),
        (LENGTHS.to("meta"), RuntimeError, "lengths is on the meta device, where it has no values"),
        (torch.tensor([1, 2, 3, 4]), RuntimeError, r"Expected lengths size \(5,\), got \[4\]"),
        (torch.ones(B), RuntimeError, "lengths must be integers, got torch.float32"),
        (torch.ones(B, dtype=torch.bool), RuntimeError, "lengths must be integers"),
        (torch.tensor([1, 2, 12, 1, 1]), ValueError, "lengths must be between 0 and 11"),
        (torch.tensor([1, 2, -1, 1, 1]), ValueError, "lengths must be between 0 and 11"),
    ],
)
def test_bad_lengths(
    torch_kind: Any, kind: Any, options: Any, backend: str, lengths: Any, error: Any, text: str
) -> None:
    layer, x = kind(I, H, **options), torch.randn(T, B, I)
    with using(backend), pytest.raises(error, match=text):
        layer(x, lengths=lengths)


def test_not_with_a_packed_sequence_nor_unbatched(
    torch_kind: Any, kind: Any, options: Any, backend: str
) -> None:
    layer, x = kind(I, H, **options), torch.randn(T, B, I)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    with pytest.raises(RuntimeError, match="PackedSequence takes neither"):
        layer(packed, lengths=LENGTHS)
    with pytest.raises(RuntimeError, match="lengths needs batched"):
        layer(x[:, 0], lengths=LENGTHS[:1])
