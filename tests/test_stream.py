"""fastrnn.stream: step by step as the layer does it at once, whatever happens in between."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BACKEND_NAMES, LAYERS, STEPS, assert_within_budget, using
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fastrnn
from fastrnn.streaming import Stream

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
each_layer = pytest.mark.parametrize(("theirs", "ours", "options"), LAYERS)
each_step = pytest.mark.parametrize(("theirs", "ours", "options"), STEPS)
each_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)


def run(step: Stream, xs: Tensor) -> Tensor:
    return torch.stack([step(x) for x in xs])


def named(y: Tensor, states: Any) -> dict[str, Tensor]:
    ends = states if isinstance(states, tuple) else (states,)
    return {"y": y} | {f"end{k}": end for k, end in enumerate(ends)}


def step_by_step(layer: nn.Module, xs: Tensor) -> dict[str, Tensor]:
    """What people do without a stream: a call a step, states handed on by hand."""
    found, states = [], None
    with torch.no_grad():
        for x in xs:
            y, states = layer(x.unsqueeze(0), states)
            found.append(y.squeeze(0))
    return named(torch.stack(found), states)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [None, 1, 3, 9])
@pytest.mark.parametrize("sizes", [(5, 17, 1), (40, 33, 3)], ids=str)
@each_layer
@each_backend
def test_equals_the_layer(
    theirs: Any,
    ours: Any,
    options: dict[str, Any],
    sizes: tuple[int, int, int],
    batch: int | None,
    dtype: torch.dtype,
    backend: str,
) -> None:
    I, H, L = sizes
    layer = ours(I, H, L, **options).to(dtype)
    lead = () if batch is None else (batch,)
    xs = torch.randn(6, *lead, I).to(dtype)
    with using(backend):
        step = fastrnn.stream(layer, batch)
        found = run(step, xs)
    plain = theirs(I, H, L, **options).to(dtype)
    plain.load_state_dict(layer.state_dict())
    assert_within_budget(
        named(found, step.states),
        step_by_step(plain, xs),
        step_by_step(copy.deepcopy(plain).double(), xs.double()),
        dtype,
        (I + 2 * H) * L * len(xs),
    )


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@each_backend
def test_projection(backend: str) -> None:
    layer = fastrnn.LSTM(5, 8, 2, proj_size=3)
    xs = torch.randn(4, 2, 5)
    with using(backend):
        found = run(fastrnn.stream(layer, 2), xs)
    torch.testing.assert_close(found, layer(xs)[0])


@each_layer
def test_nothing_else_matters(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    """batch_first, training mode, dropout, grad and inference modes, autocast, strides."""
    layer = ours(5, 7, 2, dropout=0.9, batch_first=True, **options)
    xs = torch.randn(4, 3, 5)
    expected = ours(5, 7, 2, **options)
    expected.load_state_dict(layer.state_dict())
    y = expected(xs)[0]
    step = fastrnn.stream(layer, 3)
    found = [step(xs[0].requires_grad_()), step(xs[1].t().contiguous().t())]
    with torch.inference_mode():
        found.append(step(xs[2]))
    with torch.autocast("cpu", torch.bfloat16):
        found.append(step(xs[3]))
    torch.testing.assert_close(torch.stack(found), y)
    assert not any(f.requires_grad for f in found)


@each_layer
def test_outputs_and_states_are_the_callers(
    theirs: Any, ours: Any, options: dict[str, Any]
) -> None:
    step = fastrnn.stream(ours(5, 7, **options), 3)
    first = step(torch.randn(3, 5))
    kept, states = first.clone(), step.states
    held = [s.clone() for s in (states if isinstance(states, tuple) else (states,))]
    second = step(torch.randn(3, 5))
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    for s, h in zip(states if isinstance(states, tuple) else (states,), held, strict=True):
        assert torch.equal(s, h)
    step.states = states
    third = step(torch.zeros(3, 5))
    second.zero_()  # what belongs to the caller does not reach into the stream
    held[0].zero_()
    step.states = states
    assert torch.equal(step(torch.zeros(3, 5)), third)


ROWS: list[tuple[Any, list[int]]] = [
    (None, [0, 1, 2]),
    (1, [1]),
    (-1, [2]),
    (np.int64(2), [2]),
    (torch.tensor(1), [1]),
    (slice(0, 2), [0, 1]),
    (slice(None, None, 2), [0, 2]),
    ([0, 2], [0, 2]),
    ((2, 0), [0, 2]),
    ([], []),
    (np.array([0, 2]), [0, 2]),
    (torch.tensor([-1]), [2]),
    (torch.tensor([True, False, True]), [0, 2]),
    ([False, False, True], [2]),
    (np.array([True, False, False]), [0]),
    (np.array([0.0, 0.0, 1.0]), [2]),
    (np.zeros(3, np.float32), []),
    (torch.tensor([1.0, 0.0, 1.0], dtype=torch.bfloat16), [0, 2]),
    ([0.0, 1.0, 0.0], [1]),
]


@pytest.mark.parametrize(("rows", "meant"), ROWS, ids=lambda value: repr(value))
@pytest.mark.parametrize("given", [False, True])
@each_layer
def test_reset(
    theirs: Any, ours: Any, options: dict[str, Any], given: bool, rows: Any, meant: list[int]
) -> None:
    layer = ours(5, 7, 2, **options)
    first: Any = tuple(torch.randn(2, 3, 7) for _ in range(2))
    if ours is not fastrnn.LSTM:
        first = first[0]
    step = fastrnn.stream(layer, 3, first if given else None)
    fresh = fastrnn.stream(layer, 3, first if given else None)
    x, again = torch.randn(3, 5), torch.randn(3, 5)
    old = step(x)
    assert torch.equal(old, fresh(x))
    kept = fresh.states
    step.reset(rows)
    found = step(again)
    restarted = fastrnn.stream(layer, 3, first if given else None)(again)
    fresh.states = kept
    went_on = fresh(again)
    mask = torch.zeros(3, dtype=torch.bool)
    mask[meant] = True
    torch.testing.assert_close(found, torch.where(mask[:, None], restarted, went_on))
    step.reset()
    torch.testing.assert_close(step(again), restarted)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (3, IndexError, "row 3 is out of range: there are 3 rows"),
        ([0, -4], IndexError, "row -4 is out of range"),
        ([0, 0, 1], ValueError, r"named twice in \[0, 0, 1\]: a mask should be of bools"),
        ([True, False], ValueError, r"a mask of rows should have the shape \(3,\), got \(2,\)"),
        (True, ValueError, r"should have the shape \(3,\), got \(\)"),
        (np.array([0.0, 1.0]), ValueError, "should have the shape"),
        (torch.tensor([0.0, 0.5, 1.0]), ValueError, "floats that are 0 or 1"),
        (torch.tensor([0.0, torch.nan, 1.0]), ValueError, "floats that are 0 or 1"),
        (
            torch.tensor([0, 1, 1], dtype=torch.uint8),
            TypeError,
            "or a mask of bools, got torch.uint8",
        ),
        (torch.tensor([[0], [1]]), ValueError, r"one dimension, got the shape \(2, 1\)"),
    ],
    ids=repr,
)
def test_rows_that_are_none_are_refused(rows: Any, error: type, message: str) -> None:
    step = fastrnn.stream(fastrnn.GRU(3, 4), 3)
    step(torch.randn(3, 3))
    kept = step.states
    with pytest.raises(error, match=message):
        step.reset(rows)
    assert torch.equal(step.states, kept)


@pytest.mark.parametrize(
    ("done", "going_on"),
    [
        (True, False),
        (np.bool_(True), np.bool_(False)),
        (torch.tensor(1.0), torch.tensor(0.0)),
        ([1.0], [0.0]),
        (np.array([True]), np.array([False])),
    ],
)
def test_one_row_takes_a_flag(done: Any, going_on: Any) -> None:
    for batch in (1, None):
        step = fastrnn.stream(fastrnn.GRU(3, 4), batch)
        step(torch.randn(3) if batch is None else torch.randn(1, 3))
        step.reset(going_on)
        assert step.states.any()
        step.reset(done)
        assert not step.states.any()


@pytest.mark.parametrize(
    "rows", [[2, 2, 0], (0, 1, -1), np.array([1, 0, 2]), torch.tensor([0, 0, 0])]
)
@each_layer
def test_reorder(theirs: Any, ours: Any, options: dict[str, Any], rows: Any) -> None:
    layer, xs = ours(5, 7, 2, **options), torch.randn(4, 3, 5)
    step = fastrnn.stream(layer, 3)
    run(step, xs[:2])
    step.reorder(rows)
    seen = torch.cat([xs[:2, list(rows)], xs[2:]])
    torch.testing.assert_close(run(step, xs[2:]), layer(seen)[0][2:])


def test_bad_orders_are_refused() -> None:
    step = fastrnn.stream(fastrnn.GRU(3, 4), 3)
    for rows, error, message in (
        ([0, 1], ValueError, r"expected rows of shape \(3,\), got \(2,\)"),
        ([0, 1, 3], IndexError, "row 3 is out of range"),
        ([True, False, True], TypeError, "rows should be signed integers"),
    ):
        with pytest.raises(error, match=message):
            step.reorder(rows)


def test_it_notices_changed_weights() -> None:
    layer = fastrnn.LSTM(5, 7)
    step = fastrnn.stream(layer)
    x = torch.randn(5)

    def check() -> None:
        step.reset()
        torch.testing.assert_close(step(x)[None], layer(x[None])[0])

    check()
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
        layer.weight_ih_l0.mul_(2)
    check()
    layer.load_state_dict(fastrnn.LSTM(5, 7).state_dict(), assign=True)
    check()
    layer.weight_ih_l0 = nn.Parameter(torch.randn(28, 5))
    check()
    parametrize.register_parametrization(layer, "weight_ih_l0", nn.Tanh())
    check()
    with torch.no_grad():
        layer.parametrizations.weight_ih_l0.original.add_(1)
    check()
    parametrize.remove_parametrizations(layer, "weight_ih_l0")
    check()
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach().t().contiguous().t())
    check()
    with torch.no_grad():
        layer.weight_hh_l0.mul_(3)
    check()
    layer.double()
    x = x.double()
    check()
    torch.set_num_threads(1)
    step.refresh()
    check()


def test_states_survive_another_dtype() -> None:
    layer = fastrnn.GRU(5, 7)
    step = fastrnn.stream(layer)
    xs = torch.randn(4, 5)
    expected, _ = layer(xs)
    run(step, xs[:2])
    layer.double()
    torch.testing.assert_close(run(step, xs[2:].double()), expected[2:].double())


def weighted(norm: Callable[..., Any], **options: Any) -> Callable[[nn.Module], Any]:
    return lambda layer: norm(layer, "weight_hh_l0", **options)


def doubled(layer: Any, args: Any) -> None:
    layer.weight_hh_l0 = 2 * layer.halved


def by_a_hook(layer: Any) -> None:
    layer.halved = nn.Parameter(layer.weight_hh_l0.detach() / 2)
    del layer.weight_hh_l0
    layer.register_forward_pre_hook(doubled)


COMPUTED = {
    "weight_norm": weighted(nn.utils.weight_norm),
    "spectral_norm": weighted(nn.utils.spectral_norm),
    "prune": weighted(prune.l1_unstructured, amount=0.5),
    "own": by_a_hook,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("how", COMPUTED)
@each_layer
def test_weights_that_hooks_compute(
    theirs: Any, ours: Any, options: dict[str, Any], how: str
) -> None:
    """They are computed for every step, from what is there then."""
    layer, trained = ours(4, 6, **options), ours(4, 6, **options)
    step = fastrnn.stream(layer, 3)
    for each in (layer, trained):
        COMPUTED[how](each.eval())
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(run(step, x), layer(x)[0])
    layer.load_state_dict(trained.state_dict())
    step.reset()
    torch.testing.assert_close(run(step, x), trained(x)[0])


def with_pre_hook(layer: nn.Module) -> Any:
    return layer.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))


def with_keywords(layer: nn.Module) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (2 * args[0], *args[1:]), kwargs

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def with_hook(layer: nn.Module) -> Any:
    return layer.register_forward_hook(lambda module, args, result: (-result[0], *result[1:]))


def with_global_pre_hook(layer: nn.Module) -> Any:
    def hook(module: nn.Module, args: Any) -> Any:
        return (2 * args[0], *args[1:])

    return nn.modules.module.register_module_forward_pre_hook(hook)


def with_global_hook(layer: nn.Module) -> Any:
    def hook(module: nn.Module, args: Any, result: Any) -> Any:
        return (-result[0], *result[1:])

    return nn.modules.module.register_module_forward_hook(hook)


class Replaced:
    """`forward` of the instance replaced, as accelerate and profilers do."""

    def __init__(self, layer: Any) -> None:
        self.layer, forward = layer, layer.forward
        layer.forward = lambda x, *args, **options: forward(2 * x, *args, **options)

    def remove(self) -> None:
        del self.layer.forward


INTERCEPTIONS = [
    with_pre_hook, with_keywords, with_hook, with_global_pre_hook, with_global_hook, Replaced
]  # fmt: skip


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("intercept", INTERCEPTIONS)
@each_layer
def test_hooks_hold(
    theirs: Any,
    ours: Any,
    options: dict[str, Any],
    intercept: Callable[..., Any],
    batch: int | None,
) -> None:
    """Those that come after the stream, and until they go."""
    time, lead = (0, ()) if batch is None else (1, (batch,))
    layer = ours(5, 7, 2, dropout=0.9, batch_first=bool(time), **options)
    xs, states, expected = torch.randn(6, *lead, 5), None, []
    step = fastrnn.stream(layer, batch)
    found = [run(step, xs[:2])]
    handle = intercept(layer)
    try:
        found.append(run(step, xs[2:4]))
        made_with_it = run(fastrnn.stream(layer, batch), xs[:4])
        assert layer.training
        layer.eval()
        with torch.no_grad():
            intercepted = layer(xs[:4].transpose(0, time))[0].transpose(0, time)
    finally:
        handle.remove()
    found.append(run(step, xs[4:]))
    torch.testing.assert_close(made_with_it, intercepted)
    for t, x in enumerate(xs):
        handle = intercept(layer) if t in (2, 3) else None
        with torch.no_grad():
            y, states = layer(x.unsqueeze(time), states)
        expected.append(y.squeeze(time))
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(torch.cat(found), torch.stack(expected))


def test_a_subclass_with_a_forward_of_its_own() -> None:
    class Residual(fastrnn.GRU):
        def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:  # type: ignore[override]
            return x + super().forward(x, *args, **options)[0]  # type: ignore[no-any-return]

    layer, xs = Residual(5, 5), torch.randn(4, 3, 5)
    torch.testing.assert_close(run(fastrnn.stream(layer, 3), xs), layer(xs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [None, 1, 3])
@each_step
@each_backend
def test_cells(
    theirs: Any, ours: Any, options: dict[str, Any], batch: int | None, bias: bool, backend: str
) -> None:
    cell, lead = ours(5, 7, bias, **options), () if batch is None else (batch,)
    xs, h = torch.randn(4, *lead, 5), torch.randn(*lead, 7)
    first = (h, 2 * h) if ours is fastrnn.LSTMCell else h
    expected, states = [], first
    with using(backend):
        step = fastrnn.stream(cell, batch, first)
        found = run(step, xs)
    plain = theirs(5, 7, bias, **options)
    plain.load_state_dict(cell.state_dict())
    with torch.no_grad():
        for x in xs:
            states = plain(x, states)
            expected.append(states[0] if isinstance(states, tuple) else states)
    torch.testing.assert_close(found, torch.stack(expected))
    torch.testing.assert_close(step.states, states)
    hook = cell.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    states = plain(2 * xs[0], states)
    torch.testing.assert_close(step(xs[0]), states[0] if isinstance(states, tuple) else states)
    hook.remove()
    step.reset()
    torch.testing.assert_close(step.states, first)


class Tagger(nn.Module):
    """Embedding, dropout, two kinds of layers, head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding, self.drop = nn.Embedding(11, 5), nn.Dropout(0.5)
        self.body = nn.ModuleDict({"lstm": fastrnn.LSTM(5, 6, 2, dropout=0.5, **options)})
        self.gru, self.head = fastrnn.GRU(6, 4, **options), nn.Linear(4, 3)

    def forward(self, tokens: Tensor, scale: float = 1.0) -> Tensor:
        y = self.drop(self.body["lstm"](self.embedding(tokens))[0])
        return scale * self.head(self.gru(y)[0])  # type: ignore[no-any-return]


