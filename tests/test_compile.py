"""torch.compile: a layer is one graph, the same for every T and B, with the numbers of eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import LAYERS, STEPS
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

layers = pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
# torch takes sizes that are equal in the first call to be equal always: here they all differ.
I, H = 4, 6
HOWS = ["plain", "hx", "lengths", "reset", "reset_hx", "all"]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


class Call:
    """Arguments of one call of a layer, with leaves of its own."""

    def __init__(self, layer: nn.RNNBase, how: str, T: int, B: int) -> None:
        self.x = torch.randn(*((B, T) if layer.batch_first else (T, B)), I, requires_grad=True)
        groups = layer.num_layers * (2 if layer.bidirectional else 1)
        widths = [layer.proj_size or H, H] if layer.mode == "LSTM" else [H]

        def states() -> Any:
            found = [torch.randn(groups, B, w, requires_grad=True) for w in widths]
            return tuple(found) if len(found) > 1 else found[0]

        self.hx = states() if how in ("hx", "all") else None
        self.options: dict[str, Any] = {}
        if how in ("lengths", "all"):
            self.options["lengths"] = torch.randint(0, T + 1, (B,))
        if how in ("reset", "reset_hx", "all"):
            self.options["reset"] = torch.rand(self.x.shape[:2]) < 0.3
        if how in ("reset_hx", "all"):
            self.options["reset_hx"] = states()

    def run(self, layer: Any) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Outputs, and the gradients of all leaves."""
        outputs = tensors(layer(self.x, self.hx, **self.options))
        leaves = [self.x, *tensors(self.hx), *tensors(self.options.get("reset_hx"))]
        loss = sum(o.square().sum() for o in outputs)
        grads = torch.autograd.grad(loss, [*leaves, *layer.parameters()])  # type: ignore[arg-type]
        return outputs, grads


def tensors(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if t is not None]


def skip_unless_fused(layer: nn.Module) -> None:
    """The reference unrolls its loop over T into the graph, which another T then does not fit."""
    steps = () if isinstance(layer, nn.RNNCellBase) else (2,)
    (*_, last) = fastrnn.explain(layer, torch.ones(*steps, 2, I))
    if last.serves == "reference":
        pytest.skip("; ".join(f"{k}: {v}" for k, v in last.refusals.items()))


def check_one_graph(layer: nn.RNNBase, how: str) -> None:
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for k, (T, B) in enumerate(((5, 3), (7, 2), (9, 4), (2, 11))):
        call = Call(layer, how, T, B)
        with torch._dynamo.config.patch(error_on_recompile=k > 0):
            found = call.run(compiled)
        torch.testing.assert_close(found, call.run(layer))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("how", HOWS)
@layers
def test_one_graph_for_every_length_and_batch(
    torch_kind: Any, kind: Any, options: Any, how: str
) -> None:
    """Forward and backward of two layers in two directions."""
    layer = kind(I, H, 2, bidirectional=True, batch_first=how == "lengths", **options)
    skip_unless_fused(layer)
    check_one_graph(layer, how)


@pytest.mark.parametrize(
    "own", [{"return_states": True}, {"return_layers": True}, {"proj_size": 2}, {"bias": False}]
)
def test_one_graph_with_the_layers_options(own: Any) -> None:
    layer = fastrnn.LSTM(I, H, 2, bidirectional=True, **own)
    skip_unless_fused(layer)
    check_one_graph(layer, "hx")


@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_cell_in_a_loop(torch_kind: Any, kind: Any, options: Any) -> None:
    cell = kind(I, H, **options)
    skip_unless_fused(cell)

    def unroll(xs: Tensor) -> Tensor:
        state = None
        for x in xs:
            state = cell(x, state)
        return state[0] if isinstance(state, tuple) else state  # type: ignore[return-value]

    compiled = torch.compile(unroll, backend="aot_eager", fullgraph=True, dynamic=True)
    for k, B in enumerate((3, 2, 7)):
        xs = torch.randn(4, B, I)
        with torch._dynamo.config.patch(error_on_recompile=k > 0):
            h = compiled(xs)
        found = torch.autograd.grad(h.square().sum(), list(cell.parameters()))
        expected = torch.autograd.grad(unroll(xs).square().sum(), list(cell.parameters()))
        torch.testing.assert_close(found, expected)
    assert counters["stats"]["unique_graphs"] == 1


@layers
def test_graph_does_not_grow_with_time(torch_kind: Any, kind: Any, options: Any) -> None:
    layer = kind(I, H, 2, **options)
    skip_unless_fused(layer)
    sizes = []
    for T in (3, 300):
        torch._dynamo.reset()
        explained = torch._dynamo.explain(layer)(torch.randn(T, 2, I))
        sizes.append([len(graph.graph.nodes) for graph in explained.graphs])
    assert sizes[0] == sizes[1]


@layers
def test_inductor(torch_kind: Any, kind: Any, options: Any) -> None:
    """A model of which the layer is a part, as torch.compile takes it by default, in training."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.layer = nn.Linear(I, I), kind(I, H, 2, **options)
            self.after = nn.Linear(H, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            y, _ = self.layer(self.before(x).relu(), lengths=lengths)
            result: Tensor = self.after(y)
            return result

    model = Model()
    skip_unless_fused(model.layer)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for module in (compiled, twin):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for T, B in ((5, 3), (8, 2), (4, 6)):
            lengths = torch.randint(1, T + 1, (B,))
            optimizer.zero_grad()
            module(torch.randn(T, B, I), lengths).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))
    with torch.inference_mode():
        x, lengths = torch.randn(3, 3, I), torch.tensor([2, 0, 3])
        torch.testing.assert_close(compiled(x, lengths), twin(x, lengths))


@layers
def test_without_gradients(torch_kind: Any, kind: Any, options: Any) -> None:
    layer = kind(I, H, 2, **options)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = torch.randn(5, 3, I)
            assert torch.equal(compiled(x)[0], layer(x)[0])


@layers
def test_dropouts(torch_kind: Any, kind: Any, options: Any) -> None:
    """Between the layers and of recurrent weights, as torch's seed has them."""
    layer = kind(I, H, 2, dropout=0.5, weight_dropout=0.5, **options)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    x = torch.randn(5, 3, I)
    outputs = []
    for module in (compiled, layer, compiled):
        torch.manual_seed(3)
        outputs.append(module(x)[0])
    outputs.append(compiled(x)[0])
    torch.testing.assert_close(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[3])


def test_inside_a_converted_model() -> None:
    model = nn.Sequential(nn.Linear(I, I), nn.GRU(I, H))
    x = torch.randn(5, 3, I)
    expected, _ = model(x)
    compiled = torch.compile(
        fastrnn.convert(copy.deepcopy(model)), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x)[0], expected)


def test_packed() -> None:
    """The batch size is read from a tensor, which breaks the graph, and nothing else."""
    layer = fastrnn.LSTM(I, H)
    packed = pack_padded_sequence(torch.randn(5, 3, I), [5, 2, 1])
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(packed)[0].data, layer(packed)[0].data)


def test_errors_reach_the_caller() -> None:
    layer = fastrnn.GRU(I, H)
    skip_unless_fused(layer)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=True)
    x = torch.randn(5, 3, I)
    with pytest.raises(ValueError, match="length"):
        compiled(x, lengths=torch.tensor([1, 2, 9]))
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        compiled(x[..., :2])
