"""convert, revert, and the choice and explanation of backends."""

from __future__ import annotations

import copy
import functools
import re
import threading
import warnings
from typing import Any

import pytest
import torch
from helpers import LAYERS, STEPS, run_python
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn.backends import BACKENDS


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, 2, bidirectional=True, dropout=0.25)
        self.gru = nn.GRU(12, 6)
        self.rest = nn.ModuleList([nn.RNN(6, 6, nonlinearity="relu"), nn.Linear(6, 5)])
        self.cells = nn.ModuleDict({"a": nn.LSTMCell(5, 5), "b": nn.GRUCell(5, 5)})
        self.cells["c"] = nn.RNNCell(5, 5)
        self.tied = self.gru

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(x)
        x, _ = self.gru(x)
        x, _ = self.rest[0](x)
        x = self.rest[1](x[-1])
        h, _ = self.cells["a"](x)
        h = self.cells["b"](x, h)
        result: Tensor = self.cells["c"](x, h)
        return result


def test_a_model_gives_the_same_and_stays_itself() -> None:
    model = Model().double().eval()
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    before = {name: id(p) for name, p in model.named_parameters()}
    modules = {name: id(m) for name, m in model.named_modules()}
    expected = model(x)
    assert fastrnn.convert(model) is model
    torch.testing.assert_close(model(x), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert {name: id(m) for name, m in model.named_modules()} == modules
    recurrent = (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN)
    steps = (fastrnn.LSTMCell, fastrnn.GRUCell, fastrnn.RNNCell)
    assert sum(isinstance(m, recurrent + steps) for m in model.modules()) == 6
    assert model.tied is model.gru
    assert fastrnn.convert(model) is model
    assert fastrnn.revert(model) is model
    assert torch.equal(model(x), expected)
    assert not any(isinstance(m, recurrent + steps) for m in model.modules())


@pytest.mark.parametrize(("torch_kind", "kind", "options"), [*LAYERS, *STEPS])
def test_a_layer_itself(torch_kind: Any, kind: Any, options: Any) -> None:
    layer = torch_kind(4, 6, **options)
    result = fastrnn.convert(layer)
    assert result is layer
    assert type(layer) is kind
    assert repr(layer) == f"fastrnn.{torch_kind(4, 6, **options)!r}"
    assert set(vars(layer)) == set(vars(kind(4, 6, **options)))
    assert fastrnn.revert(layer) is layer
    assert type(layer) is torch_kind


def test_everything_that_hangs_on_a_layer_is_kept() -> None:
    model = nn.Sequential(nn.GRU(4, 6, num_layers=2, dropout=0.5))
    layer: Any = model[0]
    layer.eval()
    layer.weight_hh_l0.requires_grad_(False)
    layer.note = "mine"
    layer.register_buffer("scale", torch.ones(2))
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastrnn.convert(model)
    assert not layer.training
    assert not layer.weight_hh_l0.requires_grad
    assert layer.note == "mine"
    assert "scale" in dict(layer.named_buffers())
    old = layer.weight_ih_l0.detach().clone()
    layer(torch.randn(3, 2, 4, requires_grad=True))[0].sum().backward()
    optimizer.step()
    assert calls == ["before", "forward", "backward"]
    assert layer.weight_hh_l0.grad is None
    assert not torch.equal(layer.weight_ih_l0, old)


def test_subclasses_are_left_alone() -> None:
    class Mine(nn.LSTM):
        def forward(self, input: Any, hx: Any = None) -> Any:
            return "mine"

    model = nn.Sequential(Mine(3, 4))
    with pytest.warns(UserWarning, match="0: Mine, passed over: a subclass of torch.nn.LSTM"):
        fastrnn.convert(model)
    assert type(model[0]) is Mine
    (told,) = fastrnn.converted(model)
    assert (told.name, told.kind, told.fast) == ("0", "Mine", False)
    assert "derive it from fastrnn.LSTM" in told.reason


def test_what_is_converted_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleDict({"encoder": nn.LSTM(4, 6), "cell": nn.GRUCell(6, 6)})
    model["head"] = nn.Linear(6, 2)
    before = fastrnn.converted(model)
    assert [(one.name, one.fast, one.reason) for one in before] == [
        ("encoder", False, ""),
        ("cell", False, ""),
    ]
    assert str(before) == "encoder: LSTM, torch.nn\ncell: GRUCell, torch.nn"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastrnn.convert(model)
        assert not capsys.readouterr().out
        fastrnn.convert(model, verbose=True)
    assert capsys.readouterr().out == "encoder: LSTM, fastrnn\ncell: GRUCell, fastrnn\n"
    assert all(one.fast for one in fastrnn.converted(model))
    assert "(encoder): fastrnn.LSTM(4, 6)" in repr(model)
    assert "(encoder): LSTM(4, 6)" in repr(fastrnn.revert(model))
    assert str(fastrnn.converted(nn.Linear(2, 2))) == "no recurrent layers"


class OfItsOwn(nn.RNNBase):
    def __init__(self) -> None:
        super().__init__("LSTM", 4, 6)


def quantized() -> nn.Module:
    from torch.ao.nn.quantizable import LSTM

    return LSTM(4, 6)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script: nn.Module = torch.jit.script(nn.LSTM(4, 6))
    return script


def wrapped() -> nn.Module:
    layer = nn.LSTM(4, 6)
    enclose(layer)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OfItsOwn, "a kind of layer that torch.nn does not have"),
        (quantized, "it is torch.ao's"),
        (scripted, "torch.jit has compiled it"),
        (wrapped, "its forward has been replaced on the instance"),
    ],
)
def test_what_is_passed_over_is_told(make: Any, reason: str) -> None:
    model = nn.Sequential(nn.GRU(4, 4), make())
    kind = type(model[1])
    with pytest.warns(UserWarning, match=f"fastrnn.convert: 1: [A-Za-z]+, passed over: {reason}"):
        fastrnn.convert(model)
    assert type(model[1]) is kind
    converted, *passed_over = fastrnn.converted(model)
    assert converted.fast
    assert passed_over
    assert not any(one.fast for one in passed_over)


