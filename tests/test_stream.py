"""fastrnn.stream: step by step as the layer does it at once, whatever happens in between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import BACKEND_NAMES, LAYERS, assert_within_budget, using
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastrnn
from fastrnn.streaming import Stream

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
each_layer = pytest.mark.parametrize(("theirs", "ours", "options"), LAYERS)
each_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)


def run(step: Stream, xs: Tensor) -> Tensor:
    return torch.stack([step(x) for x in xs])


def named(y: Tensor, states: Any) -> dict[str, Tensor]:
    ends = states if isinstance(states, tuple) else (states,)
    return {"y": y} | {f"end{k}": end for k, end in enumerate(ends)}


def step_by_step(layer: nn.Module, xs: Tensor) -> dict[str, Tensor]:
    """What people do without a stream: a call a step, states handed on by hand."""
    found, states = [], None
    with torch.no_grad():
        for x in xs:
            y, states = layer(x.unsqueeze(0), states)
            found.append(y.squeeze(0))
    return named(torch.stack(found), states)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [None, 1, 3, 9])
@pytest.mark.parametrize("sizes", [(5, 17, 1), (40, 33, 3)], ids=str)
@each_layer
@each_backend
def test_equals_the_layer(
    theirs: Any,
    ours: Any,
    options: dict[str, Any],
    sizes: tuple[int, int, int],
    batch: int | None,
    dtype: torch.dtype,
    backend: str,
) -> None:
    I, H, L = sizes
    layer = ours(I, H, L, **options).to(dtype)
    lead = () if batch is None else (batch,)
    xs = torch.randn(6, *lead, I).to(dtype)
    with using(backend):
        step = fastrnn.stream(layer, batch)
        found = run(step, xs)
    plain = theirs(I, H, L, **options).to(dtype)
    plain.load_state_dict(layer.state_dict())
    assert_within_budget(
        named(found, step.states),
        step_by_step(plain, xs),
        step_by_step(copy.deepcopy(plain).double(), xs.double()),
        dtype,
        (I + 2 * H) * L * len(xs),
    )


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@each_backend
def test_projection(backend: str) -> None:
    layer = fastrnn.LSTM(5, 8, 2, proj_size=3)
    xs = torch.randn(4, 2, 5)
    with using(backend):
        found = run(fastrnn.stream(layer, 2), xs)
    torch.testing.assert_close(found, layer(xs)[0])


@each_layer
def test_nothing_else_matters(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    """batch_first, training mode, dropout, grad and inference modes, autocast, strides."""
    layer = ours(5, 7, 2, dropout=0.9, batch_first=True, **options)
    xs = torch.randn(4, 3, 5)
    expected = ours(5, 7, 2, **options)
    expected.load_state_dict(layer.state_dict())
    y = expected(xs)[0]
    step = fastrnn.stream(layer, 3)
    found = [step(xs[0].requires_grad_()), step(xs[1].t().contiguous().t())]
    with torch.inference_mode():
        found.append(step(xs[2]))
    with torch.autocast("cpu", torch.bfloat16):
        found.append(step(xs[3]))
    torch.testing.assert_close(torch.stack(found), y)
    assert not any(f.requires_grad for f in found)


@each_layer
def test_outputs_and_states_are_the_callers(
    theirs: Any, ours: Any, options: dict[str, Any]
) -> None:
    step = fastrnn.stream(ours(5, 7, **options), 3)
    first = step(torch.randn(3, 5))
    kept, states = first.clone(), step.states
    held = [s.clone() for s in (states if isinstance(states, tuple) else (states,))]
    second = step(torch.randn(3, 5))
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    for s, h in zip(states if isinstance(states, tuple) else (states,), held, strict=True):
        assert torch.equal(s, h)
    step.states = states
    third = step(torch.zeros(3, 5))
    second.zero_()  # what belongs to the caller does not reach into the stream
    held[0].zero_()
    step.states = states
    assert torch.equal(step(torch.zeros(3, 5)), third)


@pytest.mark.parametrize(
    "rows", [1, slice(0, 2), [0, 2], torch.tensor([True, False, True])], ids=str
)
@pytest.mark.parametrize("given", [False, True])
@each_layer
def test_reset(theirs: Any, ours: Any, options: dict[str, Any], given: bool, rows: Any) -> None:
    layer = ours(5, 7, 2, **options)
    first: Any = tuple(torch.randn(2, 3, 7) for _ in range(2))
    if ours is not fastrnn.LSTM:
        first = first[0]
    step = fastrnn.stream(layer, 3, first if given else None)
    fresh = fastrnn.stream(layer, 3, first if given else None)
    x, again = torch.randn(3, 5), torch.randn(3, 5)
    old = step(x)
    assert torch.equal(old, fresh(x))
    kept = fresh.states
    step.reset(rows)
    found = step(again)
    restarted = fastrnn.stream(layer, 3, first if given else None)(again)
    fresh.states = kept
    went_on = fresh(again)
    mask = torch.zeros(3, dtype=torch.bool)
    mask[rows] = True
    torch.testing.assert_close(found, torch.where(mask[:, None], restarted, went_on))
    step.reset()
    torch.testing.assert_close(step(again), restarted)


def test_it_notices_changed_weights() -> None:
    layer = fastrnn.LSTM(5, 7)
    step = fastrnn.stream(layer)
    x = torch.randn(5)

    def check() -> None:
        step.reset()
        torch.testing.assert_close(step(x)[None], layer(x[None])[0])

    check()
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
        layer.weight_ih_l0.mul_(2)
    check()
    layer.load_state_dict(fastrnn.LSTM(5, 7).state_dict(), assign=True)
    check()
    layer.weight_ih_l0 = nn.Parameter(torch.randn(28, 5))
    check()
    parametrize.register_parametrization(layer, "weight_ih_l0", nn.Tanh())
    check()
    with torch.no_grad():
        layer.parametrizations.weight_ih_l0.original.add_(1)
    check()
    parametrize.remove_parametrizations(layer, "weight_ih_l0")
    check()
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach().t().contiguous().t())
    check()
    with torch.no_grad():
        layer.weight_hh_l0.mul_(3)
    check()
    layer.double()
    x = x.double()
    check()
    torch.set_num_threads(1)
    step.refresh()
    check()


def test_states_survive_another_dtype() -> None:
    layer = fastrnn.GRU(5, 7)
    step = fastrnn.stream(layer)
    xs = torch.randn(4, 5)
    expected, _ = layer(xs)
    run(step, xs[:2])
    layer.double()
    torch.testing.assert_close(run(step, xs[2:].double()), expected[2:].double())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="made of a fastrnn layer, not of LSTM"):
        fastrnn.stream(nn.LSTM(3, 4))
    with pytest.raises(ValueError, match="needs the future"):
        fastrnn.stream(fastrnn.LSTM(3, 4, bidirectional=True))
    with pytest.raises(ValueError, match="batch_size should be at least 1"):
        fastrnn.stream(fastrnn.LSTM(3, 4), 0)
    with pytest.raises(ValueError, match="expected a state of shape"):
        fastrnn.stream(fastrnn.GRU(3, 4), 2, torch.zeros(1, 1, 4))
    step = fastrnn.stream(fastrnn.GRU(3, 4), 2)
    for x in (torch.zeros(3), torch.zeros(1, 3), torch.zeros(2, 4), torch.zeros(2, 3).double()):
        with pytest.raises(ValueError, match=r"expected x of shape \(2, 3\), torch.float32 on cpu"):
            step(x)
    with pytest.raises(RuntimeError, match="hx should also be 3-D"):
        step.states = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="expected a state of shape"):
        step.states = torch.zeros(1, 3, 4)


@each_layer
def test_same_bits_on_repeat(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    layer, xs = ours(20, 33, **options), torch.randn(9, 1, 20)
    first, again = (run(fastrnn.stream(layer, 1), xs) for _ in range(2))
    assert torch.equal(first, again)


def test_many_streams_of_one_layer() -> None:
    layer, xs = fastrnn.LSTM(5, 7), torch.randn(6, 5)
    one, other = fastrnn.stream(layer), fastrnn.stream(layer)
    together = [(one(x), other(-x)) for x in xs]
    torch.testing.assert_close(torch.stack([y for y, _ in together]), layer(xs)[0])
    torch.testing.assert_close(torch.stack([y for _, y in together]), layer(-xs)[0])


def test_weights_that_are_negated_views() -> None:
    layer, x = fastrnn.GRU(3, 4), torch.randn(3)
    expected = fastrnn.stream(layer)(x)
    for name, weight in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(torch._neg_view(-weight.detach())))
    torch.testing.assert_close(fastrnn.stream(layer)(x), expected)


def test_made_under_another_default_device() -> None:
    layer, x = fastrnn.LSTM(4, 6), torch.randn(2, 4)
    with torch.device("meta"):
        step = fastrnn.stream(layer, 2)
    assert torch.equal(step(x), fastrnn.stream(layer, 2)(x))
