"""Gradients: any subset of them, any subset of the outputs, and what happens beyond first order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKEND_NAMES, Case, as_function, make_inputs, using
from torch import Tensor

import fastrnn
from fastrnn import functional
from fastrnn.autograd import Route
from fastrnn.backends import Problem, by_name
from fastrnn.cells import CELLS

pytestmark = [
    pytest.mark.parametrize("backend", BACKEND_NAMES),
    pytest.mark.parametrize("cell", CELLS),
]
CASE = Case(5, 3, 4, 7, reverse=(False, True))


def leaves_and_call(cell: str, case: Case = CASE) -> tuple[list[Tensor], Any]:
    """Double leaves, and the layer as a function of them that returns all its outputs."""
    return as_function(cell, case, make_inputs(cell, case, torch.float64))


def loss_of(outputs: tuple[Tensor, ...], used: Any = None) -> Tensor:
    chosen = outputs if used is None else [outputs[k] for k in used]
    return torch.stack([(o * o.cos()).sum() for o in chosen]).sum()


@pytest.mark.parametrize(
    "case",
    [
        Case(3, 2, 3, 4),
        Case(2, 1, 2, 3, hx=False, bias=False),
        Case(4, 3, 2, 3, lengths=(4, 2, 1), reverse=(False, True)),
        Case(3, 2, 3, 4, P=2, reverse=(False, True)),
        Case(4, 3, 2, 4, P=3, lengths=(4, 4, 1), bias=False),
        Case(4, 3, 2, 3, ends=(2, 0, 4), reverse=(False, True)),
        Case(5, 3, 2, 3, cuts=0.3, to=True, reverse=(False, True)),
        Case(5, 3, 2, 3, ends=(3, 5, 1), cuts=0.3, to=True, hx=False, reverse=(True,)),
        Case(4, 2, 2, 3, every=True, reverse=(False, True)),
        Case(4, 3, 2, 3, ends=(2, 0, 4), cuts=0.3, every=True, reverse=(False, True)),
        Case(3, 2, 2, 3, grouped=True, reverse=(False, True, False)),
    ],
    ids=str,
)
def test_gradcheck(cell: str, backend: str, case: Case) -> None:
    leaves, layer = leaves_and_call(cell, case)
    if case.P and CELLS[cell].states == 1:
        with pytest.raises(RuntimeError, match="has no projection"):
            layer(*leaves)
        return
    with using(backend):
        assert torch.autograd.gradcheck(layer, leaves)


def test_any_subset_of_inputs(cell: str, backend: str) -> None:
    """Each alone, each left out, and a sample of all combinations; the same values whatever is
    asked."""
    leaves, layer = leaves_and_call(cell)
    with using(backend):
        expected = torch.autograd.grad(loss_of(layer(*leaves)), leaves)
    everyone = range(len(leaves))
    subsets = [{k} for k in everyone] + [set(everyone) - {k} for k in everyone]
    subsets += [set(s) for s in list(itertools.combinations(everyone, 3))[::5]]
    for wanted in subsets:
        given = [t.detach().requires_grad_(k in wanted) for k, t in enumerate(leaves)]
        with using(backend):
            found = torch.autograd.grad(loss_of(layer(*given)), [given[k] for k in sorted(wanted)])
        for k, grad in zip(sorted(wanted), found, strict=True):
            torch.testing.assert_close(grad, expected[k])


def test_any_subset_of_outputs(cell: str, backend: str) -> None:
    leaves, layer = leaves_and_call(cell)
    outputs = 1 + CELLS[cell].states
    with using("reference"):
        truth = layer(*leaves)
    for size in range(1, outputs + 1):
        for used in itertools.combinations(range(outputs), size):
            with using(backend):
                found = torch.autograd.grad(loss_of(layer(*leaves), used), leaves)
            expected = torch.autograd.grad(loss_of(truth, used), leaves, retain_graph=True)
            torch.testing.assert_close(found, expected)


def test_no_output_used(cell: str, backend: str) -> None:
    leaves, layer = leaves_and_call(cell)
    with using(backend):
        y, *_ = layer(*leaves)
    found = torch.autograd.grad((y * 0).sum() + leaves[0].sum(), leaves)
    assert torch.equal(found[0], torch.ones_like(leaves[0]))
    assert all((g == 0).all() for g in found[1:])


def test_retain_graph_and_accumulation(cell: str, backend: str) -> None:
    leaves, layer = leaves_and_call(cell)
    with using(backend):
        loss = loss_of(layer(*leaves))
    loss.backward(retain_graph=True)
    first = [t.grad.clone() for t in leaves if t.grad is not None]
    loss.backward()
    for once, leaf in zip(first, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_incoming_gradient_of_any_strides(cell: str, backend: str) -> None:
    leaves, layer = leaves_and_call(cell)
    found = []
    for view in (lambda t: t, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
        with using(backend):
            outputs = layer(*leaves)
        grads = [view(torch.ones_like(o).cumsum(0)) for o in outputs]
        found.append(torch.autograd.grad(outputs, leaves, grads))
    torch.testing.assert_close(found[0], found[1])
    with using(backend):
        outputs = layer(*leaves)
    expanded = torch.autograd.grad(outputs[0].sum(), leaves)  # a gradient of stride 0
    with using("reference"):
        expected = torch.autograd.grad(layer(*leaves)[0].sum(), leaves)
    torch.testing.assert_close(expanded, expected)


@pytest.mark.parametrize("loss_like", [loss_of, lambda outputs: outputs[0].sum()])
def test_double_backward(cell: str, backend: str, loss_like: Any) -> None:
    """Also where the incoming gradient is a constant, as that of a sum is."""
    leaves, layer = leaves_and_call(cell)
    with using("reference"):
        grads = torch.autograd.grad(loss_like(layer(*leaves)), leaves, create_graph=True)
    expected = grads
    with using(backend):
        grads = torch.autograd.grad(loss_like(layer(*leaves)), leaves, create_graph=True)
    torch.testing.assert_close(grads, expected)
    penalties = [torch.stack([g.square().sum() for g in kind]).sum() for kind in (grads, expected)]
    ours, theirs = (torch.autograd.grad(p, leaves, materialize_grads=True) for p in penalties)
    torch.testing.assert_close(ours, theirs)
    with using(backend):
        assert torch.autograd.gradgradcheck(
            lambda *last: loss_like(layer(*leaves[:-2], *last)), leaves[-2:]
        )


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_create_graph_leaves_usable_gradients(cell: str, backend: str) -> None:
    leaves, layer = leaves_and_call(cell)
    with using(backend):
        layer(*leaves)[0].sum().backward(create_graph=True)
    with torch.no_grad():
        for leaf in leaves:
            assert leaf.grad is not None
            leaf -= leaf.grad
            leaf.grad = None


def test_in_place_change_of_a_saved_tensor_raises(cell: str, backend: str) -> None:
    leaves, layer = leaves_and_call(cell)
    with using(backend):
        y, *_ = layer(*leaves)
    with torch.no_grad():
        leaves[-3].mul_(2)  # w_hh of the last group
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_change_of_the_output_is_right_or_raises(cell: str, backend: str) -> None:
    """torch.nn's LSTM raises here too, its GRU and RNN on CPU do not."""
    leaves, layer = leaves_and_call(cell)
    with using(backend):
        expected = torch.autograd.grad((layer(*leaves)[0] * 3).square().sum(), leaves)
        y, *_ = layer(*leaves)
        loss = y.mul_(3).square().sum()
    if by_name(backend).differentiable:
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_grad_saves_nothing(cell: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither under no_grad or inference_mode nor when nothing asks for a gradient."""
    reference = by_name("reference")
    asked: list[bool] = []

    def spy_on(forward: Callable[..., Any]) -> Callable[..., Any]:
        def spy(first: Any, *others: Any) -> Any:
            problem = first if isinstance(first, Problem) else first.problem
            asked.extend((problem.grad, others[-1]))
            return forward(first, *others)

        return spy

    monkeypatch.setattr(reference, "forward", spy_on(reference.forward))
    monkeypatch.setattr(Route, "forward", spy_on(Route.forward))
    leaves, layer = leaves_and_call(cell)
    with using(backend):
        with torch.no_grad():
            outputs = layer(*leaves)
        assert not any(o.requires_grad for o in outputs)
        with torch.inference_mode():
            assert all(o.is_inference() for o in layer(*leaves))
        outputs = layer(*(t.detach() for t in leaves))
        assert not any(o.requires_grad for o in outputs)
    assert asked
    assert not any(asked)


def test_inference_tensors(cell: str, backend: str) -> None:
    leaves, layer = leaves_and_call(cell)
    with torch.inference_mode():
        given = [t.clone() for t in leaves]
        with using(backend):
            found = layer(*given)
    with using(backend), torch.no_grad():
        expected = layer(*leaves)
    assert all(map(torch.equal, expected, found))


def test_saved_tensor_hooks_see_what_is_saved(cell: str, backend: str) -> None:
    leaves, layer = leaves_and_call(cell)
    with using(backend):
        expected = torch.autograd.grad(loss_of(layer(*leaves)), leaves)
        with torch.autograd.graph.save_on_cpu():
            outputs = layer(*leaves)
    found = torch.autograd.grad(loss_of(outputs), leaves)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(cell: str, backend: str, reentrant: bool) -> None:
    leaves, layer = leaves_and_call(cell)
    with using(backend):
        expected = torch.autograd.grad(loss_of(layer(*leaves)), leaves)
        outputs = torch.utils.checkpoint.checkpoint(layer, *leaves, use_reentrant=reentrant)
        loss_of(outputs).backward()
    torch.testing.assert_close([t.grad for t in leaves], list(expected))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torch_func_transforms(cell: str, backend: str) -> None:
    """More of them are in test_transforms.py; forward mode needs plain torch."""
    leaves, layer = leaves_and_call(cell)
    directions = tuple(torch.randn_like(t) for t in leaves)

    def scalar(*leaves: Tensor) -> Tensor:
        return loss_of(layer(*leaves))

    everyone = tuple(range(len(leaves)))
    with fastrnn.backend(None):
        expected = torch.autograd.grad(scalar(*leaves), leaves)
        torch.testing.assert_close(torch.func.grad(scalar, everyone)(*leaves), expected)
        slope: Tensor = torch.func.jvp(scalar, tuple(leaves), directions)[1]
        dot = torch.stack([(g * d).sum() for g, d in zip(expected, directions, strict=True)]).sum()
        torch.testing.assert_close(slope, dot)
        two = [torch.stack([t.detach(), -t.detach()]) for t in leaves]
        batched = torch.func.vmap(layer)(*two)
        for k, sign in enumerate((1, -1)):
            alone = layer(*(sign * t for t in leaves))
            torch.testing.assert_close([o[k] for o in batched], list(alone))
    if by_name(backend).differentiable:
        return
    with fastrnn.backend(backend), pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(scalar, tuple(leaves), directions)


def test_batched_incoming_gradients(cell: str, backend: str) -> None:
    leaves, layer = leaves_and_call(cell)
    with using(backend):
        outputs = layer(*leaves)
    grads = [torch.randn(3, *o.shape, dtype=o.dtype) for o in outputs]
    for used in (slice(0, 1), slice(0, None), slice(1, None)):
        kept, given = outputs[used], grads[used]
        found = torch.autograd.grad(kept, leaves, given, retain_graph=True, is_grads_batched=True)
        for k in range(3):
            expected = torch.autograd.grad(kept, leaves, [g[k] for g in given], retain_graph=True)
            torch.testing.assert_close([f[k] for f in found], list(expected))
    x = leaves[0].detach()

    def of_x(x: Tensor) -> Tensor:
        y: Tensor = layer(x, *leaves[1:])[0]
        return y.sum(0)

    with using(backend):
        slow, fast = (
            torch.autograd.functional.jacobian(of_x, x, vectorize=v) for v in (False, True)
        )
    torch.testing.assert_close(slow, fast)


def test_backward_uses_the_backend_of_its_forward(cell: str, backend: str) -> None:
    leaves, layer = leaves_and_call(cell)
    with using(backend):
        loss = loss_of(layer(*leaves))
    other = next(name for name in BACKEND_NAMES if name != backend)
    with fastrnn.backend(other):
        found = torch.autograd.grad(loss, leaves)
    with using(backend):
        expected = torch.autograd.grad(loss_of(layer(*leaves)), leaves)
    assert all(map(torch.equal, found, expected))


def test_same_tensor_in_several_places(cell: str, backend: str) -> None:
    """One weight tensor for both directions and one tensor for all biases: gradients add up."""
    x = torch.randn(4, 2, 7, dtype=torch.float64, requires_grad=True)
    rows = CELLS[cell].gates * 7
    w = (torch.randn(rows, 7, dtype=torch.float64) / 3).requires_grad_()
    b = torch.randn(rows, dtype=torch.float64, requires_grad=True)
    found = []
    for name in (backend, "reference"):
        with using(name):
            y, _, _ = functional.layer(cell, x, None, [w, w, b, b] * 2, (False, True))
        found.append(torch.autograd.grad(loss_of((y,)), (x, w, b)))
    torch.testing.assert_close(found[0], found[1])