def bind(layer: Any) -> None:
    """As accelerate's hooks keep the forward that they wrap."""
    layer._old_forward = layer.forward
    layer.forward = functools.partial(lambda self, *args: self._old_forward(*args), layer)


def bind_partially(layer: Any) -> None:
    layer.forward = functools.partial(layer.forward, hx=None)


def enclose(layer: Any) -> None:
    """As profilers do."""
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)


@pytest.mark.parametrize("wrap", [bind, bind_partially, enclose])
@pytest.mark.parametrize(("torch_kind", "kind", "options"), [*LAYERS, *STEPS])
def test_a_forward_wrapped_on_the_instance_is_reverted(
    torch_kind: Any, kind: Any, options: Any, wrap: Any
) -> None:
    layer = torch_kind(4, 6, **options)
    x = torch.randn(3, 4)
    expected = layer(x)
    fastrnn.convert(layer)
    wrap(layer)
    fastrnn.revert(layer)
    assert type(layer) is torch_kind
    pairs = zip(tree_leaves(layer(x)), tree_leaves(expected), strict=True)
    assert all(torch.equal(found, right) for found, right in pairs)


@pytest.mark.parametrize("wrap", [bind, bind_partially])
@pytest.mark.parametrize(("torch_kind", "kind", "options"), [*LAYERS, *STEPS])
def test_a_forward_wrapped_on_the_instance_is_converted(
    torch_kind: Any, kind: Any, options: Any, wrap: Any
) -> None:
    layer = torch_kind(4, 6, **options)
    wrap(layer)
    fastrnn.convert(layer)
    assert type(layer) is kind
    with torch.no_grad(), CallsOfTorchsLayers() as calls:
        layer(torch.randn(3, 4))
    assert calls.names == []


