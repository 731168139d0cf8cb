"""torch.export: any T and B, from one program, with the numbers of eager."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from helpers import LAYERS, STEPS
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastrnn

layers = pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
strictness = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
I, H = 4, 6


class Model(nn.Module):
    """A layer among others, called in the way that the test asks for."""

    def __init__(self, layer: nn.RNNBase, how: str) -> None:
        super().__init__()
        self.before, self.layer, self.how = nn.Linear(I, I), layer, how

    # Without *rest: torch 2.9 cannot run programs of a forward that has it.
    def forward(self, x: Tensor, given: Tensor | None = None, c0: Tensor | None = None) -> Any:
        x = self.before(x)
        if self.how == "hx":
            return self.layer(x, given if c0 is None else (given, c0))
        return self.layer(x) if given is None else self.layer(x, **{self.how: given})

    def arguments(self, T: int, B: int) -> tuple[Tensor, ...]:
        x = torch.randn(T, B, I)
        if self.how == "lengths":
            return x, torch.randint(0, T + 1, (B,)).index_fill(0, torch.tensor([0]), T)
        if self.how == "reset":
            return x, torch.rand(T, B) < 0.3
        if self.how == "hx":
            groups = self.layer.num_layers * (2 if self.layer.bidirectional else 1)
            return x, *(torch.randn(groups, B, H) for _ in range(1 + (self.layer.mode == "LSTM")))
        return (x,)

    def dynamic_shapes(self) -> Any:
        steps, states = {0: "T", 1: "B"}, {1: "B"}
        rest = {"plain": (), "lengths": ({0: "B"},), "reset": (steps,)}
        rest["hx"] = (states, states) if self.layer.mode == "LSTM" else (states,)
        shapes = [steps, *rest[self.how]]
        return torch.utils._pytree.tree_map_only(str, lambda n: torch.export.Dim(n), shapes)


def gradients(model: nn.Module, arguments: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """By name: programs of torch 2.6 have the parameters in another order."""
    loss: Any = sum(o.square().sum() for o in tree_leaves(model(*arguments)))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize(
    ("how", "strict"),
    [("plain", False), ("hx", False), ("lengths", False), ("reset", False), ("lengths", True)],
)
@layers
def test_dynamic_program_round_trip(
    torch_kind: Any, kind: Any, options: Any, how: str, strict: bool
) -> None:
    """Exported, saved and loaded, the model runs and trains at every T and B."""
    model = Model(kind(I, H, 2, bidirectional=True, **options), how)
    (*_, last) = fastrnn.explain(model.layer, torch.ones(2, 2, I))
    if last.serves == "reference":
        pytest.skip(str(last))
    program = torch.export.export(
        model, model.arguments(5, 3), dynamic_shapes=model.dynamic_shapes(), strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for T, B in ((5, 3), (8, 2), (3, 9)):
        arguments = model.arguments(T, B)
        torch.testing.assert_close(loaded(*arguments), model(*arguments))
        torch.testing.assert_close(gradients(loaded, arguments), gradients(model, arguments))


@layers
def test_exported_for_inference(torch_kind: Any, kind: Any, options: Any) -> None:
    """Without gradients nothing is saved for them; yet the program can be trained."""
    model = Model(kind(I, H, bias=False, **options), "hx").eval()
    arguments = model.arguments(5, 3)
    with torch.no_grad():
        program = torch.export.export(model, arguments)
    (*_, save, _) = next(n.args for n in program.graph.nodes if "fastrnn" in str(n.target))
    assert save is False
    module = program.module()
    torch.testing.assert_close(gradients(module, arguments), gradients(model, arguments))
    x = arguments[0].requires_grad_()
    found, expected = (
        torch.autograd.grad(
            torch.autograd.grad(m(*arguments)[0].square().sum(), x, create_graph=True)[0].sum(), x
        )
        for m in (module, model)
    )
    torch.testing.assert_close(found, expected)


@strictness
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_cell(torch_kind: Any, kind: Any, options: Any, strict: bool) -> None:
    cell, B = kind(I, H, **options), torch.export.Dim("B")
    program = torch.export.export(
        cell, (torch.randn(3, I),), dynamic_shapes={"input": {0: B}}, strict=strict
    )
    module, x = program.module(), torch.randn(5, I)
    torch.testing.assert_close(module(x), cell(x))
    torch.testing.assert_close(gradients(module, (x,)), gradients(cell, (x,)))


@strictness
def test_decomposed_program_keeps_the_gradients(strict: bool) -> None:
    """Those of a layer that keeps only some states, too."""
    layer, x = fastrnn.GRU(I, H, 2, recompute=2), torch.randn(5, 3, I)
    module = torch.export.export(layer, (x,), strict=strict).run_decompositions().module()
    torch.testing.assert_close(module(x), layer(x))
    torch.testing.assert_close(gradients(module, (x,)), gradients(layer, (x,)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("torch_kind", "kind", "options"), [*LAYERS, *STEPS])
def test_script_runs_torchs_layers(torch_kind: Any, kind: Any, options: Any) -> None:
    """A script is refused with words on what to do, which leave the model as it was."""
    model, x = nn.Sequential(nn.Linear(I, I), kind(I, H, **options)), torch.randn(5, I)
    with pytest.raises(RuntimeError, match=r"script\(fastrnn.revert\(model\)\).*convert\(model\)"):
        torch.jit.script(model)
    assert type(model[1]) is kind
    scripted = torch.jit.script(fastrnn.revert(model))
    assert type(fastrnn.convert(model)[1]) is kind
    torch.testing.assert_close(scripted(x), model(x))
    for p, q in zip(scripted.parameters(), model.parameters(), strict=True):
        assert p is q


class Chain(nn.Module):
    """A layer or cell among others, called twice: without and with states."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner = nn.Linear(I, I), inner
        self.is_layer = isinstance(inner, nn.RNNBase)

    def forward(self, x: Tensor) -> Any:
        x = self.before(x)
        found = self.inner(x)
        return found, self.inner(x, found[1] if self.is_layer else found)


@pytest.mark.parametrize(("torch_kind", "kind", "options"), [*LAYERS, *STEPS])
def test_fx_traces_a_call_as_one_node(torch_kind: Any, kind: Any, options: Any) -> None:
    theirs, ours = Chain(torch_kind(I, H, **options)), Chain(kind(I, H, **options))
    expected, graph = (torch.fx.symbolic_trace(m).graph for m in (theirs, ours))
    assert [(n.op, n.target) for n in graph.nodes] == [(n.op, n.target) for n in expected.nodes]
    traced = torch.fx.symbolic_trace(ours)
    assert traced.inner is ours.inner
    for x in (torch.randn(5, I), torch.randn(7, I)):
        torch.testing.assert_close(traced(x), ours(x))
        torch.testing.assert_close(gradients(traced, (x,)), gradients(ours, (x,)))


def test_fx_keeps_the_options_of_a_call() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fastrnn.GRU(I, H)

        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            return self.layer(x, lengths=lengths)[0]

    model, x = Masked(), torch.randn(5, 3, I)
    traced = torch.fx.symbolic_trace(model)
    for lengths in (torch.tensor([5, 0, 2]), torch.tensor([1, 4, 3])):
        torch.testing.assert_close(traced(x, lengths), model(x, lengths))
