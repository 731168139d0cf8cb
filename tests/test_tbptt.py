"""Truncated BPTT and the diagnosis of gradients over time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers import BACKEND_NAMES, LAYERS, run_python, using
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastrnn
from fastrnn.tbptt import detached

each_layer = pytest.mark.parametrize(("theirs", "ours", "options"), LAYERS)


def grads_of(layer: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(layer.parameters())))


@pytest.mark.parametrize(
    ("window", "stride"), [(4, None), (4, 4), (5, 2), (5, 3), (3, 2), (6, 1), (30, 7), (30, None)]
)
@each_layer
def test_it_is_bptt_of_the_window(
    theirs: Any, ours: Any, options: dict[str, Any], window: int, stride: int | None
) -> None:
    """Every part's gradient is that of a layer that runs over the window alone, from the states
    before it."""
    T, layer = 17, ours(3, 5, 2, **options).double()
    x = torch.randn(T, 2, 3, dtype=torch.float64)
    everything, _ = layer(x)
    covered = 0
    for y, steps, hx in fastrnn.tbptt(layer, x, window=window, stride=stride):
        assert steps.start == covered
        covered = steps.stop
        torch.testing.assert_close(y, everything[steps])
        begin = max(0, steps.stop - window)
        before = detached(layer(x[:begin])[1]) if begin else None
        alone, ends = layer(x[begin : steps.stop], before)
        expected = grads_of(layer, alone[steps.start - begin :].square().sum())
        torch.testing.assert_close(grads_of(layer, y.square().sum()), expected)
        for mine, end in zip(
            hx if isinstance(hx, tuple) else (hx,),
            ends if isinstance(ends, tuple) else (ends,),
            strict=True,
        ):
            assert not mine.requires_grad
            torch.testing.assert_close(mine, end.detach())
    assert covered == T


@pytest.mark.parametrize("shape", ["batch_first", "unbatched"])
def test_layouts(shape: str) -> None:
    layer = fastrnn.LSTM(3, 5, batch_first=shape == "batch_first")
    x = torch.randn(2, 11, 3) if shape == "batch_first" else torch.randn(11, 3)
    parts = [y for y, _, _ in fastrnn.tbptt(layer, x, window=5, stride=2)]
    axis = 1 if shape == "batch_first" else 0
    torch.testing.assert_close(torch.cat(parts, axis), layer(x)[0])


@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_and_first_states(batch_first: bool) -> None:
    layer = fastrnn.GRU(3, 5, batch_first=batch_first)
    x, reset, h = torch.randn(13, 4, 3), torch.rand(13, 4) < 0.3, torch.randn(1, 4, 5)
    if batch_first:
        x, reset = x.transpose(0, 1), reset.t()
    expected, _ = layer(x, h, reset=reset)
    parts = [y for y, *_ in fastrnn.tbptt(layer, x, h, window=4, stride=3, reset=reset)]
    torch.testing.assert_close(torch.cat(parts, int(batch_first)), expected)


def test_a_training_loop() -> None:
    """Weights change between the parts, states go on; torch's own clipping does what it does."""
    layer, head = fastrnn.LSTM(1, 16), nn.Linear(16, 1)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.02)
    x = torch.sin(torch.arange(401) / 4).view(-1, 1, 1)
    losses = []
    for _ in range(6):
        for y, steps, _ in fastrnn.tbptt(layer, x[:-1], window=40, stride=20):
            loss = (head(y) - x[1:][steps]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, 0.5)
            after = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
            assert after <= min(float(norm), 0.5) * 1.001
            nn.utils.clip_grad_value_(parameters, 0.1)
            assert all(p.grad is not None and p.grad.abs().max() <= 0.1 for p in parameters)
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])


def test_a_module_around_a_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = fastrnn.LSTM(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, dict[str, Any]]:
            y, states = self.rnn(x, None if hx is None else hx["rnn"])
            return self.head(y), {"rnn": states, "steps": [1]}

    model, x = Model(), torch.randn(9, 2, 3)
    parts = list(fastrnn.tbptt(model, x, window=4, stride=2))
    torch.testing.assert_close(torch.cat([part.y for part in parts]), model(x)[0])
    assert not parts[0].hx["rnn"][0].requires_grad


