"""float16 on a CPU: the float32 kernels between conversions, or torch's own functions where that
takes less time, as it does for training steps of a cell with one gate in other dtypes too."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from helpers import TORCH, Case, Truth, make_inputs, run
from test_errors import TEXTS_OF
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from fastrnn import by_torch, record
from fastrnn.cells import CELLS

KINDS = [
    ("LSTM", {}),
    ("GRU", {}),
    ("RNN", {"nonlinearity": "tanh"}),
    ("RNN", {"nonlinearity": "relu"}),
]
BOTH = (False, True)
CASES = [
    Case(7, 3, 5, 13, layout="feature_first"),
    Case(4, 20, 3, 16, lengths=(4,) * 9 + (3,) * 6 + (1,) * 5, reverse=BOTH, bias=False),
    Case(9, 6, 7, 19, ends=(3, 9, 0, 1, 9, 4), cuts=0.2, to=True, every=True, reverse=BOTH),
]
kinds = pytest.mark.parametrize(("name", "options"), KINDS)


@pytest.mark.parametrize(
    ("cell", "case"),
    [*product(CELLS, CASES), ("lstm", Case(6, 4, 5, 9, P=3, hx=False))],
    ids=str,
)
def test_values_and_gradients(cell: str, case: Case) -> None:
    found = run(cell, case, make_inputs(cell, case, torch.float16), "widened")
    Truth(cell, case, torch.float16).check(found)


def pair(name: str, *sizes: int, **options: Any) -> tuple[Any, Any]:
    """torch.nn's module and ours, with the same weights in float16."""
    theirs = getattr(nn, name)(*sizes, **options).half()
    return theirs, fastrnn.convert(copy.deepcopy(theirs))


def results(module: nn.Module, *inputs: Any) -> list[Tensor]:
    """Outputs, last states and gradients of the parameters."""
    torch.manual_seed(0)
    given = torch.utils._pytree.tree_leaves(module(*inputs))
    tensors = [t.data if isinstance(t, PackedSequence) else t for t in given]
    loss = sum(t.float().sum() for t in tensors if t.is_floating_point())
    return [*tensors, *torch.autograd.grad(loss, list(module.parameters()))]


