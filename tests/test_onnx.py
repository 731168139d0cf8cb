"""ONNX: any T and B, from one program, with the numbers of eager."""

from __future__ import annotations

import io
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from helpers import STEPS, run_python
from test_export import H, I, Model, layers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastrnn
import fastrnn.onnx


def run_onnx(program: Any, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    model = program.model_proto
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [i.name for i in session.get_inputs()]
    given = {name: a.numpy() for name, a in zip(names, arguments, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, given)]


def recurrent_nodes(program: Any) -> list[Any]:
    return [
        node for node in program.model_proto.graph.node if node.op_type in ("LSTM", "GRU", "RNN")
    ]


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("how", ["plain", "hx", "lengths"])
@layers
def test_onnx(torch_kind: Any, kind: Any, options: Any, how: str, bidirectional: bool) -> None:
    """Two layers are two standard operators, whose numbers in onnxruntime are ours, at every T
    and B."""
    layer = kind(I, H, 2, bias=how != "hx", bidirectional=bidirectional, **options)
    model = Model(layer, how).eval()
    program = fastrnn.onnx.export(
        model, model.arguments(5, 3), dynamic_shapes=model.dynamic_shapes(), verbose=False
    )
    nodes = recurrent_nodes(program)
    assert [node.op_type for node in nodes] == [layer.mode.partition("_")[0]] * 2
    stored = {tensor.name for tensor in program.model_proto.graph.initializer}
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["direction"] == (b"bidirectional" if bidirectional else b"forward")
        assert attributes.get("layout", 0) == 0
        if node.op_type == "GRU":
            assert attributes["linear_before_reset"] == 1
        assert {name for name in node.input[1:4] if name} <= stored
    for T, B in ((5, 3), (9, 2), (1, 1)):
        arguments = model.arguments(T, B)
        with torch.no_grad():
            expected = tree_leaves(model(*arguments))
        torch.testing.assert_close(run_onnx(program, arguments), expected)


class Ragged(nn.Module):
    """A layer called with lengths and initial states."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor, *states: Tensor) -> Any:
        hx = states if len(states) > 1 else states[0]
        return self.layer(x, hx, lengths=lengths)


@layers
def test_onnx_of_rows_without_steps(torch_kind: Any, kind: Any, options: Any) -> None:
    """They end in their initial states."""
    model = Ragged(kind(I, H, 2, bidirectional=True, **options)).eval()
    states = 1 + (model.layer.mode == "LSTM")

    def arguments(T: int, lengths: list[int]) -> tuple[Tensor, ...]:
        hx = (torch.randn(4, len(lengths), H) for _ in range(states))
        return torch.randn(T, len(lengths), I), torch.tensor(lengths), *hx

    shapes = [{0: "T", 1: "B"}, {0: "B"}, ({1: "B"},) * states]
    program = fastrnn.onnx.export(
        model, arguments(5, [5, 0, 2]), dynamic_shapes=shapes, verbose=False
    )
    for T, lengths in ((5, [5, 0, 2]), (4, [0, 0]), (7, [0, 7, 0, 1]), (3, [3, 3]), (1, [0])):
        given = arguments(T, lengths)
        with torch.no_grad():
            expected = tree_leaves(model(*given))
        torch.testing.assert_close(run_onnx(program, given), expected)


@layers
def test_onnx_of_one_shape(torch_kind: Any, kind: Any, options: Any, tmp_path: Any) -> None:
    layer = kind(I, H, batch_first=True, **options).eval()
    x = torch.randn(3, 5, I)
    program = fastrnn.onnx.export(
        layer, (x,), tmp_path / "layer.onnx", verbose=False, input_names=["x"]
    )
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("x", [3, 5, I])]
    with torch.no_grad():
        expected = tree_leaves(layer(x))
    found = [torch.from_numpy(y) for y in session.run(None, {"x": x.numpy()})]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(run_onnx(program, (x,)), expected)


@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_onnx_of_a_cell(torch_kind: Any, kind: Any, options: Any) -> None:
    cell, x = kind(I, H, **options).eval(), torch.randn(3, I)
    program = fastrnn.onnx.export(cell, (x,), verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(program, (x,)), tree_leaves(cell(x)))


def run_traced_onnx(model: nn.Module, arguments: tuple[Any, ...], **options: Any) -> Any:
    """The results of what torch's older exporter, which traces, makes of the model; and a session
    for other arguments."""
    file = io.BytesIO()
    torch.onnx.export(model, arguments, file, dynamo=False, **options)
    session = onnxruntime.InferenceSession(file.getvalue())
    names = [i.name for i in session.get_inputs()]
    given = zip(names, tree_leaves(arguments), strict=True)
    found = session.run(None, {name: a.numpy() for name, a in given})
    return [torch.from_numpy(y) for y in found], session


traced_onnx = pytest.mark.filterwarnings(
    "ignore:.*legacy TorchScript-based:DeprecationWarning",
    "ignore:.*torch.onnx:DeprecationWarning",
    "ignore:Exporting a model to ONNX with a batch_size other than 1",
    "ignore::torch.jit.TracerWarning",
)


@traced_onnx
@pytest.mark.parametrize("how", ["plain", "hx", "lengths", "reset", "unbatched"])
@layers
def test_onnx_without_dynamo(torch_kind: Any, kind: Any, options: Any, how: str) -> None:
    """A layer that is the whole model, with each of its own arguments by name."""
    layer = kind(I, H, **options).eval()
    x, *rest = Model(layer, how).arguments(5, 3)
    arguments: tuple[Any, ...] = (x[:, 0] if how == "unbatched" else x,)
    named: dict[str, Any] = {}
    if how == "hx":
        named["hx"] = tuple(rest) if len(rest) > 1 else rest[0]
    elif rest:
        named[how] = rest[0]
    found, _ = run_traced_onnx(layer, (*arguments, named))
    with torch.no_grad():
        torch.testing.assert_close(found, tree_leaves(layer(*arguments, **named)))


@traced_onnx
def test_onnx_without_dynamo_serves_other_batches_and_no_other_times() -> None:
    layer = fastrnn.LSTM(I, H, 2, bidirectional=True).eval()
    axes = {"x": {0: "T", 1: "B"}}
    _, session = run_traced_onnx(
        layer, (torch.randn(5, 3, I),), input_names=["x"], dynamic_axes=axes
    )
    x = torch.randn(5, 7, I)
    with torch.no_grad():
        expected = layer(x)[0]
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected)
    for T in (3, 9):
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail):
            session.run(None, {"x": torch.randn(T, 3, I).numpy()})


@traced_onnx
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_onnx_of_a_cell_without_dynamo(torch_kind: Any, kind: Any, options: Any) -> None:
    cell, x = kind(I, H, **options).eval(), torch.randn(3, I)
    with torch.no_grad():
        hx = cell(x)
        torch.testing.assert_close(run_traced_onnx(cell, (x, hx))[0], tree_leaves(cell(x, hx)))
        torch.testing.assert_close(run_traced_onnx(cell, (x,))[0], tree_leaves(cell(x)))


def test_onnx_of_an_exported_program() -> None:
    layer, x = fastrnn.GRU(I, H, 2).eval(), torch.randn(5, 3, I)
    program = torch.export.export(layer, (x,))
    table = fastrnn.onnx.translations()
    found = torch.onnx.export(program, custom_translation_table=table, verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(found, (x,)), tree_leaves(layer(x)))
        torch.testing.assert_close(
            run_onnx(fastrnn.onnx.export(program, (x,), verbose=False), (x,)), tree_leaves(layer(x))
        )


def test_onnx_in_a_dtype_without_a_kernel() -> None:
    layer = fastrnn.LSTM(I, H, 2).half().eval()
    program = fastrnn.onnx.export(layer, (torch.randn(5, 3, I).half(),), verbose=False)
    onnx.checker.check_model(program.model_proto, full_check=True)
    assert len(recurrent_nodes(program)) == 2


@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode")
def test_what_onnx_does_not_have_is_refused() -> None:
    x = torch.randn(5, 3, I)
    for layer, arguments, reason in (
        (fastrnn.LSTM(I, H, proj_size=3), (x,), "its LSTM has no projection"),
        (fastrnn.LSTM(I, H, return_states=True), (x,), "cell state of every step"),
        (Model(fastrnn.GRU(I, H), "reset"), (x, torch.rand(5, 3) < 0.5), "no resets inside"),
    ):
        with pytest.raises(ValueError, match=f"cannot export to ONNX: .*{reason}"):
            fastrnn.onnx.export(layer, arguments, verbose=False)
    assert fastrnn.explain(fastrnn.GRU(I, H), x)[0].refusals.keys().isdisjoint({"onnx"})


def test_onnx_without_its_packages() -> None:
    code = (
        "import sys; sys.modules['onnxscript'] = None\n"
        "import fastrnn, torch\n"
        "import fastrnn.onnx\n"
        "fastrnn.onnx.export(fastrnn.GRU(2, 3), (torch.ones(1, 1, 2),))\n"
    )
    found = run_python(code)
    assert "ImportError: ONNX export needs: pip install onnx onnxscript" in found.stderr
