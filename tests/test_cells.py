"""LSTMCell, GRUCell and RNNCell against torch.nn's, on every backend."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from helpers import BACKEND_NAMES, REMEMBERS_CALLS, STEPS, check_module, using
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn.cells import CELLS

B, I, H = 5, 4, 9


def states(torch_kind: Any, *lead: int, units: int = H) -> Any:
    h = torch.randn(*lead, units)
    return (h, torch.randn(*lead, units)) if torch_kind is nn.LSTMCell else h


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
        assert repr(ours) == f"fastrnn.{theirs!r}"
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


class Subclass(Tensor):
    pass


@pytest.mark.parametrize("what", ["input", "hx", "weights"])
@pytest.mark.parametrize("lead", [(B,), ()])
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_tensor_subclasses_have_gradients(
    torch_kind: Any, kind: Any, options: Any, lead: tuple[int, ...], what: str
) -> None:
    step, x, hx = kind(I, H, **options), torch.randn(*lead, I), states(torch_kind, *lead)
    expected = as_tuple(step(x, hx))[0]
    wanted = torch.autograd.grad(expected.sum(), list(step.parameters()))
    if what == "input":
        x = x.as_subclass(Subclass)
    elif what == "hx":
        hx = tuple(s.as_subclass(Subclass) for s in hx) if isinstance(hx, tuple) else hx
    else:
        step.weight_hh = nn.Parameter(step.weight_hh.detach().as_subclass(Subclass))
    found = as_tuple(step(x, hx))[0]
    torch.testing.assert_close(Tensor(found), expected)
    gradients = torch.autograd.grad(found.sum(), list(step.parameters()))
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(Tensor(ours), theirs)


@pytest.mark.parametrize("sizes", [(B, 0, H), (B, I, 0), (0, I, H), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_sizes_of_zero(
    torch_kind: Any, kind: Any, options: Any, bias: bool, sizes: tuple[int, int, int]
) -> None:
    """Rows, inputs or units: torch.nn's cells take none of them."""
    rows, inputs, units = sizes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing to initialise
        theirs = torch_kind(inputs, units, bias=bias, **options)
        ours = kind(inputs, units, bias=bias, **options)
    ours.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(rows, inputs), as_tuple(states(torch_kind, rows, units=units))
    found = []
    for step in (theirs, ours):
        leaves = [t.clone().requires_grad_() for t in (x, *hx)]
        new = as_tuple(step(leaves[0], tuple(leaves[1:]) if len(hx) > 1 else leaves[1]))
        gradients = torch.autograd.grad(sum(s.sum() for s in new), [*leaves, *step.parameters()])
        found.append((new, gradients))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_second_derivatives_of_a_step(torch_kind: Any, kind: Any, options: Any) -> None:
    """Of the short path to a kernel as of torch.nn's."""
    double = {"dtype": torch.float64}
    theirs, ours = torch_kind(I, H, **options, **double), kind(I, H, **options, **double)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(B, I, **double)

    def penalty(step: nn.Module) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        total = sum(state.square().sum() for state in as_tuple(step(leaf)))
        (slope,) = torch.autograd.grad(total, leaf, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (leaf, *step.parameters()))

    torch.testing.assert_close(penalty(ours), penalty(theirs))


on_the_short_path = pytest.mark.skipif(
    not REMEMBERS_CALLS, reason="before torch 2.10 steps go the way of layers"
)


@on_the_short_path
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_watched_backward_pass(torch_kind: Any, kind: Any, options: Any) -> None:
    """A mode around the backward pass alone sees torch's operators, and the gradients are right."""
    step, x = kind(I, H, **options), torch.randn(B, I)
    weights = list(step.parameters())
    expected = torch.autograd.grad(as_tuple(step(x))[0].sum(), weights)
    total = as_tuple(step(x))[0].sum()
    with FlopCounterMode(display=False) as counter:
        found = torch.autograd.grad(total, weights)
    assert counter.get_total_flops() > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_one_state_alone_needs_a_gradient(torch_kind: Any, kind: Any, options: Any) -> None:
    theirs, ours = torch_kind(I, H, **options), kind(I, H, **options)
    ours.load_state_dict(theirs.state_dict())
    for step in (theirs, ours):
        step.requires_grad_(False)
    x, hx = torch.randn(B, I), as_tuple(states(torch_kind, B))
    for k in range(len(hx)):
        found = []
        for step in (theirs, ours):
            leaves = [s.clone().requires_grad_(n == k) for n, s in enumerate(hx)]
            new = as_tuple(step(x, tuple(leaves) if len(leaves) > 1 else leaves[0]))
            found.append(torch.autograd.grad(sum(s.sum() for s in new), leaves[k])[0])
        torch.testing.assert_close(*found)


@on_the_short_path
def test_what_a_step_may_be_is_found_out_anew() -> None:
    """Nothing that a remembered step depends on may be forgotten."""
    step, x = fastrnn.GRUCell(I, H), torch.randn(B, I)
    step(x)
    with pytest.raises(RuntimeError, match="inconsistent input_size"):
        step(torch.randn(B, I + 1))
    step.input_size = I + 1
    with pytest.raises(RuntimeError, match="inconsistent input_size"):
        step(x)
    step.input_size = I
    with torch.no_grad():
        assert not step(x).requires_grad
    assert step(x).requires_grad
    with fastrnn.backend("reference"):
        assert "CellStep" not in type(step(x).grad_fn).__name__
    assert "CellStep" in type(step(x).grad_fn).__name__
    with pytest.raises(RuntimeError, match="same dtype"):
        step(x.double())
    step.double()
    assert step(x.double()).dtype == torch.float64


@pytest.mark.parametrize("missing", [(0,), (1,), (0, 1)])
def test_a_state_of_an_lstm_cell_may_not_be_none(missing: tuple[int, ...]) -> None:
    hx: Any = tuple(None if k in missing else torch.randn(B, H) for k in range(2))
    with pytest.raises(
        TypeError, match=rf"expects hx\[{missing[0]}\] to be a tensor, got NoneType"
    ):
        fastrnn.LSTMCell(I, H)(torch.randn(B, I), hx)


def test_a_remembered_step_may_be_forgotten_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, for whose steps there is no more room: here after every look."""

    class Forgetful(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            known = super().__contains__(key)
            self.clear()
            return known

    step, x = fastrnn.RNNCell(I, H), torch.randn(B, I)
    expected = step(x)
    monkeypatch.setattr(fastrnn.step, "_bound", Forgetful(fastrnn.step._bound))
    assert torch.equal(step(x), expected)


def test_remembered_steps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastrnn.step, "_bound", {})
    monkeypatch.setattr(fastrnn.step, "_MOST_BOUND", 3)
    step = fastrnn.RNNCell(I, H)
    for rows in range(1, 9):
        step(torch.zeros(rows, I))
        assert len(fastrnn.step._bound) <= 3
