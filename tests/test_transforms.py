"""torch.func: per-sample gradients, ensembles, and nestings of vmap and grad, against loops."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import (
    BACKEND_NAMES,
    LAYERS,
    STEPS,
    Case,
    Inputs,
    Named,
    assert_within_budget,
    loss_of_layer,
    make_inputs,
    small_layer,
    using,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn import functional
from fastrnn.backends import by_name
from fastrnn.cells import CELLS

backends = pytest.mark.parametrize("backend", BACKEND_NAMES)
cells = pytest.mark.parametrize("cell", CELLS)
MEMBERS = 3

CASES = [
    Case(4, 2, 3, 5),
    Case(1, 1, 1, 1),
    Case(3, 1, 2, 17, hx=False, bias=False),
    Case(4, 2, 3, 5, reverse=(False, True)),
    Case(4, 3, 2, 3, lengths=(4, 2, 1), reverse=(False, True)),
    Case(3, 2, 3, 4, P=2, reverse=(False, True)),
    Case(4, 3, 2, 3, ends=(2, 0, 4), reverse=(False, True)),
    Case(5, 3, 2, 3, cuts=0.3, to=True, reverse=(False, True)),
    Case(5, 3, 2, 3, ends=(3, 5, 1), cuts=0.3, to=True, hx=False, reverse=(True,)),
    Case(4, 2, 2, 3, every=True, reverse=(False, True)),
    Case(3, 2, 2, 3, grouped=True, reverse=(False, True, False)),
]


def skip_without_projection(cell: str, case: Case) -> None:
    if case.P and CELLS[cell].states == 1:
        pytest.skip(f"{cell} has no projection")


def gradients_of(
    cell: str, case: Case, inputs: Inputs
) -> tuple[list[str], Callable[..., tuple[Tensor, ...]]]:
    """Names of the leaves, and every gradient of a loss as a function of them, of lengths and of
    resets."""
    names = list(inputs.leaves)

    def loss(leaves: tuple[Tensor, ...], lengths: Any, reset: Any) -> Tensor:
        given = dict(zip(names, leaves, strict=True))
        y, ends, c = functional.layer(
            cell,
            given["x"],
            tuple(given[f"state{k}"] for k in range(len(inputs.states))) or None,
            [given.get(f"weight{k}") for k in range(len(inputs.weights))],
            case.reverse,
            case.batch_sizes,
            lengths=lengths,
            reset=reset,
            reset_states=tuple(given[f"at_reset{k}"] for k in range(len(inputs.at_reset))) or None,
            all_states=case.every,
        )
        return torch.stack([(o * o.cos()).sum() for o in (y, *ends, c) if o is not None]).sum()

    def gradients(*arguments: Any) -> tuple[Tensor, ...]:
        *leaves, lengths, reset = arguments
        found: tuple[Tensor, ...] = grad(loss)(tuple(leaves), lengths, reset)
        return found

    return names, gradients


def members_of(
    cell: str, case: Case, own: Callable[[str], bool], dtype: torch.dtype = torch.float64
) -> tuple[list[Any], tuple[int | None, ...], Callable[..., tuple[Tensor, ...]], list[str]]:
    """Arguments of the gradients' function, stacked where they are each member's own; the axes of
    the members; the function; and the names of what it returns."""
    each = [make_inputs(cell, case, dtype, seed) for seed in range(MEMBERS)]
    names, gradients = gradients_of(cell, case, each[0])
    leaves = [[t.detach() for t in m.leaves.values()] for m in each]
    arguments: list[Any] = [
        torch.stack(kind) if own(name) else kind[0]
        for name, kind in zip(names, zip(*leaves, strict=True), strict=True)
    ]
    lengths = torch.tensor(case.ends) if case.ends else None
    reset = case.reset
    if own("lengths") and lengths is not None:
        lengths = torch.stack([lengths.roll(k) for k in range(MEMBERS)])
    if own("reset") and reset is not None:
        reset = torch.stack([reset.roll(k, 0) for k in range(MEMBERS)])
    arguments += [lengths, reset]
    kinds = [*names, "lengths", "reset"]
    dims = tuple(
        0 if own(name) and a is not None else None for name, a in zip(kinds, arguments, strict=True)
    )
    return arguments, dims, gradients, names


def loop(
    function: Callable[..., Any], arguments: Sequence[Any], dims: Sequence[int | None]
) -> list[Tensor]:
    """What vmap computes, member by member."""
    size = next(a.shape[d] for a, d in zip(arguments, dims, strict=True) if d is not None)
    each = [
        function(
            *(a if d is None else a.select(d, k) for a, d in zip(arguments, dims, strict=True))
        )
        for k in range(size)
    ]
    return [torch.stack(found) for found in zip(*each, strict=True)]


def is_weight(name: str) -> bool:
    return name.startswith("weight")


OWN = {
    "inputs": lambda name: not is_weight(name),
    "x": lambda name: name == "x",
    "states": lambda name: name.startswith("state"),
    "weights": is_weight,
    "one weight": lambda name: name == "weight1",
    "x and weights": lambda name: name == "x" or is_weight(name),
    "everything": lambda name: True,
}


@cells
@backends
@pytest.mark.parametrize(
    ("own", "case"),
    [
        *itertools.product(["inputs", "weights", "everything"], CASES),
        *itertools.product(["x", "states", "one weight", "x and weights"], CASES[3:5]),
    ],
    ids=str,
)
def test_gradients_are_those_of_a_loop(cell: str, backend: str, own: str, case: Case) -> None:
    skip_without_projection(cell, case)
    arguments, dims, gradients, _ = members_of(cell, case, OWN[own])
    with using(backend):
        found = vmap(gradients, dims)(*arguments)
        again = vmap(gradients, dims)(*arguments)
    with using("reference"):
        expected = loop(gradients, arguments, dims)
    torch.testing.assert_close(list(found), expected)
    assert all(map(torch.equal, found, again))


@cells
@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", ["inputs", "x and weights"])
@pytest.mark.parametrize(
    "case",
    [Case(7, 3, 5, 19, reverse=(False, True)), Case(9, 1, 33, 16), Case(45, 3, 33, 19)],
    ids=str,
)
def test_error_within_budget(
    cell: str, backend: str, dtype: torch.dtype, own: str, case: Case
) -> None:
    if cell == "rnn_relu":
        pytest.skip("rounding moves a state to the other side of the kink")
    arguments, dims, gradients, names = members_of(cell, case, OWN[own], dtype)

    def run(name: str, wide: bool) -> Named:
        given = [a.double() if wide and a is not None else a for a in arguments]
        with using(name):
            return dict(zip(names, vmap(gradients, dims)(*given), strict=True))

    terms = case.T * case.B + case.I + case.H
    assert_within_budget(
        run(backend, False), run("reference", False), run("reference", True), dtype, terms
    )


@backends
@pytest.mark.parametrize(("_theirs", "layer", "options"), LAYERS)
@pytest.mark.parametrize("steps", ["all", "lengths", "reset"])
def test_per_sample_gradients_of_a_module(
    _theirs: Any, layer: Any, options: dict[str, Any], steps: str, backend: str
) -> None:
    """Two layers in two directions, batch first, each sample a batch of one or no batch at all."""
    module = layer(3, 5, 2, bidirectional=True, batch_first=True, dtype=torch.float64, **options)
    params = {k: v.detach() for k, v in module.named_parameters()}
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    extra = {
        "all": None,
        "lengths": torch.tensor([[6], [2], [0], [5]]),
        "reset": torch.rand(4, 1, 6) < 0.3,
    }[steps]

    def loss(params: Named, x: Tensor, extra: Any) -> Tensor:
        given = (x,) if extra is None else (x.unsqueeze(0),)
        y, _ = functional_call(module, params, given, {} if extra is None else {steps: extra})
        result: Tensor = y.square().sum()
        return result

    with using(backend):
        found = vmap(grad(loss), (None, 0, None if extra is None else 0))(params, x, extra)
    with using("reference"):
        each = [grad(loss)(params, x[k], None if extra is None else extra[k]) for k in range(4)]
    for name in params:
        torch.testing.assert_close(found[name], torch.stack([e[name] for e in each]))


@cells
def test_per_sample_gradients_can_be_changed_one_by_one(cell: str) -> None:
    """They are one allocation, and yet autograd tells a change of one from that of another."""
    (x, *weights), layer = small_layer(cell)
    places = tuple(range(1, 1 + len(weights)))
    with using("cpu"):
        found = vmap(grad(loss_of_layer(layer), places), (0, *(None,) * len(weights)))(
            torch.stack([x, -x]), *weights
        )
    before = [g.clone() for g in found]
    for k, changed in enumerate(found):
        versions = [g._version for g in found]
        changed.zero_()
        after = [g._version for g in found]
        assert [a != b for a, b in zip(after, versions, strict=True)] == [
            j == k for j in range(len(found))
        ]
        for mine, kept in zip(found[k + 1 :], before[k + 1 :], strict=True):
            assert torch.equal(mine, kept)


@backends
@pytest.mark.parametrize(("_theirs", "step", "options"), STEPS)
def test_cells(_theirs: Any, step: Any, options: dict[str, Any], backend: str) -> None:
    module = step(3, 5, dtype=torch.float64, **options)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    hx: Any = torch.randn(4, 2, 5, dtype=torch.float64)
    hx = (hx, hx.cos()) if step is fastrnn.LSTMCell else hx
    params = {k: v.detach() for k, v in module.named_parameters()}

    def loss(params: Named, x: Tensor, hx: Any) -> Tensor:
        found = functional_call(module, params, (x, hx))
        return (found[0] if isinstance(found, tuple) else found).square().sum()

    with using(backend):
        ours = vmap(grad(loss), (None, 0, 0))(params, x, hx)
    with using("reference"):
        truth = vmap(grad(loss), (None, 0, 0))(params, x, hx)
    torch.testing.assert_close(ours, truth)


@backends
@pytest.mark.parametrize(("_theirs", "layer", "options"), LAYERS)
@pytest.mark.parametrize("own_x", [False, True])
@pytest.mark.parametrize("members", [1, 2, 11])
def test_ensemble_of_modules(
    _theirs: Any, layer: Any, options: dict[str, Any], own_x: bool, members: int, backend: str
) -> None:
    """More of them than kernels take groups; outputs, and gradients of the weights."""
    modules = [
        layer(3, 5, 2, bidirectional=True, dtype=torch.float64, **options) for _ in range(members)
    ]
    params, _ = stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    x = torch.randn(*[members] * own_x, 4, 2, 3, dtype=torch.float64)

    def call(params: Named, x: Tensor) -> Tensor:
        y: Tensor = functional_call(base, params, (x,))[0]
        return y

    with using(backend):
        found = vmap(call, (0, 0 if own_x else None))(params, x)
        found.square().sum().backward()
    for k, module in enumerate(modules):
        with using("reference"):
            y, _ = module(x[k] if own_x else x)
        y.square().sum().backward()
        torch.testing.assert_close(found[k], y)
        for name, weight in module.named_parameters():
            torch.testing.assert_close(params[name].grad[k], weight.grad)


@backends
def test_packed_sequences(backend: str) -> None:
    module = fastrnn.LSTM(3, 5, dtype=torch.float64)
    params = {k: v.detach() for k, v in module.named_parameters()}
    sizes = torch.tensor([3, 2, 2, 1])
    data = torch.randn(4, 8, 3, dtype=torch.float64)

    def loss(params: Named, data: Tensor) -> Tensor:
        y, _ = functional_call(module, params, (PackedSequence(data, sizes),))
        result: Tensor = y.data.square().sum()
        return result

    with using(backend):
        found = vmap(grad(loss), (None, 0))(params, data)
    each = [grad(loss)(params, d) for d in data]
    for name in params:
        torch.testing.assert_close(found[name], torch.stack([e[name] for e in each]))


@pytest.mark.parametrize("lengths", [[[3, 5]], [[-1, 2]]])
def test_bad_lengths_raise(lengths: list[list[int]]) -> None:
    """Where values are looked at at all: neither in plain torch under vmap nor on a GPU."""
    module = fastrnn.GRU(3, 5)
    x = torch.randn(1, 4, 2, 3)
    with using("cpu"), pytest.raises(ValueError, match="lengths must be between 0 and 4"):
        vmap(lambda x, n: module(x, lengths=n)[0])(x, torch.tensor(lengths))


@cells
@pytest.mark.parametrize("own", ["x", "x and weights"])
def test_one_kernel_call_serves_all(cell: str, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run member by member where the backend takes them as rows or groups."""
    cpu = by_name("cpu")
    calls = {"forward": 0, "backward": 0}

    def counting(name: str) -> Callable[..., Any]:
        method = getattr(type(cpu), name)

        def counted(self: Any, *arguments: Any) -> Any:
            calls[name] += 1
            return method(self, *arguments)

        return counted

    arguments, dims, gradients, _ = members_of(cell, Case(4, 2, 3, 5), OWN[own])
    with using("cpu"):
        gradients(*(a if d is None else a[0] for a, d in zip(arguments, dims, strict=True)))
    for name in calls:
        monkeypatch.setattr(cpu, name, counting(name).__get__(cpu))
    with using("cpu"):
        vmap(gradients, dims)(*arguments)
    assert calls == {"forward": 1, "backward": 1}


