"""torch's own layers as a backend: whom it serves, what it saves, and what a GPU would be given."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from helpers import LAYERS, Case, Truth, make_inputs, run
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _torch
from fastrnn.backends import Problem, aten, by_name, choose, refusal
from fastrnn.cells import CELLS

layers = pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
GPU = torch.device("cuda")


def on_gpu(**differences: Any) -> Problem:
    problem = Problem(
        CELLS["lstm"], torch.float16, GPU, 100, 8, 64, 128, 0, (False, True),
        False, False, False, False, False, True,
    )  # fmt: skip
    return problem._replace(**differences)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_it_serves_on_a_gpu(cell: str, dtype: torch.dtype, grad: bool) -> None:
    for differences in ({}, {"packed": True}, {"lengths": True, "reset": True}, {"T": 1}):
        problem = on_gpu(cell=CELLS[cell], dtype=dtype, grad=grad, **differences)
        assert choose(problem).name == "aten"
    assert choose(on_gpu(P=32)).name == "aten"
    with fastrnn.backend("aten"):
        assert choose(on_gpu(device=torch.device("xpu"))).name == "aten"


@pytest.mark.parametrize(
    ("differences", "reason"),
    [
        ({"all_states": True}, "do not return the cell state of every step"),
        ({"reverse": (False,) * 3}, "one direction or two"),
        ({"grouped": True}, "read the same input"),
        ({"stacked": True}, "of each direction apart"),
        ({"dtype": torch.complex64}, "floats of 16, 32 and 64 bits, not torch.complex64"),
        ({"B": 0}, "a batch, an input or a state of size 0"),
        ({"T": 65536}, "cuDNN takes at most 65535 steps"),
        ({"device": torch.device("mps"), "P": 16}, "no proj_size"),
    ],
    ids=str,
)
def test_it_refuses_in_words(differences: dict[str, Any], reason: str) -> None:
    problem = on_gpu(**differences)
    assert reason in str(refusal(by_name("aten"), problem))
    assert choose(problem).name == "reference"


def pretend_on_gpu(layer: nn.RNNBase) -> nn.RNNBase:
    """Of fake tensors, with parameters on a device that this torch need not know."""
    for name, weight in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(torch.empty(weight.shape, device="cuda")))
    return layer


@layers
def test_explain_on_a_gpu(torch_kind: Any, kind: Any, options: Any) -> None:
    """A converted model on a GPU does not fall to the loop over time; ours serve on request."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = pretend_on_gpu(fastrnn.convert(torch_kind(4, 6, 2, **options)))
        found = fastrnn.explain(layer, torch.empty(5, 3, 4, device="cuda"))
    for one in found:
        assert one.serves == "aten"
        assert one.refusals.keys() == {"cpu", "cuda", "triton", "widened"}
    assert "aten: serves" in str(found)


@layers
def test_shapes_on_a_gpu(torch_kind: Any, kind: Any, options: Any) -> None:
    """One operator a layer, on tensors that stay there. (Autograd needs a torch with CUDA.)"""
    with torch.no_grad(), FakeTensorMode(), Spy() as spy:
        layer = pretend_on_gpu(kind(4, 6, 2, bidirectional=True, **options))
        y = layer(torch.empty(5, 3, 4, device="cuda"))[0]
    assert y.shape == (5, 3, 12)
    assert y.device.type == "cuda"
    assert spy.seen.count("fastrnn.forward.default") == 2