class CallsOfTorchsLayers(torch.overrides.TorchFunctionMode):
    """Takes down the calls of the functions that torch.nn's layers call."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").removesuffix("_cell")
        self.names += [name] if name in ("lstm", "gru", "rnn_tanh", "rnn_relu") else []
        return func(*args, **(kwargs or {}))


def test_parametrized_layers() -> None:
    layer = parametrizations.weight_norm(nn.LSTM(4, 6), "weight_hh_l0").double()
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    expected, _ = layer(x)
    fastrnn.convert(layer)
    assert isinstance(layer, fastrnn.LSTM)
    assert parametrize.is_parametrized(layer, "weight_hh_l0")
    torch.testing.assert_close(layer(x)[0], expected)
    layer(x)[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    fastrnn.revert(layer)
    assert isinstance(layer, nn.LSTM)
    assert torch.equal(layer(x)[0], expected)


def test_converted_models_can_be_copied_and_saved(tmp_path: Any) -> None:
    model = fastrnn.convert(Model()).eval()
    x = torch.randn(7, 3, 4)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(loaded(x), model(x))
    plain = Model().eval()
    plain.load_state_dict(model.state_dict())
    assert isinstance(fastrnn.revert(loaded).lstm, nn.LSTM)


def test_explain() -> None:
    layer = fastrnn.LSTM(4, 6, 2, bidirectional=True, proj_size=3)
    x = torch.randn(5, 2, 4)
    first, second = fastrnn.explain(layer, x)
    assert (first.problem.T, first.problem.B, first.problem.I) == (5, 2, 4)
    assert (second.layer, second.problem.I, second.problem.H, second.problem.P) == (1, 6, 6, 3)
    assert first.problem.G == 2
    assert first.problem.grad
    assert not first.problem.packed
    for one in (first, second):
        assert one.serves in {b.name for b in BACKENDS}
        assert one.serves not in one.refusals
    text = str(fastrnn.explain(layer, x))
    assert "layer 1: lstm T=5 B=2 I=6 H=6 P=3, float32 on cpu, 2 directions, with gradients" in text
    assert all(b.name in text for b in BACKENDS)
    packed = nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 0]])
    with torch.no_grad():
        assert "packed, without gradients" in str(fastrnn.explain(layer, packed))
    (unbatched,) = fastrnn.explain(fastrnn.GRU(4, 6, batch_first=True), x[0])
    assert (unbatched.problem.T, unbatched.problem.B) == (2, 1)
    (batch_first,) = fastrnn.explain(fastrnn.GRU(4, 6, batch_first=True), x)
    assert (batch_first.problem.T, batch_first.problem.B) == (2, 5)
    (step,) = fastrnn.explain(fastrnn.GRUCell(4, 6), x[0, 0])
    assert (step.problem.T, step.problem.B, step.problem.H) == (1, 1, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastrnn.explain(layer, x)[0].problem.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="or a model with some inside, got Linear without any"):
        fastrnn.explain(nn.Linear(3, 4), x)


@pytest.mark.parametrize(
    ("layer", "arguments"),
    [
        (fastrnn.LSTM(4, 6), (torch.ones(5, 2, 3),)),
        (fastrnn.LSTM(4, 6), (torch.ones(5, 2, 4).double(),)),
        (fastrnn.LSTM(4, 6), (torch.ones(5, 2, 4).to("meta"),)),
        (fastrnn.LSTM(4, 6), (torch.ones(5, 2, 4), torch.ones(1, 2, 6))),
        (fastrnn.GRU(4, 6, 2), (torch.ones(5, 2, 4), torch.ones(1, 2, 6))),
        (fastrnn.GRU(4, 6), (torch.ones(0, 2, 4),)),
        (fastrnn.GRU(4, 6), ([1.0],)),
        (fastrnn.GRUCell(4, 6), (torch.ones(2, 3),)),
        (fastrnn.LSTMCell(4, 6), (torch.ones(2, 4), torch.ones(2, 6))),
    ],
)
def test_explain_raises_what_the_call_raises(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
    errors = []
    for action in (layer, functools.partial(fastrnn.explain, layer)):
        with pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
            action(*arguments)
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("wrong", [[1, 2, 3], [1, 6], [1.0, 2.0]])
def test_explain_checks_lengths(wrong: Any) -> None:
    layer, x = fastrnn.GRU(4, 6, 2, recompute=2), torch.ones(5, 2, 4)
    assert [one.problem.lengths for one in fastrnn.explain(layer, x, lengths=[5, 0])] == [True] * 2
    with pytest.raises((RuntimeError, ValueError)) as expected:
        layer(x, lengths=wrong)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        fastrnn.explain(layer, x, lengths=wrong)


class Captioner(nn.Module):
    """An encoder, a decoder that runs a cell in a loop, and what is never used or not converted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Embedding(9, 4), fastrnn.GRU(4, 6, 2, dropout=0.5)
        self.decoder, self.spare = fastrnn.LSTMCell(6, 5), fastrnn.RNN(4, 6)
        self.old = nn.LSTM(6, 5)

    def forward(self, tokens: torch.Tensor, lengths: Any = None) -> torch.Tensor:
        y, _ = self.encoder(self.embed(tokens), lengths=lengths)
        state = None
        for step in y:
            state = self.decoder(step, state)
        assert state is not None
        return self.old(y)[0][-1] + state[0]


