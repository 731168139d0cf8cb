"""The kernels where floating point is at its limits."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Case, make_inputs, run
from test_kernels import DTYPES, isa, poisoned

from fastrnn.cells import CELLS

_C = pytest.importorskip("fastrnn._C")

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
EVERY_SET = pytest.mark.parametrize("name", _C.isas())
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Units that leave lanes of the last vector over, in every instruction set.
ODD = [Case(6, 3, 4, 5), Case(5, 3, 4, 37, reverse=(False, True)), Case(5, 3, 4, 11, P=5)]
ODD_PAIRS = [
    pytest.param(cell, case, id=f"{cell}-{case}")
    for cell, kind in CELLS.items()
    for case in ODD
    if kind.states > 1 or not case.P
]


@EVERY_SET
@EVERY_DTYPE
@pytest.mark.parametrize(("cell", "case"), ODD_PAIRS)
def test_an_infinite_input_spreads_no_further_than_in_exact_arithmetic(
    cell: str, case: Case, dtype: torch.dtype, name: str
) -> None:
    inputs = make_inputs(cell, case, dtype)
    with torch.no_grad():
        inputs.x[1, 1, 2] = math.inf
    exact = run(cell, case, inputs.to(torch.float64), "reference")
    with isa(name), poisoned():
        ours = run(cell, case, inputs, "cpu")
    assert exact["y"].isfinite().sum() >= exact["y"].numel() * 2 / 3
    for key, value in exact.items():
        assert torch.equal(ours[key].isfinite(), value.isfinite()), key