@cells
def test_what_needs_plain_torch(cell: str) -> None:
    """The automatic choice finds the reference; a kernel asked for says why it cannot."""
    (x, *weights), layer = small_layer(cell)
    direction = torch.randn_like(x)

    def of_x(x: Tensor) -> Tensor:
        return layer(x, *weights)[0]

    calls: dict[str, Callable[[], Any]] = {
        "forward-mode": lambda: torch.func.jvp(of_x, (x,), (direction,)),
        "functionalize": lambda: torch.func.functionalize(of_x)(x),
        "vmap over nothing": lambda: vmap(of_x)(x.new_empty(0, *x.shape)),
    }
    for reason, call in calls.items():
        with fastrnn.backend(None):
            call()
        with using("cpu"):  # which is remembered of these shapes, but not for those transforms
            layer(x, *weights)
            vmap(of_x)(x.expand(2, *x.shape))
        with fastrnn.backend("cpu"), pytest.raises(RuntimeError, match=f"refuses: .*{reason}"):
            call()


def test_dropout_between_layers_needs_a_randomness() -> None:
    module = fastrnn.LSTM(3, 5, 2, dropout=0.5)
    x = torch.randn(4, 6, 2, 3)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(module)(x)
    y, _ = vmap(module, randomness="different")(x)
    assert y.shape == (4, 6, 2, 5)


