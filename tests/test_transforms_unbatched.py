"""torch.func over a sequence without a batch dimension, whose vmapped members are the batch: the
same as a batch of one, in any nesting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Case, make_inputs, small_layer, using
from test_transforms import backends, cells
from torch import Tensor
from torch.func import grad, jacrev, vjp, vmap

from fastrnn import functional


def _squared(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, w: grad(function, 1)(x, w).square().sum()


def _kept_pullback(f: Callable[..., Tensor], x: Tensor, w: Tensor) -> Any:
    """Called after its transform, by itself and inside of another one that has its place."""
    value, pull = vjp(f, x, w)
    return pull(value), grad(lambda v: pull(v)[1].square().sum())(value)


# What is done to a loss f of one sequence x [T, I] and a recurrent weight w, given three of each.
NESTINGS: dict[str, Callable[[Callable[..., Tensor], Tensor, Tensor], Any]] = {
    "grad": lambda f, x, w: grad(f, (0, 1))(x[0], w[0]),
    "vmap": lambda f, x, w: vmap(f, (0, None))(x, w[0]),
    "vmap of weights": lambda f, x, w: vmap(f, (None, 0))(x[0], w),
    "vmap of both": lambda f, x, w: vmap(f)(x, w),
    "vmap of grad": lambda f, x, w: vmap(grad(f, (0, 1)), (0, None))(x, w[0]),
    "vmap of grad, last axis": lambda f, x, w: vmap(grad(f, 1), (-1, None))(x.movedim(0, -1), w[0]),
    "vmap of grad of weights": lambda f, x, w: vmap(grad(f, (0, 1)))(x, w),
    "vmaps of grad": lambda f, x, w: vmap(vmap(grad(f, (0, 1)), (0, None)), (None, 0))(x, w),
    "grad of vmap": lambda f, x, w: grad(lambda w: vmap(f, (0, None))(x, w).sum())(w[0]),
    "vmap around another vmap": lambda f, x, w: vmap(
        lambda x: vmap(lambda s: s * f(x, w[0]))(w[:, 0, 0])
    )(x),
    "jacrev": lambda f, x, w: jacrev(lambda w: vmap(f, (0, None))(x, w))(w[0]),
    "jacrev of one": lambda f, x, w: jacrev(f, (0, 1))(x[0], w[0]),
    "grad of grad": lambda f, x, w: grad(_squared(f), 1)(x[0], w[0]),
    "vmap of grad of grad": lambda f, x, w: vmap(grad(_squared(f), 1), (0, None))(x, w[0]),
    "grad of vmap of grad": lambda f, x, w: grad(
        lambda w: vmap(grad(f, 1), (0, None))(x, w).square().sum()
    )(w[0]),
    "kept pullback": lambda f, x, w: _kept_pullback(f, x[0], w[0]),
    "kept pullback of a vmap": lambda f, x, w: _kept_pullback(vmap(f, (0, None)), x, w[0]),
    "pushforward of a pullback": lambda f, x, w: torch.func.jvp(
        vjp(vmap(f, (0, None)), x, w[0])[1], (x[:, 0, 0],), (w[:, 0, 0],)
    ),
}


@cells
@backends
@pytest.mark.parametrize("nesting", NESTINGS)
def test_one_sequence_is_a_batch_of_one(cell: str, backend: str, nesting: str) -> None:
    """Members of a vmap may be the batch; whatever is done to it, the results are the same."""
    case = Case(4, 3, 3, 5, hx=False, reverse=(False, True))
    inputs = make_inputs(cell, case, torch.float64)
    x, *weights = (t.detach() for t in inputs.leaves.values())

    def results(layer: Callable[..., Any]) -> Any:
        def loss(x: Tensor, w: Tensor) -> Tensor:
            y, ends, _ = layer(cell, x, None, [weights[0], w, *weights[2:]], case.reverse)
            return torch.stack([(o * o.cos()).sum() for o in (y, *ends)]).sum()

        return NESTINGS[nesting](loss, x.transpose(0, 1), torch.stack([weights[1]] * 3).cumsum(0))

    def of_a_batch(cell: str, x: Tensor, *rest: Any) -> Any:
        return functional.layer(cell, x.unsqueeze(1), *rest)

    with using(backend):
        found = results(functional.layer)
    with using("reference"):
        torch.testing.assert_close(found, results(of_a_batch))


@cells
@backends
def test_outputs_of_one_sequence_have_no_batch(cell: str, backend: str) -> None:
    (x, *weights), layer = small_layer(cell, Case(4, 1, 3, 5, hx=False, reverse=(False, True)))
    expected = [o.squeeze(1) for o in layer(x, *weights)]
    sequence, nowhere = x.squeeze(1), (None,) * len(weights)

    def through(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        outputs = layer(x, *weights)
        return torch.stack([o.sum() for o in outputs]).sum(), [*outputs]

    with using(backend):
        mapped = vmap(layer, (0, *nowhere))(torch.stack([sequence, -sequence]), *weights)
        _, differentiated = grad(through, has_aux=True)(sequence)
    torch.testing.assert_close([o[0] for o in mapped], expected)
    torch.testing.assert_close(differentiated, expected)
    with pytest.raises(RuntimeError, match="input must have 3 dimensions, got 2"):
        layer(sequence, *weights)