class Spy(TorchDispatchMode):
    """Which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


HALF = [
    Case(6, 3, 5, 9, reverse=(False, True)),
    Case(5, 3, 4, 7, lengths=(5, 3, 1), reverse=(False, True)),
    Case(5, 4, 4, 7, ends=(2, 0, 5, 3), cuts=0.3, to=True, reverse=(False, True)),
    Case(1, 4, 4, 7, hx=False, bias=False),
    Case(5, 4, 4, 7, reverse=(True,)),
]


@pytest.mark.parametrize("case", HALF, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients(cell: str, dtype: torch.dtype, case: Case) -> None:
    found = run(cell, case, make_inputs(cell, case, dtype), "aten")
    Truth(cell, case, dtype).check(found)


def test_training_runs_the_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of LSTMs in float32, whose backward pass is torch's own on oneDNN."""
    calls = []
    functions = aten.FUNCTIONS["lstm"]

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return functions.layer(*arguments)

    monkeypatch.setitem(aten.FUNCTIONS, "lstm", functions._replace(layer=counted))
    layer = fastrnn.LSTM(4, 6, 2)
    with fastrnn.backend("aten"):
        y, _ = layer(torch.randn(5, 3, 4))
        y.sum().backward(retain_graph=True)
        y.sum().backward()
    assert len(calls) == 2


def test_what_is_saved_goes_with_the_backward_pass() -> None:
    layer = fastrnn.LSTM(4, 6)
    with fastrnn.backend("aten"):
        y, _ = layer(torch.randn(5, 3, 4))
    assert y.grad_fn is not None
    saved = [weakref.ref(t) for t in y.grad_fn.saved_tensors if t is not None and t.grad_fn]
    assert any(t() is not None for t in saved)
    y.sum().backward()
    gc.collect()
    assert all(t() in (None, y) for t in saved)


def test_evaluation_mode_has_gradients() -> None:
    for kind in (nn.LSTM, nn.GRU):
        layer = fastrnn.convert(kind(4, 6)).eval()
        with fastrnn.backend("aten"):
            layer(torch.randn(5, 3, 4))[0].sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("how", ["plain", "lengths"])
@layers
def test_compiled_without_an_unrolled_loop(
    torch_kind: Any, kind: Any, options: Any, how: str
) -> None:
    layer = kind(4, 6, 2, bidirectional=True, **options)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    with fastrnn.backend("aten"):
        for T, B in ((5, 3), (7, 2)):
            x = torch.randn(T, B, 4, requires_grad=True)
            given = {"lengths": torch.randint(0, T + 1, (B,))} if how == "lengths" else {}
            y = compiled(x, **given)[0]
            leaves = [x, *layer.parameters()]
            found = torch.autograd.grad(y.square().sum(), leaves)
            expected = torch.autograd.grad(layer(x, **given)[0].square().sum(), leaves)
            torch.testing.assert_close(found, expected)
    assert counters["stats"]["unique_graphs"] == 1


class CudnnTwin:
    """Stands in for the part of torch that only a GPU has: :func:`fastrnn.backends.aten.flatten`'s
    function moves weights to one memory, behind each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moved = 0
        monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", self.flatten)
        monkeypatch.setattr(_torch, "cudnn_mode", lambda cell: cell)
        monkeypatch.setattr(aten, "is_for_cudnn", lambda weight: True)

    def flatten(self, weights: list[Tensor], *_: Any) -> None:
        self.moved += 1
        memory = torch.cat([w.flatten() for w in weights])
        start = 0
        for w in weights:
            w.set_(memory.untyped_storage(), start, w.shape)
            start += w.numel()


@layers
def test_weights_lie_as_cudnn_reads_them(
    torch_kind: Any, kind: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved once, in place; computed weights are copied, and nobody else's memory is touched."""
    cudnn = CudnnTwin(monkeypatch)
    layer = kind(4, 6, 2, bidirectional=True, **options).double()
    assert cudnn.moved > 0
    cudnn.moved, before = 0, [p.data_ptr() for p in layer.parameters()]
    x = torch.randn(5, 3, 4).double()
    with fastrnn.backend("aten"), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = layer(x)[0]
        expected.sum().backward()
        assert cudnn.moved == 0
        copies = {n: p.detach().clone() for n, p in layer.named_parameters()}
        found = torch.func.functional_call(layer, copies, x)[0]
        assert cudnn.moved == 2
    assert before == [p.data_ptr() for p in layer.parameters()]
    assert torch.equal(found, expected)
    assert not aten.is_flat(list(copies.values())[:4])
