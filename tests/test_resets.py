"""Resets inside a sequence: ``layer(x, hx, reset=mask)``."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import BACKEND_NAMES, LAYERS, STEPS, using
from torch import Tensor

import fastrnn

T, B, I, H = 12, 4, 3, 6
MASK = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.3
every_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)
every_layer = pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)


def states_of(kind: Any, *lead: int) -> list[Tensor]:
    count = 2 if kind is fastrnn.LSTM else 1
    return [torch.randn(*lead, H, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def as_hx(states: list[Tensor]) -> Any:
    return tuple(states) if len(states) > 1 else states[0]


def flat(result: Any) -> list[Tensor]:
    y, ends = result
    return [y, *(ends if isinstance(ends, tuple) else [ends])]


def compare(a: list[Tensor], b: list[Tensor], leaves: list[Tensor]) -> None:
    """Values and gradients, those of unused leaves too."""
    torch.testing.assert_close(a, b)
    grads = [
        torch.autograd.grad(
            torch.stack([(o * o.cos()).sum() for o in outputs]).sum(),
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
        for outputs in (a, b)
    ]
    torch.testing.assert_close(*grads)


@every_backend
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("torch_step", "step", "options"), STEPS)
def test_equals_the_loop_over_torch_cells(
    torch_step: Any, step: Any, options: Any, backend: str, learned: bool
) -> None:
    """``state = (1 - done) * state + done * start`` before every step, as RL code writes it."""
    cell = torch_step(I, H, dtype=torch.float64, **options)
    kind = getattr(fastrnn, step.__name__.removesuffix("Cell"))
    layer = kind(I, H, dtype=torch.float64, **options)
    layer.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h0, start = states_of(kind, 1, B), states_of(kind, 1, 1)
    states, ys = [s[0] for s in h0], []
    for t in range(T):
        done = MASK[t][:, None].double()
        begin = [s[0].expand(B, H) if learned else torch.zeros(B, H).double() for s in start]
        states = [(1 - done) * s + done * b for s, b in zip(states, begin, strict=True)]
        new = cell(x[t], as_hx(states))
        states = list(new) if isinstance(new, tuple) else [new]
        ys.append(states[0])
    expected = [torch.stack(ys), *(s[None] for s in states)]
    with using(backend):
        found = flat(layer(x, as_hx(h0), reset=MASK, reset_hx=as_hx(start) if learned else None))
    torch.testing.assert_close(found, expected)
    leaves = [x, *h0, *(start if learned else [])]
    grads = []
    for outputs, module in ((found, layer), (expected, cell)):
        loss = torch.stack([(o * o.cos()).sum() for o in outputs]).sum()
        grads.append(torch.autograd.grad(loss, [*leaves, *module.parameters()]))
    torch.testing.assert_close(*grads)


@every_backend
@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_equals_each_segment_alone(
    torch_kind: Any, kind: Any, options: Any, backend: str, batch_first: bool
) -> None:
    """Two layers, both directions: what lies between two cuts does not know of the rest."""
    layer = kind(
        I, H, 2, bidirectional=True, batch_first=batch_first, dtype=torch.float64, **options
    )
    x = torch.randn(T, 1, I, dtype=torch.float64, requires_grad=True)
    start = states_of(kind, 4, 1)
    cuts = [0, 3, 4, 9, T]
    mask = torch.zeros(T, 1, dtype=torch.bool)
    mask[cuts[:-1]] = True
    parts = []
    with using("reference"):
        for a, b in itertools.pairwise(cuts):
            part = x[a:b].transpose(0, 1) if batch_first else x[a:b]
            # Nothing is cut at the end of the last segment: going back it starts from zeros.
            hx = [s.clone() for s in start]
            if b == T:
                for state in hx:
                    state[1::2] = 0
            parts.append(flat(layer(part, as_hx(hx)))[0])
    expected = torch.cat(parts, 1 if batch_first else 0)
    with using(backend):
        given, cut = (x.transpose(0, 1), mask.t()) if batch_first else (x, mask)
        found = flat(layer(given, reset=cut, reset_hx=as_hx(start)))[0]
    compare([found], [expected], [x, *start, *layer.parameters()])


@every_backend
@every_layer
def test_gradients_stop_at_a_cut(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    layer = kind(I, H, bidirectional=True, dtype=torch.float64, **options)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[5] = True
    with using(backend):
        y, _ = layer(x, reset=mask)
    (before,) = torch.autograd.grad(y[:5].sum(), x, retain_graph=True)
    (after,) = torch.autograd.grad(y[5:].sum(), x)
    assert (before[5:] == 0).all()
    assert (after[:5] == 0).all()
    assert before[:5].abs().min() > 0 or kind is fastrnn.RNN


@every_backend
@every_layer
def test_no_reset_changes_nothing(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    layer = kind(I, H, dtype=torch.float64, **options)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h0 = states_of(kind, 1, B)
    with using(backend):
        found = flat(layer(x, as_hx(h0), reset=torch.zeros(T, B, dtype=torch.bool)))
        expected = flat(layer(x, as_hx(h0)))
    compare(found, expected, [x, *h0, *layer.parameters()])


@every_backend
@every_layer
def test_unbatched(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    layer = kind(I, H, dtype=torch.float64, **options)
    x = torch.randn(T, I, dtype=torch.float64, requires_grad=True)
    start = states_of(kind, 1)
    with using(backend):
        found = flat(layer(x, reset=MASK[:, 0], reset_hx=as_hx(start)))
        batched = as_hx([s[:, None] for s in start])
        expected = flat(layer(x[:, None], reset=MASK[:, :1], reset_hx=batched))
    compare(found, [e.squeeze(1) for e in expected], [x, *start, *layer.parameters()])


@every_backend
@every_layer
@pytest.mark.parametrize("change", [Tensor.tolist, Tensor.numpy], ids=["lists", "array"])
def test_masks_that_are_no_tensor(
    torch_kind: Any, kind: Any, options: Any, backend: str, change: Any
) -> None:
    layer, x = kind(I, H, batch_first=True, **options), torch.randn(B, T, I)
    with using(backend):
        expected, found = layer(x, reset=MASK.t()), layer(x, reset=change(MASK.t()))
        assert all(map(torch.equal, flat(found), flat(expected)))
        expected, found = layer(x[0], reset=MASK[:, 0]), layer(x[0], reset=change(MASK[:, 0]))
        assert all(map(torch.equal, flat(found), flat(expected)))


@every_backend
@every_layer
def test_bad_masks(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    layer, x = kind(I, H, **options), torch.randn(T, B, I)
    packed = torch.nn.utils.rnn.pack_sequence([x[:, 0]])
    with using(backend):
        layer(x)
        with pytest.raises(RuntimeError, match=r"Expected reset size \(12, 4\), got \[4, 12\]"):
            layer(x, reset=MASK.t())
        batch_first = kind(I, H, batch_first=True, **options)
        with pytest.raises(RuntimeError, match=r"Expected reset size \(4, 12\), got \[12, 4\]"):
            batch_first(x.transpose(0, 1), reset=MASK)
        for wrong_dtype in (MASK.float(), MASK.float().numpy(), MASK.int().tolist()):
            with pytest.raises(RuntimeError, match=r"reset must be of dtype torch.bool"):
                layer(x, reset=wrong_dtype)
        with pytest.raises(RuntimeError, match="reset is on the meta device"):
            layer(x, reset=MASK.to("meta"))
        with pytest.raises(RuntimeError, match="PackedSequence takes neither"):
            layer(packed, reset=MASK)
        wrong = as_hx([torch.zeros(1, B, H + 1) for _ in states_of(kind, 1)])
        with pytest.raises(RuntimeError, match=r"Expected reset\[0\] size"):
            layer(x, reset=MASK, reset_hx=wrong)