def served_by(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """The calls of one function of :mod:`fastrnn.by_torch`, as they come."""
    calls = []
    function = getattr(by_torch, name)

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(by_torch, name, counted)
    return calls


@kinds
@pytest.mark.parametrize("given", ["nothing", "states", "packed", "one row"])
def test_small_layers_give_the_bits_of_torch(
    name: str, options: Any, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = served_by(monkeypatch, "layers")
    theirs, ours = pair(name, 4, 6, num_layers=2, bidirectional=True, dropout=0.5, **options)
    x, inputs = torch.randn(1, 3, 4).half(), []
    if given == "states":
        h = torch.randn(4, 3, 6).half()
        inputs = [(h, h + 1) if name == "LSTM" else h]
    elif given == "packed":
        x = pack_sequence([torch.randn(1, 4).half() for _ in range(3)], enforce_sorted=False)
    elif given == "one row":
        x = x[:, 0]
    assert all(map(torch.equal, results(theirs, x, *inputs), results(ours, x, *inputs)))
    assert len(calls) == 1


@kinds
def test_small_steps_give_the_bits_of_torch(
    name: str, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further derivatives are torch's own too."""
    calls = served_by(monkeypatch, "step")
    theirs, ours = pair(f"{name}Cell", 4, 6, **(options if name == "RNN" else {}))
    x = torch.randn(3, 4).half().requires_grad_()
    found = []
    for module in (theirs, ours):
        h = module(x)
        h = h if isinstance(h, Tensor) else h[0]
        (dx,) = torch.autograd.grad(h.float().sum(), x, create_graph=True)
        more = torch.autograd.grad(dx.float().square().sum(), list(module.parameters())[:2])
        found.append([h, dx, *more])
    assert all(map(torch.equal, *found))
    state = torch.randn(3, 6).half()
    hx = (state, state) if name == "LSTM" else state
    assert all(map(torch.equal, results(theirs, x, hx), results(ours, x, hx)))
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_training_steps_of_one_gate_give_the_bits_of_torch(
    nonlinearity: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a given state, or of few units; explain() and the calls agree."""
    calls = served_by(monkeypatch, "step")
    for I, H in ((3, 5), (3, 70)):
        theirs = nn.RNNCell(I, H, nonlinearity=nonlinearity, dtype=dtype)
        ours = fastrnn.convert(copy.deepcopy(theirs))
        x, h = torch.randn(2, I, dtype=dtype), torch.randn(2, H, dtype=dtype)
        for inputs in ((x, h), (x,)):
            calls.clear()
            found = results(ours, *inputs)
            served = len(inputs) == 2 or H == 5
            assert len(calls) == served
            (told,) = fastrnn.explain(ours, *inputs)
            assert told.serves == ("aten" if served else "cpu")
            if served:
                assert all(map(torch.equal, results(theirs, *inputs), found))
    calls.clear()
    with torch.no_grad():
        ours(x, h)
    with fastrnn.backend("cpu"):
        ours(x, h)
    fastrnn.GRUCell(3, 5, dtype=dtype)(x)
    assert not calls


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_steps_under_transforms_are_those_of_a_loop(name: str, dtype: torch.dtype) -> None:
    """torch has no vmap of its own steps."""
    cell = getattr(fastrnn, name)(3, 4, dtype=dtype)
    params = {key: p.detach() for key, p in cell.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        h = torch.func.functional_call(cell, params, (x,))
        return (h if isinstance(h, Tensor) else h[0]).float().square().sum()

    x = torch.randn(5, 2, 3, dtype=dtype)
    gradient = torch.func.grad(loss)
    found = torch.func.vmap(gradient, (None, 0))(params, x)
    for k in range(5):
        for key, expected in gradient(params, x[k]).items():
            torch.testing.assert_close(found[key][k], expected)
    torch.testing.assert_close(
        torch.func.vmap(lambda row: loss(params, row))(x),
        torch.stack([loss(params, row) for row in x]),
    )


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell"])
def test_a_step_can_be_traced(name: str) -> None:
    for dtype in (torch.float16, torch.float32):
        cell, x = getattr(fastrnn, name)(3, 4, dtype=dtype), torch.randn(2, 3, dtype=dtype)
        traced = torch.jit.trace(cell, x)
        torch.testing.assert_close(traced(x), cell(x))


def test_a_layer_with_one_bias_of_two() -> None:
    for T, H in ((1, 4), (9, 64)):
        layer = fastrnn.LSTM(3, H).half()
        layer.bias_hh_l0 = None
        assert layer(torch.randn(T, 2, 3).half())[0].shape == (T, 2, H)
        layer.weight_ih_l0 = None
        with pytest.raises(RuntimeError, match="weight_ih is None"):
            layer(torch.randn(T, 2, 3).half())


def test_what_is_served_by_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many multiplications by the kernels; explain() and the calls agree."""
    calls = served_by(monkeypatch, "layers")
    layer, large = fastrnn.LSTM(8, 16, device="cpu").half(), fastrnn.LSTM(8, 600).half()
    with torch.no_grad():
        for module, shape, serves in (
            (layer, (5, 3, 8), "widened"),
            (layer, (1, 3, 8), "aten"),
            (large, (4, 1, 8), "aten"),
            (large, (4, 8, 8), "widened"),
        ):
            x = torch.randn(shape).half()
            (told,) = fastrnn.explain(module, x)
            assert told.serves == serves
            calls.clear()
            module(x)
            assert len(calls) == (serves == "aten")
        (told,) = fastrnn.explain(fastrnn.LSTMCell(8, 16).half(), torch.randn(200, 8).half())
    assert told.serves == "widened"


def test_what_torch_nn_does_not_have_goes_to_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = served_by(monkeypatch, "layers")
    x = torch.randn(1, 3, 4).half()
    plain = fastrnn.LSTM(4, 6).half()
    expected = plain(x)[0]
    assert len(calls) == 1
    for options in ({"return_states": True}, {"return_layers": True}, {"recompute": 1}):
        other = fastrnn.LSTM(4, 6, **options).half()  # type: ignore[arg-type]
        other.load_state_dict(plain.state_dict())
        torch.testing.assert_close(other(x)[0], expected)
    dropped = fastrnn.LSTM(4, 6, weight_dropout=0.9).half()
    hx = (torch.randn(1, 3, 6).half(), torch.randn(1, 3, 6).half())
    assert not torch.equal(dropped(x, hx)[0], dropped(x, hx)[0])
    torch.testing.assert_close(plain(x, lengths=[1, 1, 1])[0], expected)
    cut = torch.zeros(1, 3, dtype=torch.bool)
    torch.testing.assert_close(plain(x, reset=cut)[0], expected)
    with fastrnn.backend("widened"):
        torch.testing.assert_close(plain(x)[0], expected)
    assert len(calls) == 1


def test_it_goes_by_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = served_by(monkeypatch, "step")
    cell, x = fastrnn.GRUCell(4, 6).half(), torch.randn(1, 4).half()
    cell(x)
    assert len(calls) == 1
    wrong = {record.Kernel("aten", "", "gru", "float16"): "planted"}
    record.write_checked(torch.device("cpu"), wrong)
    cell(x)
    assert len(calls) == 1


@kinds
def test_bad_input_has_the_errors_of_torch(name: str, options: Any) -> None:
    theirs, ours = pair(name, 4, 6, **options)
    cell, our_cell = pair(f"{name}Cell", 4, 6, **(options if name == "RNN" else {}))
    for modules, x in (
        ((theirs, ours), torch.randn(1, 3, 5).half()),
        ((theirs, ours), torch.randn(1, 3, 4)),
        ((cell, our_cell), torch.randn(3, 5).half()),
    ):
        messages = []
        for module in modules:
            with pytest.raises((RuntimeError, ValueError)) as caught:
                module(x)
            messages.append(str(caught.value))
        if TORCH >= TEXTS_OF:
            assert messages[0] == messages[1]
