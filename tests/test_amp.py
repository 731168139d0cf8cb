"""Autocast and gradient scaling: one policy, for every layer, cell and way of calling them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import LAYERS, STEPS, assert_within_budget, call
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastrnn

layers = pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
cells = pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
sixteen_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
T, B, I, H = 7, 5, 4, 6


def states(layer: nn.RNNBase, dtype: torch.dtype = torch.float32) -> Any:
    groups = layer.num_layers * (2 if layer.bidirectional else 1)
    found = [torch.randn(groups, B, H, dtype=dtype) for _ in range(1 + (layer.mode == "LSTM"))]
    return tuple(found) if len(found) > 1 else found[0]


def to(value: Any, dtype: torch.dtype) -> Any:
    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    return torch.utils._pytree.tree_map_only(Tensor, cast, value)


def gradients(module: nn.Module, result: Any) -> list[Tensor]:
    loss = sum(t.float().square().sum() for t in tree_leaves(result) if t is not None)
    return list(torch.autograd.grad(loss, list(module.parameters())))  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["plain", "hx", "lengths", "reset", "reset_hx", "return_states"])
@sixteen_bits
@layers
def test_layer_computes_in_autocasts_dtype(
    torch_kind: Any, kind: Any, options: Any, dtype: torch.dtype, how: str
) -> None:
    """The same bits as a layer that was cast by hand; weight gradients in the weights' float32."""
    if how == "return_states":
        if torch_kind is not nn.LSTM:
            pytest.skip("only LSTM has cell states")
        options = {"return_states": True}
    layer = kind(I, H, 2, bidirectional=True, **options)
    lower = copy.deepcopy(layer).to(dtype)
    x = torch.randn(T, B, I)
    hx = states(layer) if how == "hx" else None
    given: dict[str, Any] = {}
    if how == "lengths":
        given["lengths"] = torch.tensor([3, 0, 7, 1, 5])
    if how.startswith("reset"):
        given["reset"] = torch.rand(T, B) < 0.3
    if how == "reset_hx":
        given["reset_hx"] = states(layer)
    with torch.autocast("cpu", dtype=dtype):
        found = layer(x, hx, **given)
    expected = lower(x.to(dtype), to(hx, dtype), **to(given, dtype))
    assert {t.dtype for t in tree_leaves(found)} == {dtype}
    assert all(map(torch.equal, tree_leaves(found), tree_leaves(expected)))
    for p, q in zip(gradients(layer, found), gradients(lower, expected), strict=True):
        assert p.dtype == torch.float32
        assert torch.equal(p, q.float())


@layers
def test_sixteen_bit_input(torch_kind: Any, kind: Any, options: Any) -> None:
    """What the layer before it made under autocast, with states of any precision."""
    layer = kind(I, H, **options)
    x, hx = torch.randn(T, B, I), states(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x, hx)
        for state in (hx, to(hx, torch.bfloat16), to(hx, torch.float16)):
            found = layer(x.bfloat16(), state)
            assert {t.dtype for t in tree_leaves(found)} == {torch.bfloat16}
        again = layer(x.bfloat16(), to(hx, torch.bfloat16))
    assert torch.equal(again[0], expected[0])


@sixteen_bits
@cells
def test_cell_computes_in_the_dtype_of_its_weights(
    torch_kind: Any, kind: Any, options: Any, dtype: torch.dtype
) -> None:
    """A state that is handed on from step to step stays in float32, over a 16-bit input."""
    cell, xs = kind(I, H, **options), torch.randn(T, B, I, dtype=dtype)

    def unroll(xs: Tensor) -> Any:
        state = None
        for x in xs:
            state = cell(x, state)
        return state

    expected = unroll(xs.float())
    with torch.autocast("cpu", dtype=dtype):
        found = unroll(xs)
    assert {t.dtype for t in tree_leaves(found)} == {torch.float32}
    assert all(map(torch.equal, tree_leaves(found), tree_leaves(expected)))
    for p, q in zip(gradients(cell, found), gradients(cell, expected), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS[:3])
def test_accumulation_is_wider_than_the_data(torch_kind: Any, kind: Any, options: Any) -> None:
    """Over 60 steps we are within the budget of torch.nn in the same 16 bits, against float64."""
    layer = kind(32, 48, **options).bfloat16()
    theirs = torch_kind(32, 48, **options).bfloat16()
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(60, 2, 32).bfloat16()
    exact = call(theirs, x.double(), None, torch.float64)
    plain = call(theirs, x, None, torch.bfloat16)
    ours = call(layer, x, None, torch.bfloat16)
    assert_within_budget(ours, plain, exact, torch.bfloat16, 120 + 32 + 48)