def tags(model: nn.Module, tokens: Tensor) -> Tensor:
    """At once, of tokens [T, ..]."""
    training, swap = model.training, model.gru.batch_first and tokens.dim() > 1
    with torch.no_grad():
        y = model.eval()(tokens.t() if swap else tokens)
    model.train(training)
    return y.transpose(0, 1) if swap else y  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("batch_first", [False, True])
@each_backend
def test_models(batch_first: bool, batch: int | None, backend: str) -> None:
    """In training mode, inference mode and autocast, with other weights and dtypes in between."""
    model = Tagger(batch_first=batch_first)
    tokens = torch.randint(11, (8,) if batch is None else (8, batch))
    with using(backend):
        step = fastrnn.stream(model, batch)
        expected = tags(model, tokens)
        found = [*map(step, tokens[:3])]
        with torch.inference_mode():
            found.append(step(tokens[3]))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(tokens[4]))
        torch.testing.assert_close(torch.stack(found), expected[:5])
        assert model.training
        assert model.drop.training
        assert not found[0].requires_grad
        model.double()
        torch.testing.assert_close(torch.stack([*map(step, tokens[5:7])]), expected[5:7].double())
        assert step.states["gru"].dtype is torch.float64
        torch.testing.assert_close(step(tokens[7], scale=2.0), 2 * expected[7].double())
        model.load_state_dict(Tagger().double().state_dict(), assign=True)
        step.reset()
        torch.testing.assert_close(torch.stack([*map(step, tokens)]), tags(model, tokens))