class Around(nn.Module):
    """A model around a layer, which knows which dimension is time and does not say so itself."""

    def __init__(self, batch_first: bool, tokens: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3) if tokens else nn.Identity()
        self.rnn, self.head = fastrnn.GRU(3, 4, batch_first=batch_first), nn.Linear(4, 2)

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        y, hx = self.rnn(self.embedding(x), hx)
        return self.head(y), hx


@pytest.fixture
def process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def decorated(layer: nn.Module) -> Callable[..., Any]:
    @functools.wraps(layer.forward)
    def call(*args: Any) -> Any:
        return layer(*args)

    return call


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "compile": lambda layer: torch.compile(layer, backend="eager"),
    "partial": functools.partial,
    "method": lambda layer: layer.forward,
    "decorated": decorated,
    "a wrapper of a wrapper": lambda layer: functools.partial(nn.DataParallel(layer)),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_do_not_hide_which_dimension_is_time(wrapper: str, batch_first: bool) -> None:
    x = torch.randn(8, 12, 3)
    for layer in (fastrnn.GRU(3, 4, batch_first=batch_first), Around(batch_first)):
        wrapped = WRAPPERS[wrapper](layer)
        with torch.compiler.set_stance("force_eager"):  # compiled code is for other tests
            parts = [y for y, *_ in fastrnn.tbptt(wrapped, x, window=4)]
            found = fastrnn.diagnose(wrapped, x[:, :5] if batch_first else x[:5])
        assert [len(y) for y in parts] == ([8] * 3 if batch_first else [4] * 2)
        torch.testing.assert_close(torch.cat(parts, int(batch_first)), layer(x)[0])
        assert found.norms["h"].shape == (1, 4)
    both = WRAPPERS[wrapper](fastrnn.GRU(3, 4, bidirectional=True))
    with pytest.raises(ValueError, match="bidirectional"):
        fastrnn.tbptt(both, x, window=4)


def test_which_dimension_is_time_can_be_said() -> None:
    class Swapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = fastrnn.GRU(3, 4)

        def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
            y, hx = self.rnn(x.transpose(0, 1), hx)
            return y.transpose(0, 1), hx

    model, x = Swapping(), torch.randn(2, 12, 3)
    parts = [y for y, *_ in fastrnn.tbptt(model, x, window=5, batch_first=True)]
    torch.testing.assert_close(torch.cat(parts, 1), model(x)[0])
    assert fastrnn.diagnose(model, x, batch_first=True).norms["h"].shape == (1, 11)
    batch_first = fastrnn.GRU(3, 4, batch_first=True)
    unbatched = fastrnn.tbptt(batch_first, x[0], window=4, batch_first=True)
    assert [len(y) for y, *_ in unbatched] == [4] * 3


def test_tokens_are_a_batch_of_two_dimensions() -> None:
    for batch_first in (False, True):
        model, tokens = Around(batch_first, tokens=True), torch.randint(7, (5, 6))
        parts = [y for y, *_ in fastrnn.tbptt(model, tokens, window=2)]
        torch.testing.assert_close(torch.cat(parts, int(batch_first)), model(tokens)[0])


def test_an_unknown_time_dimension_is_refused() -> None:
    layer, x = fastrnn.GRU(3, 4), torch.randn(9, 2, 3)
    mixed = nn.ModuleList([Around(True), Around(False)])
    for model in (lambda x, hx: layer(x, hx), nn.Linear(3, 4), mixed):
        with pytest.raises(ValueError, match="say batch_first=False or batch_first=True"):
            fastrnn.tbptt(model, x, window=4)
        with pytest.raises(ValueError, match="say batch_first=False or batch_first=True"):
            fastrnn.diagnose(model, x)
    with pytest.raises(ValueError, match=r"may be \[batch, time\], or \[time, features\]"):
        fastrnn.tbptt(Around(True), x[0], window=4)
    parts = fastrnn.tbptt(lambda x, hx: layer(x, hx), x, window=4, batch_first=False)
    torch.testing.assert_close(torch.cat([y for y, *_ in parts]), layer(x)[0])


