"""The Triton kernels, in Triton's interpreter: every cell and feature in every regime.

On a machine with a GPU there is no interpreter in this process (see conftest.py), and test_gpu.py
runs the same kernels on the device."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import pytest
import torch
from helpers import TF32_EPS, Case, Truth, float32_products, make_inputs, poisoned, run, run_python
from torch import Tensor

import fastrnn
from fastrnn.backends import BACKENDS
from fastrnn.backends.triton import plan
from fastrnn.cells import CELLS

pytest.importorskip("triton", reason="the package triton is not installed")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: test_gpu.py runs the kernels on it"
)
BOTH = (False, True)
REGIMES = [plan.whole, plan.grid, plan.steps]
CASES = [
    Case(1, 1, 1, 1),
    Case(3, 3, 5, 20, reverse=BOTH),
    Case(3, 18, 2, 17, bias=False, hx=False),
    Case(4, 5, 4, 31, reverse=(True,), layout="batch_first"),
    Case(4, 4, 3, 18, lengths=(4, 3, 3, 1), reverse=BOTH, every=True),
    Case(4, 5, 3, 19, ends=(3, 4, 0, 1, 4), cuts=0.3, to=True, every=True, reverse=BOTH),
    Case(4, 3, 3, 21, cuts=0.4, hx=False),
    Case(3, 4, 2, 17, grouped=True, reverse=(False, True, False)),
]
truth = functools.lru_cache(maxsize=4)(Truth)
Regime = plan.Regime


@contextlib.contextmanager
def only(regime: Regime) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "REGIMES", (regime,))
        yield


def name_of(regime: Regime) -> str:
    return regime.__name__


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("regime", REGIMES, ids=name_of)
def test_values_and_gradients(regime: Regime, cell: str, case: Case) -> None:
    expected = truth(cell, case, torch.float32)
    with only(regime), poisoned():
        ours = run(cell, case, make_inputs(cell, case, torch.float32), "triton")
    expected.check(ours)


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        Case(3, 5, 3, 35, reverse=BOTH),
        Case(4, 5, 3, 19, ends=(3, 4, 0, 1, 4), cuts=0.3, to=True, reverse=BOTH),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("regime", REGIMES, ids=name_of)
def test_half_precision(regime: Regime, cell: str, case: Case) -> None:
    expected = truth(cell, case, torch.float16)
    with only(regime), poisoned():
        ours = run(cell, case, make_inputs(cell, case, torch.float16), "triton")
    expected.check(ours)


@interpreted
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("regime", REGIMES, ids=name_of)
def test_an_infinite_state_spreads_no_further_than_in_exact_arithmetic(
    regime: Regime, cell: str
) -> None:
    """Not by way of the units that fill up a tile, either."""
    case = Case(3, 3, 2, 17)
    inputs = make_inputs(cell, case, torch.float32)
    with torch.no_grad():
        inputs.states[0][0, 1, 2] = math.inf
    exact = run(cell, case, inputs.to(torch.float64), "reference")
    with only(regime), poisoned():
        ours = run(cell, case, inputs, "triton")
    for key, value in exact.items():
        assert torch.equal(ours[key].isfinite(), value.isfinite()), key


@interpreted
@pytest.mark.parametrize("regime", REGIMES, ids=name_of)
def test_tf32_takes_the_plan_of_tensor_cores(regime: Regime) -> None:
    case = Case(3, 3, 3, 35)
    expected = truth("lstm", case, torch.float32)
    with only(regime), poisoned(), float32_products("tf32"):
        ours = run("lstm", case, make_inputs("lstm", case, torch.float32), "triton")
    expected.check(ours, TF32_EPS)
    with pytest.raises(AssertionError, match="allowed"):
        expected.check(ours)


@interpreted
@pytest.mark.parametrize("regime", REGIMES, ids=name_of)
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_on_repeat_runs(cell: str, regime: Regime) -> None:
    case = Case(3, 5, 3, 20, reverse=BOTH)
    with only(regime):
        first, second = (
            run(cell, case, make_inputs(cell, case, torch.float32), "triton") for _ in range(2)
        )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@interpreted
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_weight_gradients_of_blocks(cell: str, packed: bool) -> None:
    """A batch of two blocks gives each weight the gradients that the blocks give apart."""
    from fastrnn.backends import Grads, Inputs, by_name
    from fastrnn.ops import describe

    backend = by_name("triton")
    lengths = (4, 4, 2, 1)
    case = Case(4, 4, 3, 5, reverse=BOTH, lengths=lengths if packed else ())
    given = make_inputs(cell, case, torch.float32)
    batch_sizes = case.batch_sizes
    x = given.x.detach()
    states = [*(s.detach() for s in given.states), None][:2]
    weights = [None if w is None else w.detach() for w in given.weights]
    inputs = Inputs(x, batch_sizes, None, None, (*states, None, None), weights)
    problem = describe(cell, inputs, BOTH, case.B, False, True)
    outputs = backend.forward(problem, inputs, True)
    needs = [False] * 5 + [True] * len(weights)

    def gradients(dy: Tensor, samples: int) -> list[Tensor]:
        grads = Grads(dy, None, None, None)
        y, saved = outputs.y, outputs.saved
        found = backend.backward(problem, inputs, y, saved, grads, needs, samples)
        return [d for d in found if d is not None]

    dy = given.grads[0]
    rows = [b for t in range(case.T) for b in range(case.B) if not packed or lengths[b] > t]
    second = torch.tensor(rows).reshape(dy.shape[:-1]) >= 2
    apart = [gradients(dy * mask.unsqueeze(-1), 1) for mask in (~second, second)]
    for both, *each in zip(gradients(dy, 2), *apart, strict=True):
        torch.testing.assert_close(both, torch.stack(each))


@interpreted
def test_parts_that_never_come_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid whose programs are not all there ends, and with NaN rather than a wrong number."""
    from fastrnn.backends.triton import handoff, scan

    monkeypatch.setattr(handoff, "SPINS", 3)
    monkeypatch.setattr(
        scan.Layer, "counters", lambda self: torch.full((1, 1), -99, dtype=torch.int32)
    )
    with only(plan.grid), fastrnn.backend("triton"):
        y, _ = fastrnn.LSTM(2, 20)(torch.randn(2, 1, 2))
    assert y.isnan().all()


