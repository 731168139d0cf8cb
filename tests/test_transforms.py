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
    make_inputs,
    using,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn import functional
from fastrnn.backends import by_name
from fastrnn.cells import CELLS

backends = pytest.mark.parametrize("backend", BACKEND_NAMES)
cells = pytest.mark.parametrize("cell", CELLS)
MEMBERS = 3
Layer = Callable[..., tuple[Tensor, ...]]

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
    (x, *weights), layer = small(cell)
    places = tuple(range(1, 1 + len(weights)))
    with using("cpu"):
        found = vmap(grad(loss_of(layer), places), (0, *(None,) * len(weights)))(
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


def small(cell: str, case: Case | None = None) -> tuple[list[Tensor], Layer]:
    """Detached leaves in double, and the layer as a function of x, w_ih, w_hh and the biases."""
    case = case or Case(4, 2, 3, 5, hx=False)
    inputs = make_inputs(cell, case, torch.float64)
    leaves = [t.detach() for t in inputs.leaves.values()]

    def layer(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        y, ends, _ = functional.layer(cell, x, None, weights, case.reverse)
        return (y, *ends)

    return leaves, layer


def loss_of(layer: Layer) -> Callable[..., Tensor]:
    def loss(*leaves: Tensor) -> Tensor:
        return torch.stack([(o * o.cos()).sum() for o in layer(*leaves)]).sum()

    return loss


@cells
@backends
def test_nested(cell: str, backend: str) -> None:
    """Every order of two vmaps and a grad, and the same numbers from each."""
    (x, *weights), layer = small(cell)
    loss = loss_of(layer)
    weights_dims = (0,) * len(weights)
    shared = (None,) * len(weights)
    samples = torch.randn(3, *x.shape, dtype=torch.float64)
    members = [torch.stack([w, -w / 2]) for w in weights]
    of_weights = tuple(range(1, 1 + len(weights)))
    of_all = tuple(range(1 + len(weights)))
    each = [[grad(loss, of_all)(s, *(w[m] for w in members)) for s in samples] for m in range(2)]
    truth = [
        torch.stack([torch.stack([each[m][s][k] for s in range(3)]) for m in range(2)])
        for k in of_all
    ]
    with using(backend):
        by_sample = vmap(grad(loss, of_all), (0, *shared))
        found = vmap(by_sample, (None, *weights_dims))(samples, *members)
        torch.testing.assert_close(list(found), truth)
        by_member = vmap(grad(loss, of_all), (None, *weights_dims))
        found = vmap(by_member, (0, *shared), 1)(samples, *members)
        torch.testing.assert_close(list(found), truth)

        def of_ensemble(x: Tensor, *members: Tensor) -> Tensor:
            return vmap(loss, (None, *weights_dims))(x, *members).sum()

        found = vmap(grad(of_ensemble, of_all), (0, *shared))(samples, *members)
        torch.testing.assert_close(found[0], truth[0].sum(0))
        for mine, theirs in zip(found[1:], truth[1:], strict=True):
            torch.testing.assert_close(mine, theirs.transpose(0, 1))

        def of_batch(samples: Tensor, *weights: Tensor) -> Tensor:
            return vmap(loss, (0, *shared))(samples, *weights).sum()

        found = vmap(grad(of_batch, of_weights), (None, *weights_dims))(samples, *members)
        torch.testing.assert_close(list(found), [t.sum(1) for t in truth[1:]])


@cells
@backends
@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_any_axis(cell: str, backend: str, in_dim: int) -> None:
    (x, *weights), layer = small(cell, Case(4, 2, 3, 5, hx=False, reverse=(False, True)))
    samples = torch.randn(5, *x.shape, dtype=torch.float64)
    expected = torch.stack([layer(s, *weights)[0] for s in samples])
    with using(backend):
        found = vmap(lambda x: layer(x, *weights)[0], in_dim, 2, chunk_size=2)(
            samples.movedim(0, in_dim)
        )
    torch.testing.assert_close(found.movedim(2, 0), expected)


@cells
@backends
def test_jacobians(cell: str, backend: str) -> None:
    """The pullback is mapped and the forward pass is not."""
    leaves, layer = small(cell)

    def ends(*leaves: Tensor) -> Tensor:
        return layer(*leaves)[1]

    everyone = tuple(range(len(leaves)))
    expected = torch.autograd.functional.jacobian(ends, tuple(leaves))
    with using(backend):
        torch.testing.assert_close(jacrev(ends, everyone)(*leaves), expected)
        torch.testing.assert_close(jacrev(ends, everyone, chunk_size=1)(*leaves), expected)
    with fastrnn.backend(None):
        torch.testing.assert_close(torch.func.jacfwd(ends, everyone)(*leaves), expected)


@cells
@backends
def test_higher_orders(cell: str, backend: str) -> None:
    """grad of grad, three deep, and per sample."""
    (x, *weights), layer = small(cell, Case(3, 2, 2, 3, hx=False))
    loss = loss_of(layer)
    w_hh = weights[1]

    def of_w(x: Tensor, w: Tensor) -> Tensor:
        return loss(x, weights[0], w, *weights[2:])

    def norm(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w: grad(function, 1)(x, w).square().sum()

    second, third = norm(of_w), norm(norm(of_w))
    samples = torch.randn(3, *x.shape, dtype=torch.float64)

    def of_samples(w: Tensor) -> Tensor:
        found: Tensor = vmap(grad(of_w, 1), (0, None))(samples, w)
        return (found.flatten(1).norm(dim=1) - 1).square().sum()

    with using("reference"):
        expected = [grad(f, 1)(x, w_hh) for f in (second, third)]
        per_sample = torch.stack([grad(second, 1)(s, w_hh) for s in samples])
        penalty = grad(of_samples)(w_hh)
    with using(backend):
        found = [grad(f, 1)(x, w_hh) for f in (second, third)]
        torch.testing.assert_close(found, expected)
        found = vmap(grad(second, 1), (0, None))(samples, w_hh)
        torch.testing.assert_close(found, per_sample)
        torch.testing.assert_close(grad(of_samples)(w_hh), penalty)


@cells
def test_hessian(cell: str) -> None:
    """Forward over reverse finds the reference."""
    (x, *weights), layer = small(cell, Case(3, 2, 2, 2, hx=False))
    loss = loss_of(layer)
    found = torch.func.hessian(loss, 2)(x, *weights)
    expected = torch.autograd.functional.hessian(
        lambda w: loss(x, weights[0], w, *weights[2:]), weights[1]
    )
    torch.testing.assert_close(found, expected)


@cells
@backends
def test_forward_mode_of_a_pullback(cell: str, backend: str) -> None:
    """The layer ran on its backend before the forward mode began."""
    leaves, layer = small(cell)
    with using(backend):
        outputs, pull = vjp(layer, *leaves)
    grads, directions = (tuple(torch.randn_like(o) for o in outputs) for _ in range(2))
    found, slopes = torch.func.jvp(lambda *g: pull(g), grads, directions)
    torch.testing.assert_close(found, pull(grads))
    torch.testing.assert_close(slopes, pull(directions))


@cells
@backends
@pytest.mark.parametrize("mapped", [False, True])
def test_one_level_differentiated_twice(cell: str, backend: str, mapped: bool) -> None:
    """Autograd inside of grad, on what grad differentiates."""
    (x, *weights), layer = small(cell, Case(3, 2, 2, 3, hx=False))
    loss, w_hh = loss_of(layer), weights[1]

    def penalty(x: Tensor, w: Tensor) -> Tensor:
        value = loss(x, weights[0], w, *weights[2:])
        return torch.autograd.grad(value, w, create_graph=True)[0].square().sum()

    function = grad(penalty, (0, 1))
    if mapped:
        x = torch.stack([x, x + 1])
        function = vmap(function, (0, None))
    found = []
    for name in (backend, "reference"):
        with using(name):
            found.append(function(x, w_hh))
    torch.testing.assert_close(found[0], found[1])


@cells
@backends
def test_pullbacks_outlive_their_transform(cell: str, backend: str) -> None:
    """Called twice, after the transform and inside of another one that has its place."""
    leaves, layer = small(cell)
    found = []
    for name in (backend, "reference"):
        with using(name):
            y, pull = vjp(lambda *leaves: layer(*leaves)[0], *leaves)
            direction = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
            again = grad(lambda d, pull: torch.stack([g.square().sum() for g in pull(d)]).sum())
            found.append([*pull(direction), *pull(direction), again(direction, pull)])
    torch.testing.assert_close(found[0], found[1])


@cells
@backends
@pytest.mark.parametrize("around", ["grad", "vmap of grad", "autograd of vmap"])
def test_an_output_changed_in_place_is_noticed(cell: str, backend: str, around: str) -> None:
    """The kernels' backward pass reads y, plain torch's does not."""
    (x, *weights), layer = small(cell)
    samples = torch.stack([x, x + 1])

    def loss(x: Tensor, w: Tensor, change: bool = True) -> Tensor:
        y = layer(x, weights[0], w, *weights[2:])[0]
        return y.mul_(2).sum() if change else (y * 2).sum()

    def gradient(change: bool) -> Tensor:
        if around == "grad":
            return grad(loss, 1)(x, weights[1], change)
        if around == "vmap of grad":
            return vmap(grad(loss, 1), (0, None, None))(samples, weights[1], change)
        w = weights[1].clone().requires_grad_()
        return torch.autograd.grad(vmap(lambda x: loss(x, w, change))(samples).sum(), w)[0]

    with using(backend):
        if by_name(backend).differentiable:
            torch.testing.assert_close(gradient(True), gradient(False))
            return
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(True)


@cells
@backends
def test_autograd_around_per_sample_gradients(cell: str, backend: str) -> None:
    (x, *weights), layer = small(cell)
    loss = loss_of(layer)
    samples = torch.randn(3, *x.shape, dtype=torch.float64, requires_grad=True)
    given = [w.requires_grad_() for w in weights]
    dims = (0, *(None,) * len(weights))
    found = []
    for name in (backend, "reference"):
        with using(name):
            each = vmap(grad(loss, tuple(range(len(dims)))), dims)(samples, *given)
        penalty = torch.stack([g.square().sum() for g in each]).sum()
        found.append((each, torch.autograd.grad(penalty, (samples, *given))))
    torch.testing.assert_close(found[0], found[1])


@cells
@backends
def test_autograd_around_vmap(cell: str, backend: str) -> None:
    """Gradients and gradients of gradients of tensors that vmap does not know to require any."""
    (x, *weights), layer = small(cell)
    samples = torch.randn(3, *x.shape, dtype=torch.float64, requires_grad=True)
    given = [w.requires_grad_() for w in weights]
    found = []
    for name in (backend, "reference"):
        with using(name):
            outputs = vmap(lambda x: layer(x, *given))(samples)
        loss = torch.stack([(o * o.cos()).sum() for o in outputs]).sum()
        first = torch.autograd.grad(loss, (samples, *given), create_graph=True)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        found.append((first, torch.autograd.grad(penalty, (samples, *given))))
    torch.testing.assert_close(found[0], found[1])


@cells
@backends
def test_no_grad_inside(cell: str, backend: str) -> None:
    """It holds for every grad around, as for plain operations."""
    (x, *weights), layer = small(cell)

    def frozen(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = layer(x, *weights)[0]
        return (y * x.sum()).sum()

    def loss(x: Tensor) -> Tensor:
        return grad(frozen)(x).sum()

    with using(backend):
        found = grad(frozen)(x), grad(loss)(x)
    with using("reference"):
        expected = grad(frozen)(x), grad(loss)(x)
    torch.testing.assert_close(found, expected)


@cells
@backends
def test_some_outputs_unused(cell: str, backend: str) -> None:
    (x, *weights), layer = small(cell, Case(4, 2, 3, 5, hx=False, reverse=(False, True)))
    samples = torch.randn(3, *x.shape, dtype=torch.float64)
    outputs = len(layer(x, *weights))
    for used in itertools.chain([()], ((k,) for k in range(outputs))):

        def loss(x: Tensor, w: Tensor, used: tuple[int, ...] = used) -> Tensor:
            found = layer(x, weights[0], w, *weights[2:])
            return torch.stack([x.sum(), *(found[k].square().sum() for k in used)]).sum()

        with using(backend):
            found = vmap(grad(loss, (0, 1)), (0, None))(samples, weights[1])
        each = [grad(loss, (0, 1))(s, weights[1]) for s in samples]
        torch.testing.assert_close(list(found), [torch.stack(g) for g in zip(*each, strict=True)])


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
    (x, *weights), layer = small(cell)
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