def test_states_of_models() -> None:
    model, tokens = Tagger(), torch.randint(11, (5, 3))
    first = {"gru": torch.randn(1, 3, 4)}
    step = fastrnn.stream(model, 3, first)
    assert torch.equal(step.states["gru"], first["gru"])
    start = step.states
    y = [*map(step, tokens)]
    kept = step.states
    assert [s.shape for s in kept["body.lstm"]] == [(2, 3, 6)] * 2
    after = step(tokens[0])
    step.states = kept
    assert torch.equal(step(tokens[0]), after)
    step.reset([1])
    for state, begun in zip(step.states["body.lstm"], start["body.lstm"], strict=True):
        assert torch.equal(state[:, 1], begun[:, 1])
        assert not torch.equal(state[:, 0], begun[:, 0])
    step.reset()
    step(tokens[0])
    step.reorder([2, 0, 0])
    reordered = torch.stack([tokens[0, [2, 0, 0]], *tokens[1:]])
    other = fastrnn.stream(model, 3, {"gru": first["gru"][:, [2, 0, 0]]})
    torch.testing.assert_close([*map(step, tokens[1:])], [*map(other, reordered)][1:])
    assert not torch.equal(torch.stack(y[1:]), torch.stack([*map(other, tokens[1:])]))


def test_models_of_cells_have_no_time_dimension() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lower, self.upper = fastrnn.LSTMCell(5, 6), fastrnn.GRUCell(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.upper(self.lower(x)[0])  # type: ignore[no-any-return]

    model, xs = Stacked(), torch.randn(4, 3, 5)
    lower, upper, expected = None, None, []
    for x in xs:
        lower = model.lower(x, lower)
        upper = model.upper(lower[0], upper)
        expected.append(upper)
    torch.testing.assert_close(run(fastrnn.stream(model, 3), xs), torch.stack(expected))
    torch.testing.assert_close(run(fastrnn.stream(model), xs[:, 0]), torch.stack(expected)[:, 0])


def test_wrapped_models() -> None:
    model, tokens = Tagger(), torch.randint(11, (4, 3))
    inner = copy.deepcopy(model)
    inner.body.compile(backend="eager")
    inner.gru.compile(backend="eager")
    for wrapped in (
        torch.compile(model, backend="eager"), nn.DataParallel(model), inner
    ):  # fmt: skip
        found = torch.stack([*map(fastrnn.stream(wrapped, 3), tokens)])
        torch.testing.assert_close(found, tags(model, tokens))
    layer, xs = fastrnn.GRU(5, 7), torch.randn(4, 3, 5)
    torch.testing.assert_close(run(fastrnn.stream(nn.DataParallel(layer), 3), xs), layer(xs)[0])


class Lasting(Tagger):
    """Its result is that of the last step, `keep` features of it."""

    def forward(self, tokens: Tensor, keep: int = 3) -> Tensor:  # type: ignore[override]
        return super().forward(tokens).select(int(self.gru.batch_first), -1)[..., :keep]


def test_results_without_a_time_dimension() -> None:
    model, tokens = Lasting(batch_first=True), torch.randint(11, (4, 3))
    expected = Tagger.forward(model.eval(), tokens.t()).transpose(0, 1)
    torch.testing.assert_close(torch.stack([*map(fastrnn.stream(model, 3), tokens)]), expected)
    step = fastrnn.stream(model, 3)
    with pytest.raises(ValueError, match=r"result of shape \(3, 1\) may have a time dimension"):
        step(tokens[0], keep=1)
    assert not step.states["gru"].any()  # the step that raised has not been taken
    told = fastrnn.stream(model, 3, keeps_time=False)
    torch.testing.assert_close(told(tokens[0], keep=1), expected[0, :, :1])
    with pytest.raises(ValueError, match=r"expected a result of shape \(3, 1\) and more, got"):
        fastrnn.stream(model, 3, keeps_time=True)(tokens[0])

    class Two(Tagger):
        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(tokens)
            return y, y.sum(-1)

    y, total = fastrnn.stream(Two(), 3)(tokens[0])
    assert (y.shape, total.shape) == ((1, 3, 3), (1, 3))  # structures are the model's


def test_models_that_a_stream_cannot_be_made_of() -> None:
    with pytest.raises(TypeError, match="not of Linear, which contains none"):
        fastrnn.stream(nn.Linear(3, 4))
    with pytest.raises(TypeError, match=r"not of GRU of torch\.nn: call fastrnn\.convert"):
        fastrnn.stream(nn.ModuleList([fastrnn.GRU(3, 4), nn.GRU(3, 4)]))
    with pytest.raises(TypeError, match="not of function"):
        fastrnn.stream(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the future"):
        fastrnn.stream(Tagger(bidirectional=True))
    for hx in ({"lstm": torch.zeros(1, 3, 6)}, torch.zeros(1, 3, 6)):
        with pytest.raises(ValueError, match="hx should be a dict of the states of layers, by"):
            fastrnn.stream(Tagger(), 3, hx)
    mixed = nn.ModuleList([fastrnn.GRU(3, 4), fastrnn.GRU(3, 4, batch_first=True)])
    with pytest.raises(ValueError, match="do not agree on batch_first"):
        fastrnn.stream(mixed, 3)
    step = fastrnn.stream(Tagger(), 3)
    with pytest.raises(ValueError, match="expected a dict with the states of each of"):
        step.states = {"gru": torch.zeros(1, 3, 4)}
    with pytest.raises(TypeError, match="a step takes a tensor, got list"):
        step([1, 2, 3])  # type: ignore[arg-type]


class Calls(nn.Module):
    """A model whose forward is `call(layer, x)`."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.rnn, self.call = fastrnn.GRU(3, 3), call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.rnn, x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda rnn, x: x, RuntimeError, "layer 'rnn' was not called"),
        (lambda rnn, x: rnn(rnn(x)[0])[0], RuntimeError, "layer 'rnn' was called twice"),
        (lambda rnn, x: rnn(x, torch.zeros(1, 2, 3))[0], RuntimeError, "layer 'rnn' is given hx"),
        (lambda rnn, x: rnn(x.transpose(0, 1))[0], ValueError, r"\(2, 1, 3\), time first, where"),
        (lambda rnn, x: rnn(torch.cat([x, x]))[0], ValueError, r"\(2, 2, 3\), time first, where"),
    ],
)
def test_steps_that_a_model_cannot_take(
    call: Callable[..., Any], error: type, message: str
) -> None:
    model = Calls(call)
    step = fastrnn.stream(model, 2, {"rnn": torch.ones(1, 2, 3)})
    with pytest.raises(error, match=message):
        step(torch.randn(2, 3))
    assert step.states["rnn"].eq(1).all()
    assert model.training
    assert "_run" not in vars(model.rnn)


def test_a_model_that_swaps_batch_and_time() -> None:
    model = Calls(lambda rnn, x: rnn(x.transpose(0, 1))[0].transpose(0, 1))
    xs = torch.randn(4, 2, 3)
    step = fastrnn.stream(model, 2, batch_first=True)
    torch.testing.assert_close(run(step, xs), model.rnn(xs)[0])


def test_a_model_with_other_layers_needs_another_stream() -> None:
    model = Calls(lambda rnn, x: rnn(x)[0])
    step = fastrnn.stream(model, 2)
    model.rnn = fastrnn.GRU(3, 3)
    with pytest.raises(RuntimeError, match="other recurrent layers than when the stream was made"):
        step(torch.randn(2, 3))


COPIES: dict[str, Callable[[Stream], Stream]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda step: pickle.loads(pickle.dumps(step)),  # type: ignore[no-any-return]
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", [fastrnn.LSTM, fastrnn.GRUCell, Tagger])
def test_copies_go_on_on_their_own(kind: Any, how: str) -> None:
    model = Tagger() if kind is Tagger else kind(5, 7)
    xs = torch.randint(11, (6, 3)) if kind is Tagger else torch.randn(6, 3, 5)
    expected = run(fastrnn.stream(model, 3), xs)
    step = fastrnn.stream(model, 3)
    run(step, xs[:2])
    other = COPIES[how](step)
    run(step, -xs[2:] if kind is not Tagger else xs[2:].flip(0))
    torch.testing.assert_close(run(other, xs[2:]), expected[2:])
    other.reset()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    shares = torch.equal(other(xs[0]), torch.zeros_like(expected[0]))
    assert shares == (how == "copy")


def test_threads_step_the_same_model() -> None:
    """One stream a thread, while another thread calls the model itself."""
    model, tokens = Tagger().eval(), torch.randint(11, (4, 20, 3))
    expected = [tags(model, row) for row in tokens]

    def streamed(row: Tensor) -> Tensor:
        step = fastrnn.stream(model, 3)
        return torch.stack([*map(step, row)])

    def called(row: Tensor) -> Tensor:
        with torch.no_grad():
            return [model(row) for _ in range(20)][-1]  # type: ignore[no-any-return]

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(call, row) for row in tokens for call in (streamed, called)]
        found = [job.result() for job in jobs]
    for mine, wanted in zip(found, [e for e in expected for _ in range(2)], strict=True):
        torch.testing.assert_close(mine, wanted)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="made of a fastrnn layer, not of LSTM"):
        fastrnn.stream(nn.LSTM(3, 4))
    with pytest.raises(ValueError, match="needs the future"):
        fastrnn.stream(fastrnn.LSTM(3, 4, bidirectional=True))
    with pytest.raises(ValueError, match="batch_size should be at least 1"):
        fastrnn.stream(fastrnn.LSTM(3, 4), 0)
    with pytest.raises(ValueError, match="expected a state of shape"):
        fastrnn.stream(fastrnn.GRU(3, 4), 2, torch.zeros(1, 1, 4))
    step = fastrnn.stream(fastrnn.GRU(3, 4), 2)
    for x in (torch.zeros(3), torch.zeros(1, 3), torch.zeros(2, 4), torch.zeros(2, 3).double()):
        with pytest.raises(ValueError, match=r"expected x of shape \(2, 3\), torch.float32 on cpu"):
            step(x)
    with pytest.raises(RuntimeError, match="hx should also be 3-D"):
        step.states = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="expected a state of shape"):
        step.states = torch.zeros(1, 3, 4)


@each_layer
def test_same_bits_on_repeat(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    layer, xs = ours(20, 33, **options), torch.randn(9, 1, 20)
    first, again = (run(fastrnn.stream(layer, 1), xs) for _ in range(2))
    assert torch.equal(first, again)


def test_many_streams_of_one_layer() -> None:
    layer, xs = fastrnn.LSTM(5, 7), torch.randn(6, 5)
    one, other = fastrnn.stream(layer), fastrnn.stream(layer)
    together = [(one(x), other(-x)) for x in xs]
    torch.testing.assert_close(torch.stack([y for y, _ in together]), layer(xs)[0])
    torch.testing.assert_close(torch.stack([y for _, y in together]), layer(-xs)[0])


def test_weights_that_are_negated_views() -> None:
    layer, x = fastrnn.GRU(3, 4), torch.randn(3)
    expected = fastrnn.stream(layer)(x)
    for name, weight in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(torch._neg_view(-weight.detach())))
    torch.testing.assert_close(fastrnn.stream(layer)(x), expected)


def test_made_under_another_default_device() -> None:
    layer, x = fastrnn.LSTM(4, 6), torch.randn(2, 4)
    with torch.device("meta"):
        step = fastrnn.stream(layer, 2)
    assert torch.equal(step(x), fastrnn.stream(layer, 2)(x))