def test_explain_a_model() -> None:
    model, tokens = Captioner(), torch.zeros(5, 2, dtype=torch.int64)
    torch.manual_seed(1)
    expected = model(tokens)
    torch.manual_seed(1)
    found = fastrnn.explain(model, tokens, lengths=[5, 2])
    assert [(one.name, one.layer, one.problem.T) for one in found] == [
        ("encoder", 0, 5),
        ("encoder", 1, 5),
        ("decoder", 0, 1),
    ]
    assert [one.problem.lengths for one in found] == [True, True, False]
    assert found.notes == (
        "spare: the model did not call it",
        "old: a torch.nn.LSTM: convert it first, by fastrnn.convert",
    )
    text = str(found)
    assert "encoder, layer 1: gru T=5 B=2 I=6 H=6, float32 on cpu, lengths, with gradients" in text
    assert all(note in text for note in found.notes)
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.manual_seed(1)
    torch.testing.assert_close(model(tokens), expected)
    with pytest.raises(ValueError, match="lengths must be between"):
        fastrnn.explain(model, tokens, lengths=[9, 2])
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert not any(one.problem.grad for one in fastrnn.explain(model, tokens))


def test_explain_tells_to_convert_first() -> None:
    class Own(nn.GRU):
        pass

    x = torch.randn(5, 2, 4)
    with pytest.raises(TypeError, match=r"a torch.nn.LSTM: convert it first, by fastrnn.convert"):
        fastrnn.explain(nn.LSTM(4, 6), x)
    with pytest.raises(TypeError, match=r"a torch.nn.GRUCell: convert it first"):
        fastrnn.explain(nn.GRUCell(4, 6), x[0])
    with pytest.raises(TypeError, match="a Own, a class of its own"):
        fastrnn.explain(Own(4, 6), x)


def test_explain_tells_why_the_asked_one_refuses() -> None:
    layer = fastrnn.GRU(4, 6, dtype=torch.complex64)
    x = torch.randn(5, 2, 4, dtype=torch.complex64)
    (found,) = fastrnn.explain(layer, x)
    assert found.serves == "reference"
    assert set(found.refusals) == {b.name for b in BACKENDS} - {"reference"}
    for name, reason in found.refusals.items():
        with fastrnn.backend(name):
            assert fastrnn.explain(layer, x)[0].serves is None
            with pytest.raises(RuntimeError) as raised:
                layer(x)
        assert reason in str(raised.value)


def test_backend_context() -> None:
    layer, x = fastrnn.GRU(4, 6), torch.randn(5, 2, 4)

    def serving() -> str | None:
        return fastrnn.explain(layer, x)[0].serves

    first = serving()
    seen = []
    with fastrnn.backend("reference"):
        assert serving() == "reference"
        thread = threading.Thread(target=lambda: seen.append(serving()))
        thread.start()
        thread.join()
        with fastrnn.backend(None):
            assert serving() == BACKENDS[0].name or BACKENDS[0].supports(
                fastrnn.explain(layer, x)[0].problem
            )
        assert serving() == "reference"
    assert seen == [first]
    assert serving() == first
    with pytest.raises(ValueError, match="unknown fastrnn backend 'nope': choose from"):
        fastrnn.backend("nope").__enter__()
    with pytest.raises(KeyError), fastrnn.backend("reference"):
        raise KeyError
    assert serving() == first


def test_environment_variable() -> None:
    code = "import fastrnn, torch; print(fastrnn.explain(fastrnn.GRU(2, 3), torch.ones(1, 1, 2)))"
    found = run_python(code, FASTRNN_BACKEND="reference")
    assert "reference: serves" in found.stdout, found.stderr
    found = run_python(code, FASTRNN_BACKEND="nope")
    assert found.returncode != 0
    assert "unknown fastrnn backend 'nope'" in found.stderr


def test_without_the_extension_aten_serves_and_the_import_says_so_once() -> None:
    code = (
        "import sys; sys.modules['fastrnn._C'] = None\n"
        "import fastrnn, torch\n"
        "layer = fastrnn.GRU(2, 3)\n"
        "for _ in range(3): layer(torch.ones(1, 1, 2))\n"
        "print(fastrnn.explain(layer, torch.ones(1, 1, 2)))\n"
    )
    found = run_python(code)
    assert "aten: serves" in found.stdout, found.stderr
    assert "cpu: refuses: the extension fastrnn._C " in found.stdout
    assert found.stderr.count("UserWarning: the extension fastrnn._C ") == 1
