"""Gradients of gradients: exact, of any order, and paid for only where they are asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import BACKEND_NAMES, STEPS, Case, as_function, make_inputs, using
from torch import Tensor, nn

import fastrnn
from fastrnn.backends import by_name
from fastrnn.cells import CELLS

backends = pytest.mark.parametrize("backend", BACKEND_NAMES)
cells = pytest.mark.parametrize("cell", CELLS)
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "gradient_penalty.py"


def leaves_and_call(cell: str, case: Case) -> tuple[list[Tensor], Any]:
    return as_function(cell, case, make_inputs(cell, case, torch.float64))


def scalar(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(o * o.cos()).sum() for o in outputs]).sum()


@cells
@backends
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, 2, 2),
        Case(2, 1, 1, 2, hx=False, bias=False, reverse=(False, True)),
        Case(2, 2, 1, 2, lengths=(2, 1), reverse=(True,)),
        Case(2, 2, 1, 2, P=1),
        Case(3, 2, 1, 2, ends=(3, 1), cuts=0.4, to=True, hx=False),
        Case(2, 1, 1, 2, every=True),
    ],
    ids=str,
)
def test_gradgradcheck(cell: str, backend: str, case: Case) -> None:
    if case.P and CELLS[cell].states == 1:
        pytest.skip(f"{cell} has no projection")
    leaves, layer = leaves_and_call(cell, case)
    with using(backend):
        assert torch.autograd.gradgradcheck(layer, leaves)


@backends
@pytest.mark.parametrize(("_theirs", "step", "options"), STEPS)
def test_gradgradcheck_of_the_cells(
    _theirs: Any, step: Any, options: dict[str, Any], backend: str
) -> None:
    module = step(2, 3, dtype=torch.float64, **options)
    names, weights = zip(*module.named_parameters(), strict=True)
    states = 2 if step is fastrnn.LSTMCell else 1
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    hx = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(states)]

    def function(x: Tensor, *rest: Tensor) -> Any:
        given = dict(zip(names, rest[states:], strict=True))
        hx = tuple(rest[:states]) if states > 1 else rest[0]
        return torch.func.functional_call(module, given, (x, hx))

    with using(backend):
        assert torch.autograd.gradgradcheck(function, (x, *hx, *weights))


@cells
@backends
def test_third_derivative(cell: str, backend: str) -> None:
    leaves, layer = leaves_and_call(cell, Case(2, 1, 2, 2, hx=False, bias=False))

    def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
        with using(backend):
            loss = scalar(layer(*leaves))
        return torch.autograd.grad(loss, leaves, create_graph=True)

    assert torch.autograd.gradgradcheck(gradients, leaves)


@cells
@backends
@pytest.mark.parametrize("reverse", [(False,), (False, True)])
def test_stacked_layers(cell: str, backend: str, reverse: tuple[bool, ...]) -> None:
    """Against torch.nn's own, which differentiates twice on a CPU."""
    options: dict[str, Any] = {"bidirectional": len(reverse) > 1, "dtype": torch.float64}
    kind = cell.split("_")[0].upper()
    if kind == "RNN":
        options["nonlinearity"] = cell.split("_")[1]
    theirs = getattr(nn, kind)(3, 5, 2, **options)
    ours = fastrnn.convert(nn.ModuleList([theirs]))[0]
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for module, name in ((ours, backend), (theirs, "reference")):
        with using(name):
            y, _ = module(x)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        penalty = (slope.norm(dim=-1) - 1).square().sum()
        found.append((slope, *torch.autograd.grad(penalty, (x, *module.parameters()))))
    torch.testing.assert_close(found[0], found[1])


@cells
@backends
@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast(cell: str, backend: str, inside: bool) -> None:
    """Whether the gradients are asked for inside of it or after it."""
    case = Case(3, 2, 4, 5)
    inputs = make_inputs(cell, case, torch.float32)
    leaves, layer = as_function(cell, case, inputs)
    with using(backend), torch.autocast("cpu", torch.bfloat16):
        y = layer(*leaves)[0]
        plain = torch.autograd.grad(y.float().square().sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        loss = y.float().square().sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in grads]).sum()
        second = torch.autograd.grad(penalty, leaves)
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in second)
    torch.testing.assert_close(grads, plain, rtol=0.1, atol=0.1)


@cells
def test_memory_only_where_asked_for(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without create_graph, no tensor is kept for a second backward pass and nothing runs again."""
    leaves, layer = leaves_and_call(cell, Case(4, 2, 3, 5, reverse=(False, True)))
    reruns = 0
    reference = by_name("reference")
    forward = reference.forward

    def counted(*arguments: Any) -> Any:
        nonlocal reruns
        reruns += 1
        return forward(*arguments)

    monkeypatch.setattr(reference, "forward", counted)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with using("cpu"):
        loss = scalar(layer(*leaves))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.autograd.grad(loss, leaves, retain_graph=True)
        assert (sum(kept), reruns) == (0, 0)
        torch.autograd.grad(loss, leaves, create_graph=True)
        assert sum(kept) > 0
        assert reruns == 1


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gradient_penalty", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_gradient_penalty_example_trains(cell: str) -> None:
    assert load_example().main(["--cell", cell, "--steps", "80"]) == 0
