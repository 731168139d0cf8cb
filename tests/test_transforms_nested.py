"""torch.func: transforms around transforms, and around what autograd has begun or goes on with."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import (
    BACKEND_NAMES,
    Case,
    loss_of_layer,
    small_layer,
    using,
)
from torch import Tensor
from torch.func import grad, jacrev, vjp, vmap

import fastrnn
from fastrnn.backends import by_name
from fastrnn.cells import CELLS

backends = pytest.mark.parametrize("backend", BACKEND_NAMES)
cells = pytest.mark.parametrize("cell", CELLS)


@cells
@backends
def test_nested(cell: str, backend: str) -> None:
    """Every order of two vmaps and a grad, and the same numbers from each."""
    (x, *weights), layer = small_layer(cell)
    loss = loss_of_layer(layer)
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
    (x, *weights), layer = small_layer(cell, Case(4, 2, 3, 5, hx=False, reverse=(False, True)))
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
    leaves, layer = small_layer(cell)

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
    (x, *weights), layer = small_layer(cell, Case(3, 2, 2, 3, hx=False))
    loss = loss_of_layer(layer)
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
    (x, *weights), layer = small_layer(cell, Case(3, 2, 2, 2, hx=False))
    loss = loss_of_layer(layer)
    found = torch.func.hessian(loss, 2)(x, *weights)
    expected = torch.autograd.functional.hessian(
        lambda w: loss(x, weights[0], w, *weights[2:]), weights[1]
    )
    torch.testing.assert_close(found, expected)


@cells
@backends
def test_forward_mode_of_a_pullback(cell: str, backend: str) -> None:
    """The layer ran on its backend before the forward mode began."""
    leaves, layer = small_layer(cell)
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
    (x, *weights), layer = small_layer(cell, Case(3, 2, 2, 3, hx=False))
    loss, w_hh = loss_of_layer(layer), weights[1]

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
    leaves, layer = small_layer(cell)
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
    (x, *weights), layer = small_layer(cell)
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
    (x, *weights), layer = small_layer(cell)
    loss = loss_of_layer(layer)
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
    (x, *weights), layer = small_layer(cell)
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
    (x, *weights), layer = small_layer(cell)

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
    (x, *weights), layer = small_layer(cell, Case(4, 2, 3, 5, hx=False, reverse=(False, True)))
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