@pytest.mark.parametrize("given", [list, tuple, torch.tensor, "numpy"])
@pytest.mark.parametrize(("window", "stride"), [(4, None), (5, 2)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_that_end_within_the_stream(
    batch_first: bool, window: int, stride: int | None, given: Any
) -> None:
    layer = fastrnn.LSTM(3, 5, batch_first=batch_first)
    shape = (4, 13, 3) if batch_first else (13, 4, 3)
    x, hx = torch.randn(shape), (torch.randn(1, 4, 5), torch.randn(1, 4, 5))
    ends = [13, 0, 5, 8]
    lengths = torch.tensor(ends).numpy() if given == "numpy" else given(ends)
    expected, last = layer(x, hx, lengths=torch.tensor(ends))
    parts = list(fastrnn.tbptt(layer, x, hx, window=window, stride=stride, lengths=lengths))
    torch.testing.assert_close(torch.cat([p.y for p in parts], int(batch_first)), expected)
    torch.testing.assert_close(parts[-1].hx, last)


def test_bad_lengths_are_refused() -> None:
    layer, x = fastrnn.GRU(3, 4), torch.randn(9, 2, 3)
    for wrong in ([10, 1], [-1, 3]):
        with pytest.raises(ValueError, match="lengths must be between 0 and 9"):
            fastrnn.tbptt(layer, x, window=4, lengths=wrong)
    for wrong in ([1.0, 2.0], [True, False]):
        with pytest.raises(TypeError, match="lengths should be integers"):
            fastrnn.tbptt(layer, x, window=4, lengths=wrong)


class State(NamedTuple):
    h: Tensor
    c: Tensor
    calls: int


@dataclass
class Hidden:
    h: Tensor


class Structured(nn.Module):
    """Its states are as `wrap` makes them of (h, c), and `unwrap` makes (h, c) of them."""

    def __init__(self, wrap: Callable[..., Any], unwrap: Callable[[Any], Any]) -> None:
        super().__init__()
        self.rnn, self.wrap, self.unwrap = fastrnn.LSTM(3, 4), wrap, unwrap

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        y, (h, c) = self.rnn(x, None if hx is None else self.unwrap(hx))
        return y, self.wrap(h, c)


STRUCTURES = {
    "named tuple": (lambda h, c: State(h, c, 1), lambda s: s[:2], ["h", "c"]),
    "list": (lambda h, c: [h, c], tuple, ["h", "c"]),
    "dict": (lambda h, c: {"a": (h, c)}, lambda s: s["a"], ["a.0", "a.1"]),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_states_in_any_structure(structure: str) -> None:
    wrap, unwrap, names = STRUCTURES[structure]
    model, x = Structured(wrap, unwrap), torch.randn(9, 2, 3)
    parts = list(fastrnn.tbptt(model, x, window=4, stride=2))
    torch.testing.assert_close(torch.cat([p.y for p in parts]), model(x)[0])
    last = parts[-1].hx
    assert type(last) is type(wrap(x, x))
    assert not any(s.requires_grad for s in unwrap(last))
    torch.manual_seed(1)
    found = fastrnn.diagnose(model, x)
    torch.manual_seed(1)
    plain = fastrnn.diagnose(model.rnn, x)
    assert list(found.norms) == names
    for mine, norms in zip(found.norms.values(), plain.norms.values(), strict=True):
        assert torch.equal(mine, norms)


def test_states_that_cannot_be_detached_are_refused() -> None:
    model, x = Structured(lambda h, c: Hidden(h), lambda s: (s.h, s.h)), torch.randn(9, 2, 3)
    with pytest.raises(TypeError, match="states in a Hidden cannot be detached"):
        list(fastrnn.tbptt(model, x, window=4))
    with pytest.raises(TypeError, match="states in a Hidden cannot be detached"):
        fastrnn.diagnose(model, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window should be at least 1"),
        ({"window": 4, "stride": 5}, "stride should be from 1 to window = 4"),
        ({"window": 4, "stride": 0}, "stride should be from 1"),
    ],
)
def test_bad_windows_are_refused(options: dict[str, int], message: str) -> None:
    """At once, not when the first part is asked for."""
    with pytest.raises(ValueError, match=message):
        fastrnn.tbptt(fastrnn.GRU(3, 4), torch.randn(9, 2, 3), **options)
    with pytest.raises(ValueError, match="bidirectional"):
        fastrnn.tbptt(fastrnn.GRU(3, 4, bidirectional=True), torch.randn(9, 2, 3), window=4)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_norms_of_a_linear_network_are_powers(backend: str) -> None:
    """ReLU units kept positive are linear: each step multiplies the gradient by W_hh."""
    layer = fastrnn.RNN(1, 4, nonlinearity="relu").double()
    with torch.no_grad():
        layer.weight_hh_l0.copy_(0.9 * torch.eye(4))
        layer.weight_ih_l0.fill_(1)
    with using(backend):
        found = fastrnn.diagnose(layer, torch.ones(30, 3, 1, dtype=torch.float64))
    expected = 0.9 ** found.lags.double()
    torch.testing.assert_close(found.norms["h"][0], expected)
    torch.testing.assert_close(found.rate(), torch.tensor([0.9], dtype=torch.float64))
    assert found.reach(0.5).tolist() == [7]  # 0.9^6 = 0.53, from lag 1 on
    assert found.norms.keys() == {"h"}


@each_layer
def test_norms_against_jacobians(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    layer = ours(3, 4, 2, **options).double()
    x = torch.randn(8, 1, 3, dtype=torch.float64)
    torch.manual_seed(3)
    found = fastrnn.diagnose(layer, x, lags=5)
    torch.manual_seed(3)
    v = torch.randn(1, 1, 4, dtype=torch.float64)
    v /= v.norm()
    for k in range(1, 6):
        before = layer(x[: 8 - k])[1]
        states = before if isinstance(before, tuple) else (before,)
        leaves = [s.detach().requires_grad_() for s in states]
        y, _ = layer(x[8 - k :], tuple(leaves) if len(leaves) > 1 else leaves[0])
        for norms, d in zip(
            found.norms.values(), torch.autograd.grad((y[-1] * v).sum(), leaves), strict=True
        ):
            torch.testing.assert_close(norms[:, k - 1], d.norm(dim=-1)[:, 0])


def test_exploding_and_vanishing() -> None:
    layer = fastrnn.RNN(2, 32)
    x = 1e-5 * torch.randn(40, 2, 2)  # so that tanh stays linear
    with torch.no_grad():
        nn.init.orthogonal_(layer.weight_hh_l0, 1.2)
        for bias in (layer.bias_ih_l0, layer.bias_hh_l0):
            bias.zero_()
    assert 1.15 < fastrnn.diagnose(layer, x).rate().item() < 1.25
    with torch.no_grad():
        nn.init.orthogonal_(layer.weight_hh_l0, 0.5)
    found = fastrnn.diagnose(layer, x)
    assert 0.45 < found.rate().item() < 0.55
    assert found.reach().item() < 10
    assert "layer 0" in str(found)


def test_layouts_of_diagnose() -> None:
    layer = fastrnn.LSTM(3, 4, 2, batch_first=True)
    x = torch.randn(5, 9, 3)
    assert fastrnn.diagnose(layer, x).norms["c"].shape == (2, 8)
    unbatched = fastrnn.diagnose(layer, x[0], (torch.zeros(2, 4), torch.zeros(2, 4)), lags=3)
    assert unbatched.norms["h"].shape == (2, 3)
    assert all(p.grad is None for p in layer.parameters())


def test_bad_diagnoses_are_refused() -> None:
    layer = fastrnn.GRU(3, 4)
    with pytest.raises(ValueError, match="at least two steps"):
        fastrnn.diagnose(layer, torch.randn(1, 2, 3))
    for lags in (0, 9):
        with pytest.raises(ValueError, match="lags should be from 1 to 8"):
            fastrnn.diagnose(layer, torch.randn(9, 2, 3), lags=lags)
    with pytest.raises(ValueError, match="bidirectional"):
        fastrnn.diagnose(fastrnn.GRU(3, 4, bidirectional=True), torch.randn(9, 2, 3))


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    ax = fastrnn.diagnose(fastrnn.LSTM(3, 4, 2), torch.randn(9, 2, 3)).plot()
    assert len(ax.lines) == 4
    assert ax.get_yscale() == "log"


def test_nothing_is_imported_for_plots_before_one_is_asked_for() -> None:
    found = run_python("import fastrnn, sys; assert 'matplotlib' not in sys.modules")
    assert found.returncode == 0, found.stderr


def test_diagnose_under_a_default_device() -> None:
    layer, x = fastrnn.GRU(3, 4), torch.randn(6, 2, 3)
    with torch.device("meta"):
        found = fastrnn.diagnose(layer, x)
        assert found.lags.device == found.norms["h"].device
        assert "at lag 5" in str(found)
