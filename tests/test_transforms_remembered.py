"""Calls under torch.func that look alike: what is remembered of one is not taken for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import REMEMBERS_CALLS, using
from torch import Tensor
from torch.func import grad, vmap

from fastrnn import functional
from fastrnn.transforms import folds, levels

N = 4  # of everything, so that only what is done to them tells the calls apart
Loss = Callable[..., Tensor]
LENGTHS = torch.tensor([4, 0, 3, 1])


def _outer(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient that autograd finds around the transforms."""
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(run(leaf).square().sum(), leaf)[0]


def _without_gradients(run: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return run()


# What is done to a loss f(x [T, B, I] or [T, I], w [H, H], h, lengths), given x [N, N, N, N] and
# w [N, N, N].
CALLS: dict[str, Callable[[Loss, Tensor, Tensor], Any]] = {
    "x": lambda f, x, w: vmap(f, (0, None))(x, w[0]),
    "x, axis 1": lambda f, x, w: vmap(f, (1, None))(x, w[0]),
    "x, axis 2": lambda f, x, w: vmap(f, (2, None))(x, w[0]),
    "x, axis 3": lambda f, x, w: vmap(f, (3, None))(x, w[0]),
    "w": lambda f, x, w: vmap(f, (None, 0))(x[0], w),
    "w, axis 1": lambda f, x, w: vmap(f, (None, 1))(x[0], w),
    "w, axis 2": lambda f, x, w: vmap(f, (None, 2))(x[0], w),
    "both": lambda f, x, w: vmap(f)(x, w),
    "none": lambda f, x, w: vmap(lambda s: s * f(x[0], w[0]))(x[:, 0, 0, 0]),
    "sequences": lambda f, x, w: vmap(f, (0, None))(x[0], w[0]),
    "sequences, axis 1": lambda f, x, w: vmap(f, (1, None))(x[0], w[0]),
    "fewer": lambda f, x, w: vmap(f, (0, None))(x[:2], w[0]),
    "nobody": lambda f, x, w: vmap(f, (0, None))(x[:0], w[0]),
    "single": lambda f, x, w: vmap(f, (0, None))(x.float(), w[0].float()),
    "h": lambda f, x, w: vmap(f, (0, None, 0))(x, w[0], x[:, :1]),
    "h of all": lambda f, x, w: vmap(f, (0, None, None))(x, w[0], x[0, :1]),
    "lengths": lambda f, x, w: vmap(f, (0, None, None, 0))(x, w[0], None, LENGTHS.repeat(N, 1)),
    "lengths of all": lambda f, x, w: vmap(f, (0, None, None, None))(x, w[0], None, LENGTHS),
    "grad": lambda f, x, w: vmap(grad(f, 1), (0, None))(x, w[0]),
    "grad, axis 1": lambda f, x, w: vmap(grad(f, 1), (1, None))(x, w[0]),
    "grad of x": lambda f, x, w: vmap(grad(f), (0, None))(x, w[0]),
    "grad of both": lambda f, x, w: vmap(grad(f, (0, 1)), (0, None))(x, w[0]),
    "grad, w": lambda f, x, w: vmap(grad(f, 1), (None, 0))(x[0], w),
    "grad of x, w": lambda f, x, w: vmap(grad(f), (None, 0))(x[0], w),
    "grad, sequences": lambda f, x, w: vmap(grad(f, 1), (0, None))(x[0], w[0]),
    "grad, fewer": lambda f, x, w: vmap(grad(f, 1), (0, None))(x[:2], w[0]),
    "grad, nobody": lambda f, x, w: vmap(grad(f, 1), (0, None))(x[:0], w[0]),
    "grad around": lambda f, x, w: grad(lambda w: vmap(f, (0, None))(x, w).sum())(w[0]),
    "vmaps": lambda f, x, w: vmap(vmap(f, (0, None)), (None, 0))(x, w),
    "vmaps, the other way": lambda f, x, w: vmap(vmap(f, (None, 0)), (0, None))(x, w),
    "outside": lambda f, x, w: _outer(x, lambda x: vmap(f, (0, None))(x, w[0])),
    "outside of w": lambda f, x, w: _outer(w, lambda w: vmap(f, (0, None))(x, w[0])),
    "outside of grad": lambda f, x, w: _outer(x, lambda x: vmap(grad(f, 1), (0, None))(x, w[0])),
    "outside, without": lambda f, x, w: _without_gradients(
        lambda: vmap(f, (0, None))(x.clone().requires_grad_(), w[0])
    ),
    "without": lambda f, x, w: _without_gradients(lambda: vmap(f, (0, None))(x, w[0])),
    "grad inside without": lambda f, x, w: _without_gradients(
        lambda: vmap(grad(f, 1), (0, None))(x, w[0])
    ),
    "without inside grad": lambda f, x, w: vmap(
        grad(lambda x, w: _without_gradients(lambda: f(x, w)) + w.sum(), 1), (0, None)
    )(x, w[0]),
}


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_calls_that_look_alike(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    gates = 4 if cell == "lstm" else 1
    x, w, fixed = (
        torch.randn(shape, dtype=torch.float64)
        for shape in ((N, N, N, N), (N, gates * N, N), (gates * N, N))
    )

    def loss(
        x: Tensor, w: Tensor, h: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        states = None if h is None else (h, h)[: 2 if cell == "lstm" else 1]
        weights = [fixed.to(x.dtype), w, None, None]
        y, ends, _ = functional.layer(cell, x, states, weights, lengths=lengths)
        return torch.stack([(o * o.cos()).sum() for o in (y, *ends)]).sum()

    with using("reference"):
        expected = {name: call(loss, x, w) for name, call in CALLS.items() if _fits(name, cell)}
    for names in ([*expected], [*reversed(expected)]):
        monkeypatch.setattr(functional, "_checked", {})
        for name in names * 2:
            found = CALLS[name](loss, x, w)
            torch.testing.assert_close(found, expected[name], msg=_named(name))


def _fits(name: str, cell: str) -> bool:
    """Whether any axis of w may be that of members: an LSTM's are not all of one size."""
    return cell != "lstm" or name not in ("w, axis 1", "w, axis 2")


def _named(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


@pytest.mark.parametrize("name", ["x", "w", "both", "sequences", "outside", "grad", "grad of both"])
def test_how_members_fold_is_found_out_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def members_on(*arguments: Any, **options: Any) -> Any:
        found.append(arguments)
        return run(*arguments, **options)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return functional.layer("gru", x, None, [w, w, None, None])[0].square().sum()

    run = levels.members_on
    monkeypatch.setattr(functional, "_checked", {})
    for module in (levels, folds):
        monkeypatch.setattr(module, "members_on", members_on)
    with using("cpu"):
        for _ in range(3):
            CALLS[name](loss, torch.randn(N, N, N, N), torch.randn(N, 3 * N, N))
    assert len(found) == (1 if REMEMBERS_CALLS else 3)