@interpreted
def test_saved_shapes_are_those_of_forward() -> None:
    from fastrnn.backends import Inputs, by_name
    from fastrnn.ops import describe

    backend = by_name("triton")
    for cell in CELLS:
        case = Case(2, 3, 2, 5, reverse=BOTH)
        given = make_inputs(cell, case, torch.float32)
        states = (None,) * 4
        inputs = Inputs(given.x.detach(), None, None, None, states, given.weights)
        problem = describe(cell, inputs, BOTH, case.B, False, True)
        with torch.no_grad():
            saved = backend.forward(problem, inputs, True).saved
        assert [(tuple(s.shape), s.dtype) for s in saved] == backend.saved_shapes(problem, 6)


@interpreted
def test_cpu_tensors_only_by_name() -> None:
    layer, x = fastrnn.LSTM(3, 4), torch.randn(2, 2, 3)
    assert fastrnn.explain(layer, x)[0].serves != "triton"
    assert fastrnn.explain(layer.half(), x.half())[0].serves != "triton"
    with fastrnn.backend("triton"):
        assert fastrnn.explain(layer.float(), x)[0].serves == "triton"


def test_cpu_tensors_without_the_interpreter() -> None:
    code = """
import torch, fastrnn
with fastrnn.backend("triton"):
    fastrnn.LSTM(3, 4)(torch.randn(2, 2, 3))
"""
    result = run_python(code, TRITON_INTERPRET="0")
    assert result.returncode != 0
    assert "the kernels run on CUDA and HIP tensors, not on cpu" in result.stderr


def test_import_leaves_triton_alone() -> None:
    code = "import sys, fastrnn; assert 'triton' not in sys.modules"
    assert run_python(code).returncode == 0
    assert "triton" in {b.name for b in BACKENDS}


def test_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, fastrnn
with fastrnn.backend("triton"):
    fastrnn.LSTM(3, 4)(torch.randn(2, 2, 3))
"""
    result = run_python(code, TRITON_INTERPRET="1")
    assert "Triton cannot be imported" in result.stderr


SM90 = plan.Limits("cuda", shared=227 << 10, processors=132)
SM80 = plan.Limits("cuda", shared=163 << 10, processors=108)
GFX942 = plan.Limits("hip", shared=64 << 10, processors=304)


@pytest.mark.parametrize("limits", [SM90, SM80, GFX942], ids=["sm_90", "sm_80", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_every_plan_covers_its_scan(limits: plan.Limits, dtype: torch.dtype, exact: bool) -> None:
    for cell in CELLS.values():
        for G in (1, 2, 64):
            for B in (1, 7, 64, 512, 1024, 5000):
                for H in (1, 16, 17, 64, 128, 130, 300, 512, 1024, 3000):
                    scan = plan.Scan(cell, dtype, exact and dtype == torch.float32, G, B, H)
                    p = plan.plan(scan, limits)
                    assert p.tiles * p.BB >= B > (p.tiles - 1) * p.BB
                    assert p.slices * p.BU >= H > (p.slices - 1) * p.BU
                    assert p.chunks * p.BK >= H
                    assert p.slices == 1 or not p.whole
                    assert not p.resident or G * p.tiles * p.slices <= limits.processors
                    assert p.joined == 1 or p.joined >= cell.gates
                    held = max(cell.gates, p.joined) * p.BU * p.BK * p.chunks
                    # As compiled for sm_90: backward, a whole tile's gates and dh change layout.
                    moved = min(p.chunks, 2) * p.joined * p.BK * p.BB + 1024
                    if p.whole:
                        moved = (cell.gates + 1) * p.BU * p.BB
                    needed = (held + moved) * dtype.itemsize
                    assert not p.held or limits.kind == "hip" or needed <= limits.shared


def test_regimes_by_size() -> None:
    def regime(H: int, B: int = 64) -> str:
        p = plan.plan(plan.Scan(CELLS["lstm"], torch.bfloat16, False, 1, B, H), SM90)
        return "whole" if p.whole else "grid" if p.resident else "steps"

    assert [regime(H) for H in (16, 64, 128)] == ["whole"] * 3
    assert [regime(H) for H in (130, 256, 512)] == ["grid"] * 3
    assert regime(1024, B=4096) == "steps"
    reason = plan.grid(plan.Scan(CELLS["lstm"], torch.bfloat16, False, 1, 4096, 1024), SM90)
    assert isinstance(reason, str)
    assert "132" in reason


def test_no_regime_tells_every_reason() -> None:
    scan = plan.Scan(CELLS["lstm"], torch.bfloat16, False, 1, 4096, 1024)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "REGIMES", (plan.whole, plan.grid))
        with pytest.raises(RuntimeError, match=r"whole: W_hh takes .*; grid: 1 groups of 1024"):
            plan.plan(scan, SM90)
