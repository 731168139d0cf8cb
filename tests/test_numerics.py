"""The kernels where floating point is at its limits: inputs that are infinite or huge, and sums of
many terms."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from helpers import Case, assert_right, make_inputs, rms, run, using
from test_kernels import DTYPES, isa, poisoned, truth
from torch import Tensor

from fastrnn import functional
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


@EVERY_SET
@EVERY_DTYPE
@pytest.mark.parametrize("cell", CELLS)
def test_nan_reaches_every_gradient_of_a_single_step(
    cell: str, dtype: torch.dtype, name: str
) -> None:
    """That of weight_hh too, which a state of zeros is multiplied by."""
    case = Case(1, 2, 4, 5, hx=False)
    inputs = make_inputs(cell, case, dtype)
    with torch.no_grad():
        inputs.x[0, 1, 2] = math.nan
    exact = run(cell, case, inputs.to(torch.float64), "reference")
    with isa(name), poisoned():
        ours = run(cell, case, inputs, "cpu")
    for key, value in exact.items():
        assert torch.equal(ours[key].isnan(), value.isnan()), key


@EVERY_SET
@EVERY_DTYPE
@pytest.mark.parametrize("cell", CELLS)
def test_a_huge_input_moves_no_gradient_through_a_shut_gate(
    cell: str, dtype: torch.dtype, name: str
) -> None:
    """Such as the fill value of NetCDF, 9.97e36, or its like in float64."""
    case = Case(4, 1, 2, 3)
    inputs = make_inputs(cell, case, dtype)
    with torch.no_grad():
        inputs.x[2, 0, 1] = 1e306 if dtype == torch.float64 else 9.96921e36
    with isa(name):
        ours = run(cell, case, inputs, "cpu")
    assert_right(ours, cell, case, inputs)


@EVERY_SET
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_weights_over_many_rows_err_as_blocked_sums(cell: str, name: str) -> None:
    case = Case(40, 500, 16, 16)
    expected = truth(cell, case, torch.float32)
    with isa(name), poisoned():
        ours = run(cell, case, make_inputs(cell, case, torch.float32), "cpu")
    expected.check(ours)


@EVERY_SET
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_gradient_of_a_large_layers_input_errs_no_more_than_twice_torchs(
    cell: str, name: str
) -> None:
    """Each element is a sum over all units and gates."""
    case = Case(2, 8, 16, 1024, hx=False)
    expected = truth(cell, case, torch.float32)
    with isa(name):
        ours = run(cell, case, make_inputs(cell, case, torch.float32), "cpu")
    assert rms(ours["dx"].double() - expected.exact["dx"]) <= 2 * expected.plain["dx"]


def values_of(function: str, x: Tensor) -> Tensor:
    """The cells' own function of each element of `x`, which a unit has as its bias: h' of an RNN is
    tanh(x), and h' of a GRU whose h is 1 and whose n is 0 is z = sigmoid(x)."""
    zero = torch.zeros_like(x)
    cell, gates = ("rnn_tanh", [x]) if function == "tanh" else ("gru", [zero, x, zero])
    weights = [x.new_zeros(len(gates) * len(x), 1), x.new_zeros(len(gates) * len(x), len(x))]
    biases = [torch.cat(gates), x.new_zeros(len(gates) * len(x))]
    with torch.no_grad(), using("cpu"):
        y, _, _ = functional.layer(
            cell, x.new_zeros(1, 1, 1), (x.new_ones(1, 1, len(x)),), weights + biases
        )
    return y.flatten()


@EVERY_SET
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_functions_err_by_few_ulps(function: str, dtype: torch.dtype, name: str) -> None:
    """Wherever the result is a normal number; smaller ones may be zero."""
    info = torch.finfo(dtype)
    edge = -math.log(info.tiny)
    fine, wide = torch.linspace(-1.1 * edge, 1.1 * edge, 20001), torch.linspace(-2, 2, 4001)
    x = torch.cat([fine, wide]).to(dtype)
    with isa(name):
        found = torch.cat([values_of(function, part) for part in x.split(256)])
        ends = values_of(function, torch.tensor([-math.inf, -info.max, info.max, math.inf]).to(x))
        nan = values_of(function, torch.full((3,), math.nan, dtype=dtype))
    ours, exact = (t.numpy().astype(numpy.longdouble) for t in (found, x))
    exact = numpy.tanh(exact) if function == "tanh" else 1 / (1 + numpy.exp(-exact))
    error = abs(ours - exact) / numpy.maximum(abs(exact), info.tiny) / info.eps
    # Half an ulp for each of six roundings: three of e^x, two of sums with it, one of the quotient.
    assert error[abs(exact) > 1.001 * info.tiny].max() <= 3
    assert error.max() * info.eps <= 1
    low = -1.0 if function == "tanh" else 0.0
    assert ends.tolist() == [low, low, 1.0, 1.0]
    assert nan.isnan().all()