def test_frozen_weights_and_modules_around() -> None:
    """A model of several parts, one of them frozen."""
    embed, rnn, head = nn.Embedding(7, 3), fastrnn.GRU(3, 5), nn.Linear(5, 2)
    model = nn.ModuleDict({"embed": embed, "rnn": rnn, "head": head}).double()
    params = {k: v.detach() for k, v in model.named_parameters() if k != "rnn.weight_hh_l0"}
    frozen = {"rnn.weight_hh_l0": rnn.weight_hh_l0.detach()}
    tokens = torch.randint(7, (6, 4))

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, tokens: Tensor) -> Tensor:
            y, _ = rnn(embed(tokens))
            found: Tensor = head(y[-1])
            return found

    def loss(params: Named, tokens: Tensor) -> Tensor:
        named = {f"parts.{k}": v for k, v in {**params, **frozen}.items()}
        found: Tensor = functional_call(Chain(), named, (tokens,)).square().sum()
        return found

    found = vmap(grad(loss), (None, 0))(params, tokens)
    each = [grad(loss)(params, t) for t in tokens]
    for name in params:
        torch.testing.assert_close(found[name], torch.stack([e[name] for e in each]))


@backends
@pytest.mark.parametrize("around", ["vmap", "grad"])
def test_recomputing_layers(backend: str, around: str) -> None:
    module = fastrnn.LSTM(3, 5, bidirectional=True, recompute=2, dtype=torch.float64)
    params = {k: v.detach() for k, v in module.named_parameters()}
    x = torch.randn(4, 7, 2, 3, dtype=torch.float64)

    def loss(params: Named, x: Tensor) -> Tensor:
        found: Tensor = functional_call(module, params, (x,))[0].square().sum()
        return found

    def total(params: Named) -> Tensor:
        found: Tensor = vmap(loss, (None, 0))(params, x).sum()
        return found

    with using(backend):
        if around == "grad":
            found = grad(total)(params)
        else:
            found = {k: g.sum(0) for k, g in vmap(grad(loss), (None, 0))(params, x).items()}
    with using("reference"):
        each = [grad(loss)(params, mine) for mine in x]
    for name in params:
        torch.testing.assert_close(found[name], torch.stack([e[name] for e in each]).sum(0))


