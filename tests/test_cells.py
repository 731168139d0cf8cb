"""LSTMCell, GRUCell and RNNCell against torch.nn's, on every backend."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from helpers import BACKEND_NAMES, STEPS, check_module, using
from torch import Tensor, nn

import fastrnn
from fastrnn.cells import CELLS

B, I, H = 5, 4, 9


def states(torch_kind: Any, *lead: int) -> Any:
    h = torch.randn(*lead, H)
    return (h, torch.randn(*lead, H)) if torch_kind is nn.LSTMCell else h


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("lead", [(B,), (1,), ()])
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_step(
    torch_kind: Any,
    kind: Any,
    options: Any,
    backend: str,
    lead: tuple[int, ...],
    given: bool,
    bias: bool,
) -> None:
    theirs, ours = torch_kind(I, H, bias=bias, **options), kind(I, H, bias=bias, **options)
    hx = states(torch_kind, *lead) if given else None
    check_module(theirs, ours, torch.randn(*lead, I), hx, backend=backend)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_steps_in_a_loop_equal_the_layer(
    torch_kind: Any, kind: Any, options: Any, backend: str
) -> None:
    step = kind(I, H, dtype=torch.float64, **options)
    name = kind.__name__.removesuffix("Cell")
    layer = getattr(fastrnn, name)(I, H, dtype=torch.float64, **options)
    layer.load_state_dict({f"{k}_l0": v for k, v in step.state_dict().items()})
    x = torch.randn(7, B, I, dtype=torch.float64)
    hx: Any = None
    with using(backend):
        expected, _ = layer(x)
        for t, row in enumerate(x):
            hx = step(row, hx)
            torch.testing.assert_close(as_tuple(hx)[0], expected[t])


@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_construction(torch_kind: Any, kind: Any, options: Any) -> None:
    for bias in (True, False):
        modules = []
        for k in (torch_kind, kind):
            torch.manual_seed(3)
            modules.append(k(I, H, bias=bias, **options))
        theirs, ours = modules
        assert repr(theirs) == repr(ours)
        assert list(theirs.state_dict()) == list(ours.state_dict())
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            assert torch.equal(p, q)
    assert ours.bias_ih is None
    assert ours.bias_hh is None
    assert "bias_ih" in ours._parameters
    expected = list(inspect.signature(torch_kind).parameters)
    assert list(inspect.signature(kind).parameters) == expected
    half = kind(I, H, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in half.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_list_of_states_and_empty_batch(
    torch_kind: Any, kind: Any, options: Any, backend: str
) -> None:
    theirs, ours = torch_kind(I, H, **options), kind(I, H, **options)
    if torch_kind is nn.LSTMCell:
        check_module(theirs, ours, torch.randn(B, I), list(states(torch_kind, B)), backend=backend)
    with using(backend):
        result = ours(torch.randn(0, I))
    assert {t.shape for t in as_tuple(result)} == {(0, H)}


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_autocast_leaves_a_step_in_the_dtype_of_its_weights(
    torch_kind: Any, kind: Any, options: Any, backend: str
) -> None:
    ours = kind(I, H, **options)
    x, hx = torch.randn(B, I).bfloat16(), states(torch_kind, B)
    with using(backend):
        expected = ours(x.float(), hx)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = ours(x, hx)
    for a, b in zip(as_tuple(found), as_tuple(expected), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("lead", [(B,), ()])
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_states_can_be_detached_in_place(
    torch_kind: Any, kind: Any, options: Any, lead: tuple[int, ...], backend: str, grad: bool
) -> None:
    """As loops over chunks of a sequence do; a view cannot."""
    step, hx = kind(I, H, **options), None
    with using(backend), torch.set_grad_enabled(grad):
        for _ in range(2):
            hx = step(torch.randn(*lead, I), hx)
            for state in as_tuple(hx):
                assert state.requires_grad == grad
                state.detach_()
                assert not state.requires_grad


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_states_can_be_edited_in_place(
    torch_kind: Any, kind: Any, options: Any, backend: str, create_graph: bool
) -> None:
    """With the gradients of the same loop out of place in torch.nn, whose RNN cells save them."""
    double = {"dtype": torch.float64}
    theirs, ours = torch_kind(I, H, **options, **double), kind(I, H, **options, **double)
    ours.load_state_dict(theirs.state_dict())
    x, mask = torch.randn(3, B, I, **double), torch.rand(B, H, **double)

    def gradients(step: nn.Module, edit: Any) -> Any:
        leaf, hx, total = x.clone().requires_grad_(), None, torch.zeros((), **double)
        wanted = (leaf, *step.parameters())
        for row in leaf:
            edited = [edit(state, mask) for state in as_tuple(step(row, hx))]
            total = total + sum(state.sum() for state in edited)
            hx = tuple(edited) if len(edited) > 1 else edited[0]
        found = torch.autograd.grad(total, wanted, create_graph=create_graph)
        if not create_graph:
            return found
        return torch.autograd.grad(sum(g.square().sum() for g in found), wanted)

    with using(backend):
        found = gradients(ours, Tensor.mul_)
    torch.testing.assert_close(found, gradients(theirs, Tensor.mul))


@pytest.mark.parametrize("name", CELLS)
def test_every_cell_tells_its_shapes(name: str) -> None:
    """The table that the kernels and the layers rely on agrees with the step itself."""
    cell = CELLS[name]
    assert cell.name == name
    gates = torch.randn(3, cell.gates * H, dtype=torch.float64, requires_grad=True)
    again = torch.randn(3, cell.gates * H, dtype=torch.float64, requires_grad=True)
    old = tuple(torch.randn(3, H, dtype=torch.float64) for _ in range(cell.states))
    new = cell.step(gates, again, old)
    assert [s.shape for s in new] == [(3, H)] * cell.states
    dx, dh = torch.autograd.grad(new[0].sum(), (gates, again))
    assert torch.equal(dx, dh) == cell.shared_dgates