@layers
def test_nested_and_disabled(torch_kind: Any, kind: Any, options: Any) -> None:
    layer, x = kind(I, H, 2, **options), torch.randn(T, B, I)
    expected, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, _ = layer(x)
        with torch.autocast("cpu", enabled=False):
            plain, _ = layer(x)
            with torch.autocast("cpu", dtype=torch.float16):
                half, _ = layer(x)
            with pytest.raises(ValueError, match="does not match weight dtype"):
                layer(x.bfloat16())
        again, _ = layer(x)
    assert (low.dtype, plain.dtype, half.dtype) == (torch.bfloat16, torch.float32, torch.float16)
    assert torch.equal(plain, expected)
    assert torch.equal(again, low)
    with torch.autocast("cpu", enabled=False):
        assert torch.equal(layer(x)[0], expected)


class Model(nn.Module):
    def __init__(self, kind: Any, options: Any) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(I, I), kind(I, H, 2, **options)
        self.after = nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(self.layer(self.before(x))[0])
        return result


@sixteen_bits
@layers
def test_gradient_scaler(torch_kind: Any, kind: Any, options: Any, dtype: torch.dtype) -> None:
    """Scaled steps give what unscaled ones give; a step with an overflow is left out."""
    torch.manual_seed(0)
    model = Model(kind, options)
    twin = copy.deepcopy(model)
    x, target = torch.randn(T, B, I), torch.randn(T, B, 1)
    losses: list[list[float]] = []
    for module, scaler in ((model, torch.amp.GradScaler("cpu", init_scale=2.0**8)), (twin, None)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        losses.append([])
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = (module(x).float() - target).square().mean()
            losses[-1].append(loss.item())
            if scaler is None:
                loss.backward()
                optimizer.step()
                continue
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 100.0)
            scaler.step(optimizer)
            scaler.update()
    scaled, plain = torch.tensor(losses)
    assert scaled[-1] < scaled[0]
    # A power of two changes no mantissa, but where a gradient is subnormal in 16 bits.
    torch.testing.assert_close(scaled, plain, rtol=torch.finfo(dtype).eps, atol=0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    scaler.scale(model(x).mean()).backward()
    scaler.step(optimizer)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("autocast", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize(("torch_kind", "kind", "options"), [*LAYERS, *STEPS])
def test_meta_device_has_no_autocast(
    torch_kind: Any, kind: Any, options: Any, autocast: bool
) -> None:
    """As in torch.nn: what is there keeps the dtype of the weights."""
    x = torch.randn(T, I, device="meta")
    with torch.autocast("cpu", enabled=autocast):
        theirs, ours = (
            tree_leaves(k(I, H, device="meta", **options)(x)) for k in (torch_kind, kind)
        )
        if issubclass(kind, nn.RNNBase):
            (explained,) = fastrnn.explain(kind(I, H, device="meta", **options), x)
            assert explained.problem.dtype == torch.float32
    assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in theirs]


@layers
def test_compiled(torch_kind: Any, kind: Any, options: Any) -> None:
    torch._dynamo.reset()
    layer = kind(I, H, 2, bidirectional=True, **options)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for k, steps in enumerate((6, 9)):
        x = torch.randn(steps, B, I)
        lengths = torch.tensor([3, 0, 5, 1, 2])
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch._dynamo.config.patch(error_on_recompile=k > 0),
        ):
            expected, found = layer(x, lengths=lengths), compiled(x, lengths=lengths)
        assert {t.dtype for t in tree_leaves(found)} == {torch.bfloat16}
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(layer, found), gradients(layer, expected))


@cells
def test_compiled_cell(torch_kind: Any, kind: Any, options: Any) -> None:
    torch._dynamo.reset()
    cell, x = kind(I, H, **options), torch.randn(B, I).bfloat16()
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x), cell(x))


def test_dtypes_that_are_not_those_of_torch_nn() -> None:
    """What docs/amp.md says of the two: on the CPU, with an input of float32."""
    x = torch.randn(5, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.GRU(4, 6)(x)[0].dtype == torch.float32
        assert nn.RNN(4, 6)(x)[0].dtype == nn.RNNCell(4, 6)(x[0]).dtype == torch.bfloat16
        assert nn.GRUCell(4, 6)(x[0]).dtype == torch.float32
        for layer in (fastrnn.LSTM(4, 6), fastrnn.GRU(4, 6), fastrnn.RNN(4, 6)):
            assert layer(x)[0].dtype == torch.bfloat16
        assert fastrnn.RNNCell(4, 6)(x[0]).dtype == fastrnn.GRUCell(4, 6)(x[0]).dtype
        assert fastrnn.RNNCell(4, 6)(x[0]).dtype == torch.float32