@backends
def test_no_grad_around(backend: str) -> None:
    """A gradient taken inside of it works, and nothing outside is tracked."""
    module = fastrnn.GRU(3, 5)
    params = dict(module.named_parameters())
    x = torch.randn(4, 6, 3)

    def loss(params: Named, x: Tensor) -> Tensor:
        found: Tensor = functional_call(module, params, (x,))[0].square().sum()
        return found

    with using(backend):
        tracked = vmap(grad(loss), (None, 0))(params, x)
        with torch.no_grad():
            found = vmap(grad(loss), (None, 0))(params, x)
            y, _ = vmap(module)(x)
    assert not y.requires_grad
    for name in params:
        assert tracked[name].requires_grad
        assert not found[name].requires_grad
        torch.testing.assert_close(found[name], tracked[name].detach())


def test_compiled() -> None:
    """On the reference: the compiler sees plain torch."""
    module = fastrnn.RNN(3, 5)
    params = {k: v.detach() for k, v in module.named_parameters()}
    x = torch.randn(4, 6, 3)

    def loss(params: Named, x: Tensor) -> Tensor:
        found: Tensor = functional_call(module, params, (x,))[0].square().sum()
        return found

    mapped = vmap(grad(loss), (None, 0))
    found = torch.compile(mapped, backend="aot_eager")(params, x)
    torch.testing.assert_close(found, mapped(params, x))
