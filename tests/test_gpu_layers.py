"""Whole layers on a CUDA or HIP device, as people use them: `pytest -m gpu`.

What single calls compute there, test_gpu.py tests."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import (
    GPU_BACKENDS,
    LAYERS,
    assert_close,
    check_module,
    float32_products,
    using,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
T, B, I, H = 12, 6, 5, 40
LENGTHS = [5, 12, 1, 9, 9, 2]
on_each = pytest.mark.parametrize("backend", GPU_BACKENDS)
of_each_layer = pytest.mark.parametrize(("theirs", "ours", "options"), LAYERS)


def random(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


def gradients(layer: nn.Module, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.float().square().sum(), list(layer.parameters())))


@pytest.mark.parametrize("bidirectional", [False, True])
@of_each_layer
@on_each
def test_stacks(backend: str, theirs: Any, ours: Any, options: Any, bidirectional: bool) -> None:
    options = options | {"num_layers": 3, "bidirectional": bidirectional, "device": DEVICE}
    with float32_products("fp32"):
        check_module(
            theirs(I, H, **options), ours(I, H, **options), random(T, B, I), backend=backend
        )


@of_each_layer
@on_each
def test_packed_in_any_order(backend: str, theirs: Any, ours: Any, options: Any) -> None:
    """As `lengths` have it, whose rows stay in their order."""
    layer = ours(I, H, 2, bidirectional=True, **options).to(DEVICE)
    x, lengths = random(T, B, I), torch.tensor(LENGTHS)
    with using(backend), float32_products("fp32"):
        packed, _ = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        y, sizes = pad_packed_sequence(packed, total_length=T)
        dense, _ = layer(x, lengths=lengths.to(DEVICE))
        found, expected = ([t, *gradients(layer, t)] for t in (y, dense))
    assert sizes.tolist() == LENGTHS
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, T * B + I + 2 * H, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@of_each_layer
@on_each
def test_autocast(backend: str, theirs: Any, ours: Any, options: Any, dtype: torch.dtype) -> None:
    """The bits of a layer that was cast by hand; the gradients of the weights in float32."""
    layer = ours(I, H, **options).to(DEVICE)
    lower, x = copy.deepcopy(layer).to(dtype), random(T, B, I)
    with using(backend):
        with torch.autocast(DEVICE, dtype=dtype):
            y, _ = layer(x)
        expected, _ = lower(x.to(dtype))
        found = gradients(layer, y)
        for ours_, theirs_ in zip(found, gradients(lower, expected), strict=True):
            assert ours_.dtype == torch.float32
            assert torch.equal(ours_, theirs_.float())
    assert torch.equal(y, expected)


@of_each_layer
@on_each
def test_recompute(backend: str, theirs: Any, ours: Any, options: Any) -> None:
    whole = ours(I, H, 2, bidirectional=True, **options).to(DEVICE)
    chunks = ours(I, H, 2, bidirectional=True, recompute=5, **options).to(DEVICE)
    chunks.load_state_dict(whole.state_dict())
    x = random(T, B, I)
    with using(backend), float32_products("fp32"):
        found, expected = ([y, *gradients(m, y)] for m in (chunks, whole) for y in [m(x)[0]])
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, T * B + I + 2 * H, torch.float32)


@of_each_layer
@on_each
def test_gradients_of_each_sample(backend: str, theirs: Any, ours: Any, options: Any) -> None:
    layer = ours(I, H, **options).to(DEVICE)
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    x = random(B, T, 1, I)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        y, _ = torch.func.functional_call(layer, weights, (x,))
        return y.square().sum()

    one = torch.func.grad(loss)
    with using(backend), float32_products("fp32"):
        found = torch.func.vmap(one, (None, 0))(weights, x)
        each = [one(weights, sample) for sample in x]
    for name, d in found.items():
        assert_close(d, torch.stack([e[name] for e in each]), T + I + H, torch.float32)


@of_each_layer
@on_each
def test_ensemble(backend: str, theirs: Any, ours: Any, options: Any) -> None:
    members = [ours(I, H, **options).to(DEVICE) for _ in range(4)]
    weights, _ = torch.func.stack_module_state(members)
    x = random(T, B, I)

    def output(weights: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(members[0], weights, (x,))[0]
        return y

    with using(backend), float32_products("fp32"), torch.no_grad():
        found = torch.func.vmap(output)(weights)
        for y, member in zip(found, members, strict=True):
            assert_close(y, member(x)[0], I + H, torch.float32)


@of_each_layer
@on_each
def test_second_derivatives(backend: str, theirs: Any, ours: Any, options: Any) -> None:
    """Of a gradient penalty, against those that plain torch finds."""
    layer, x = ours(I, H, **options).to(DEVICE), random(T, B, I).requires_grad_()

    def penalty() -> list[Tensor]:
        y, _ = layer(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return gradients(layer, dx)

    with float32_products("fp32"):
        with using(backend):
            found = penalty()
        with fastrnn.backend("reference"):
            expected = penalty()
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, T * T * B, torch.float32)


@of_each_layer
@on_each
def test_stream(backend: str, theirs: Any, ours: Any, options: Any) -> None:
    layer, x = ours(I, H, 2, **options).to(DEVICE), random(T, B, I)
    with using(backend), float32_products("fp32"), torch.no_grad():
        step = fastrnn.stream(layer, B)
        found = torch.stack([step(row) for row in x])
        expected, _ = layer(x)
    assert_close(found, expected, I + 2 * H, torch.float32)
