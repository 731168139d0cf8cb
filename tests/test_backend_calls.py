"""Backends called directly, for what the layers above them ask for only in special places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import Case, Named, assert_within_budget, make_inputs
from torch import Tensor

from fastrnn.backends import BACKENDS, Grads, Inputs, Problem, by_name
from fastrnn.cells import CELLS

KERNELS = [b.name for b in BACKENDS if not b.differentiable]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
BOTH = (False, True)


class Call(NamedTuple):
    """One call of a backend; `sizes` are those of a packed batch, whose first step may be short."""

    problem: Problem
    inputs: Inputs
    grads: Grads

    @classmethod
    def of(
        cls, cell: str, case: Case, dtype: torch.dtype, sizes: tuple[int, ...] | None = None
    ) -> Call:
        packed = bool(case.lengths) or sizes is not None
        made = make_inputs(cell, case, dtype)
        x, (dy, dh_n, *others) = made.x.detach(), made.grads
        batch_sizes = case.batch_sizes
        if sizes is not None:
            batch_sizes, N = torch.tensor(sizes), sum(sizes)
            x, dy = x.flatten(0, 1)[:N], dy.flatten(0, 1)[:N]
            others[1:] = (d.flatten(0, 1)[:N] for d in others[1:])
        lengths, reset = case.options["lengths"], case.reset
        no: list[Tensor | None] = [None, None]
        pairs = [*made.states, *no][:2] + [*made.at_reset, *no][:2]
        states = [s if s is None else s.detach() for s in pairs]
        weights = [w if w is None else w.detach() for w in made.weights]
        dc_n, dc = [*others, None, None][:2]
        problem = Problem(
            CELLS[cell], dtype, x.device, case.T, case.B, case.I, case.H, case.P, case.reverse,
            case.grouped, packed, lengths is not None, reset is not None,
            case.every and CELLS[cell].states > 1, True,
        )  # fmt: skip
        given = Inputs(x, batch_sizes, lengths, reset, states, weights)
        return cls(problem, given, Grads(dy, dh_n, dc_n, dc))

    def to(self, dtype: torch.dtype) -> Call:
        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        x, sizes, lengths, reset, states, weights = self.inputs
        given = Inputs(
            x.to(dtype), sizes, lengths, reset, [*map(cast, states)], [*map(cast, weights)]
        )
        return Call(self.problem._replace(dtype=dtype), given, Grads(*map(cast, self.grads)))

    def leaves(self) -> list[Tensor | None]:
        return [self.inputs.x, *self.inputs.states, *self.inputs.weights]

    def only(self, sample: int, samples: int) -> Call:
        """Incoming gradients of this block of rows alone."""
        T, B = self.problem.T, self.problem.B
        mine = torch.arange(B) // (B // samples) == sample
        dy, dh_n, dc_n, dc = self.grads
        rows = mine.expand(T, B)
        if self.inputs.batch_sizes is not None:
            rows = torch.cat([mine[:n] for n in self.inputs.batch_sizes.tolist()])

        def mask(d: Tensor | None, where: Tensor) -> Tensor | None:
            return None if d is None else d * where.unsqueeze(-1)

        return self._replace(
            grads=Grads(mask(dy, rows), mask(dh_n, mine), mask(dc_n, mine), mask(dc, rows))
        )


def on_kernels(name: str, call: Call, samples: int = 1) -> Named:
    backend = by_name(name)
    reason = backend.supports(call.problem)
    if reason is not None:
        pytest.skip(reason)
    y, h_n, c_n, c, saved = backend.forward(call.problem, call.inputs, True)
    needs = [t is not None for t in call.leaves()]
    found = backend.backward(call.problem, call.inputs, y, saved, call.grads, needs, samples)
    grads = [d for d in found if d is not None]
    return named(y, h_n, c_n, c) | {f"d{k}": g for k, g in enumerate(grads)}


def in_torch(call: Call, samples: int = 1) -> Named:
    """The reference backend's outputs and gradients; those of weights for each sample apart."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in call.leaves()]
    x, states, weights = leaves[0], leaves[1:5], leaves[5:]
    assert x is not None
    given = call.inputs._replace(x=x, states=states, weights=weights)
    *outputs, _ = by_name("reference").forward(call.problem, given, True)
    wanted = [t for t in leaves if t is not None]

    def gradients(grads: Grads) -> list[Tensor]:
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        return list(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                retain_graph=True,
                materialize_grads=True,
            )
        )

    found = gradients(call.grads)
    if samples > 1:
        apart = [gradients(call.only(s, samples).grads) for s in range(samples)]
        first = len(wanted) - sum(w is not None for w in weights)
        found[first:] = (torch.stack(g) for g in list(zip(*apart, strict=True))[first:])
    return named(*outputs) | {f"d{k}": g for k, g in enumerate(found)}


