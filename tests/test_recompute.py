"""recompute=k: the same numbers from less memory, whatever the chunks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from helpers import (
    BACKEND_NAMES,
    LAYERS,
    Case,
    Inputs,
    Truth,
    as_function,
    collect,
    make_inputs,
    run,
    using,
)
from torch import Tensor, nn

import fastrnn
from fastrnn import functional
from fastrnn.backends import by_name
from fastrnn.cells import CELLS

CASES = [
    Case(9, 3, 5, 17),
    Case(9, 3, 5, 16, reverse=(True,), hx=False),
    Case(9, 3, 5, 17, reverse=(False, True)),
    Case(9, 3, 5, 17, reverse=(False, True), lengths=(9, 6, 2)),
    Case(9, 3, 5, 17, reverse=(False, True), lengths=(9, 6, 2), hx=False),
    Case(9, 4, 5, 17, reverse=(False, True), ends=(0, 9, 4, 3)),
    Case(9, 4, 5, 17, reverse=(False, True), cuts=0.4, to=True),
    Case(9, 4, 5, 17, reverse=(True,), ends=(0, 9, 4, 3), cuts=0.4, hx=False),
    Case(9, 4, 5, 17, ends=(8, 9, 1, 3), cuts=0.4, to=True, every=True, bias=False),
    Case(9, 4, 5, 17, reverse=(False, True, True, False), cuts=0.3, to=True, grouped=True),
    Case(9, 3, 5, 17, reverse=(False, True), layout="batch_first", every=True),
]


def recomputed(
    cell: str, case: Case, inputs: Inputs, backend: str, every: int
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Leaves and outputs of a layer that keeps only every k-th state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "layer", functools.partial(functional.layer, recompute=every))
        leaves, layer = as_function(cell, case, inputs)
        with using(backend):
            outputs = layer(*leaves)
    assert f"+recompute{every}" in outputs[0].grad_fn.route.backend.name
    return leaves, outputs


def results(
    cell: str, case: Case, inputs: Inputs, backend: str, every: int = 4
) -> dict[str, Tensor]:
    return collect(recomputed(cell, case, inputs, backend, every)[1], inputs)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_gradients_are_within_the_budget(
    cell: str, dtype: torch.dtype, case: Case, backend: str
) -> None:
    found = results(cell, case, make_inputs(cell, case, dtype), backend)
    Truth(cell, case, dtype).check(found)


@pytest.mark.parametrize("every", [1, 3, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_chunks_do_not_matter(cell: str, case: Case, every: int, backend: str) -> None:
    expected = run(cell, case, make_inputs(cell, case, torch.float64), backend)
    found = results(cell, case, make_inputs(cell, case, torch.float64), backend, every)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-11, atol=1e-12)


def test_projection_within_the_budget() -> None:
    case = Case(9, 4, 5, 17, P=3, reverse=(False, True), ends=(8, 9, 1, 3), cuts=0.4, every=True)
    found = results("lstm", case, make_inputs("lstm", case, torch.float32), "reference")
    Truth("lstm", case, torch.float32).check(found)


@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_on_repeat(cell: str) -> None:
    case = Case(50, 3, 20, 33, reverse=(False, True))
    first, again = (
        results(cell, case, make_inputs(cell, case, torch.float32), "cpu", 16) for _ in range(2)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("missing", ["x", "state0", "state1", "weight0", "weight5"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_frozen_inputs_change_no_other_gradient(missing: str, backend: str) -> None:
    case = Case(9, 3, 5, 17, reverse=(False, True))
    expected = results("lstm", case, make_inputs("lstm", case, torch.float64), backend)
    inputs = make_inputs("lstm", case, torch.float64)
    inputs.leaves[missing].requires_grad_(False)
    _, outputs = recomputed("lstm", case, inputs, backend, 4)
    torch.autograd.backward(outputs, inputs.grads)
    for name, leaf in inputs.leaves.items():
        if name == missing:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[f"d{name}"], rtol=0, atol=1e-13)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_double_backward(cell: str, backend: str) -> None:
    case = Case(5, 2, 3, 4, cuts=0.3, to=True)
    leaves, _ = as_function(cell, case, make_inputs(cell, case, torch.float64))
    with pytest.MonkeyPatch.context() as patch, using(backend):
        patch.setattr(functional, "layer", functools.partial(functional.layer, recompute=2))
        _, layer = as_function(cell, case, make_inputs(cell, case, torch.float64))
        assert torch.autograd.gradcheck(layer, leaves)
        assert torch.autograd.gradgradcheck(layer, leaves)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_it_keeps_less(backend: str) -> None:
    def kept(recompute: int) -> int:
        layer = fastrnn.LSTM(8, 16, recompute=recompute)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with fastrnn.backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(torch.randn(256, 4, 8))
        return sum(sizes.values())

    assert kept(32) * 3 < kept(0)


@pytest.mark.parametrize(("theirs", "ours", "options"), LAYERS)
def test_layers_take_it(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    layer = ours(5, 7, 2, **options, bidirectional=True, recompute=4)
    plain = ours(5, 7, 2, **options, bidirectional=True)
    plain.load_state_dict(layer.state_dict())
    assert layer.recompute == 4
    assert "recompute" not in vars(plain)
    x = torch.randn(10, 3, 5)
    found, expected = layer(x)[0], plain(x)[0]
    torch.testing.assert_close(found, expected)
    dy = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, list(layer.parameters()), dy),
        torch.autograd.grad(expected, list(plain.parameters()), dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    short = layer(x[:3])[0].grad_fn.route.backend  # nothing to gain
    assert "+recompute" not in short.name
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
@pytest.mark.parametrize("kind", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_bad_values_are_refused(kind: Any, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="recompute should be"):
        kind(3, 4, recompute=value)


def test_lengths_are_checked_as_without_it() -> None:
    layer = fastrnn.GRU(3, 4, recompute=2)
    for lengths in ([7, 1], [-1, 2]):
        with pytest.raises(ValueError, match="lengths must be between 0 and 6"):
            layer(torch.randn(6, 2, 3), lengths=torch.tensor(lengths))


def test_conversion_knows_nothing_of_it() -> None:
    layer = fastrnn.convert(nn.LSTM(3, 4))
    assert layer.recompute == 0
    layer.recompute = 2
    assert "+recompute2" in layer(torch.randn(6, 2, 3))[0].grad_fn.route.backend.name


def test_under_torch_func_it_changes_nothing() -> None:
    layer = fastrnn.GRU(3, 4, recompute=2)
    x = torch.randn(6, 2, 3)
    found = torch.func.grad(lambda x: layer(x)[0].sum())(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(layer(x)[0].sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_operators_take_it_by_name(cell: str) -> None:
    assert by_name("cpu+recompute8").name == "cpu+recompute8"
    with pytest.raises(ValueError, match="unknown fastrnn backend 'none"):
        by_name("none+recompute8")
    inputs = make_inputs(cell, Case(6, 2, 3, 4), torch.float32)
    x, *states = (t.detach() for t in (inputs.x, *inputs.states))
    weights = [w.detach() for w in inputs.weights if w is not None]
    arguments = (
        cell, "cpu+recompute4", x, None, None, None, [*states, None, None, None][:4], weights,
        [False], 2, True, False,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.fastrnn.forward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_compiled() -> None:
    layer = fastrnn.LSTM(3, 4, bidirectional=True, recompute=4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (10, 13):
        x = torch.randn(T, 2, 3, requires_grad=True)
        dy = torch.randn(T, 2, 8)
        found = torch.autograd.grad(compiled(x)[0], [x, *layer.parameters()], dy)
        expected = torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], dy)
        torch.testing.assert_close(found, expected)