def named(*outputs: Tensor | None) -> Named:
    names = ("y", "h_n", "c_n", "c")
    return {k: o.detach() for k, o in zip(names, outputs, strict=True) if o is not None}


def check(name: str, call: Call, samples: int = 1) -> None:
    dtype, problem = call.problem.dtype, call.problem
    ours = on_kernels(name, call, samples)
    exact, plain = in_torch(call.to(torch.float64), samples), in_torch(call, samples)
    assert_within_budget(ours, plain, exact, dtype, problem.T * problem.B + problem.I + problem.H)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 1), (7, 7, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hx", [True, False])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", KERNELS)
def test_rows_without_a_step(
    name: str, cell: str, hx: bool, dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    case = Case(len(sizes), 9, 5, 37, reverse=BOTH, hx=hx, every=True)
    torch.set_num_threads(2)
    check(name, Call.of(cell, case, dtype, sizes))


SAMPLES = [
    Case(4, 6, 5, 7),
    Case(3, 6, 5, 37, reverse=BOTH, hx=False),
    Case(4, 6, 5, 20, reverse=(False, True, True), grouped=True, bias=False),
    Case(5, 6, 3, 16, reverse=BOTH, lengths=(5, 4, 4, 2, 1, 1)),
    Case(5, 6, 3, 16, reverse=BOTH, ends=(5, 0, 4, 2, 3, 1), cuts=0.3, to=True),
    Case(5, 6, 3, 16, ends=(0, 0, 4, 2, 3, 1)),
    Case(2, 6, 3, 16, ends=(0,) * 6),
    Case(1, 3, 5, 20, reverse=BOTH),
    Case(300, 3, 5, 20),
    Case(4, 6, 5, 17, P=4, reverse=BOTH),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SAMPLES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", KERNELS)
def test_gradients_of_each_sample_apart(
    name: str, cell: str, case: Case, dtype: torch.dtype
) -> None:
    if case.P and CELLS[cell].states == 1:
        case = replace(case, P=0)
    check(name, Call.of(cell, case, dtype), samples=3)


@pytest.mark.parametrize("threads", [1, 3, 5, 8])
@pytest.mark.parametrize("samples", [2, 3, 6])
@pytest.mark.parametrize("cell", CELLS)
def test_samples_on_any_number_of_threads(cell: str, samples: int, threads: int) -> None:
    torch.set_num_threads(threads)
    check("cpu", Call.of(cell, Case(9, 6, 5, 37, reverse=BOTH), torch.float32), samples)


STACKED = [
    Case(4, 6, 5, 20, reverse=(False, True, True)),
    Case(3, 6, 5, 7, reverse=BOTH, grouped=True, bias=False),
    Case(4, 6, 5, 17, P=4, reverse=BOTH, lengths=(4, 3, 3, 2, 1, 1)),
]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STACKED, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", KERNELS)
def test_weights_of_all_groups_in_one_tensor(
    name: str, cell: str, case: Case, dtype: torch.dtype, samples: int
) -> None:
    """The same bits as with those of each group apart."""
    if case.P and CELLS[cell].states == 1:
        case = replace(case, P=0)
    call = Call.of(cell, case, dtype)
    problem, weights = call.problem, call.inputs.weights
    each, first = problem.per_group, sum(t is not None for t in call.leaves()[:5])

    def stacked(tensors: Sequence[Tensor | None], kinds: int) -> list[Any]:
        by_kind: list[Any] = [tensors[k::kinds] for k in range(kinds)]
        return [None if ws[0] is None else torch.stack(ws) for ws in by_kind]

    expected = on_kernels(name, call, samples)
    ours = Call(
        problem._replace(stacked=True),
        call.inputs._replace(weights=stacked(weights, each)),
        call.grads,
    )
    found = on_kernels(name, ours, samples)
    given = [w for w in weights if w is not None]
    grads = [expected.pop(f"d{first + k}") for k in range(len(given))]
    kinds = len(given) // problem.G
    axis = 0 if samples == 1 else 1
    for k in range(kinds):
        expected[f"d{first + k}"] = torch.stack(grads[k::kinds], axis)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
