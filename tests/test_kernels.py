"""The compiled kernels: every cell, instruction set and dtype on awkward shapes, against
float64."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import pytest
import torch
from helpers import (
    Case,
    Inputs,
    Truth,
    as_function,
    assert_close,
    collect,
    make_inputs,
    run,
    run_python,
    using,
)
from helpers import poisoned as poisoned_memory

import fastrnn
from fastrnn import functional
from fastrnn.backends import cpu
from fastrnn.cells import CELLS

_C = pytest.importorskip("fastrnn._C")

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
BOTH = (False, True)
CASES = [
    Case(1, 1, 1, 1),
    Case(1, 1, 17, 33),
    Case(2, 1, 1, 70),
    Case(7, 3, 5, 13),
    Case(9, 1, 40, 31, hx=False),
    Case(4, 7, 16, 16, bias=False),
    Case(5, 37, 19, 48, hx=False),
    Case(3, 2, 70, 129),
    Case(3, 65, 33, 40),
    Case(1025, 2, 3, 5),
    Case(40, 33, 130, 270),
    Case(5, 50, 20, 250),
    Case(18, 12, 40, 256),
    Case(9, 23, 320, 331, hx=False),
    Case(8, 32, 320, 320),
    Case(3, 300, 600, 70, reverse=BOTH),
    Case(6, 50, 320, 330, P=300, lengths=(6,) * 30 + (4,) * 20, reverse=BOTH),
    Case(90, 24, 40, 100, lengths=(90,) * 3 + tuple(range(63, 0, -3)), reverse=BOTH),
    Case(200, 24, 9, 64, lengths=tuple(range(200, 8, -8))),
    Case(6, 5, 9, 11, reverse=(True,)),
    Case(6, 5, 9, 21, reverse=BOTH),
    Case(6, 13, 9, 16, reverse=BOTH, hx=False),
    Case(9, 6, 7, 19, lengths=(9, 8, 8, 3, 1, 1)),
    Case(5, 3, 7, 18, lengths=(5, 5, 2), hx=False),
    Case(8, 7, 10, 17, lengths=(8, 8, 6, 5, 2, 2, 1), reverse=BOTH),
    Case(4, 20, 3, 16, lengths=(4,) * 9 + (3,) * 6 + (1,) * 5, reverse=BOTH, bias=False),
    Case(7, 3, 5, 13, P=6),
    Case(4, 9, 6, 37, P=16, reverse=BOTH, bias=False),
    Case(8, 4, 6, 17, P=1, lengths=(8, 5, 5, 2), reverse=BOTH, hx=False),
    Case(6, 4, 10, 15, layout="batch_first"),
    Case(6, 4, 10, 15, layout="feature_first"),
    Case(6, 4, 10, 15, layout="padded"),
    Case(6, 4, 10, 15, layout="every_other"),
    Case(6, 4, 10, 15, layout="expanded"),
    Case(9, 6, 7, 19, ends=(3, 9, 0, 1, 9, 4), reverse=BOTH, layout="batch_first"),
    Case(40, 5, 7, 21, cuts=0.1, to=True, reverse=BOTH),
    Case(9, 4, 7, 18, ends=(3, 0, 9, 1), cuts=0.3, hx=False, layout="feature_first"),
    Case(9, 6, 7, 19, ends=(3, 9, 0, 1, 9, 4), cuts=0.2, to=True, every=True, reverse=BOTH),
    Case(6, 4, 10, 15, every=True),
    Case(8, 4, 6, 17, every=True, lengths=(8, 5, 5, 2), reverse=BOTH, hx=False),
    Case(5, 4, 6, 17, grouped=True, reverse=(False, True, False)),
    Case(5, 4, 6, 17, P=5, ends=(5, 0, 2, 3), cuts=0.2, every=True, reverse=BOTH),
]
PAIRS = [
    pytest.param(cell, case, id=f"{cell}-{case}")
    for cell, kind in CELLS.items()
    for case in CASES
    if kind.states > 1 or not case.P
]


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    before = _C.isa()
    _C.use_isa(name)
    try:
        yield
    finally:
        _C.use_isa(before)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """As :func:`helpers.poisoned`, the kernels' own workspace included."""
    with poisoned_memory(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_workspace", cpu._Workspace(keep=0))
        yield


truth = functools.lru_cache(maxsize=2)(Truth)


@pytest.mark.parametrize("name", _C.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cell", "case"), PAIRS)
def test_values_and_gradients(cell: str, case: Case, dtype: torch.dtype, name: str) -> None:
    expected = truth(cell, case, dtype)
    inputs = make_inputs(cell, case, dtype)
    with isa(name), poisoned():
        ours = run(cell, case, inputs, "cpu")
    expected.check(ours)


@pytest.mark.parametrize("name", _C.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cell", "case"), PAIRS)
def test_inference_gives_the_same_bits(
    cell: str, case: Case, dtype: torch.dtype, name: str
) -> None:
    """Where nothing is saved, all that is computed goes through other memory."""
    leaves, layer = as_function(cell, case, make_inputs(cell, case, dtype))
    with isa(name), poisoned(), using("cpu"):
        expected = layer(*leaves)
        with torch.inference_mode():
            found = layer(*leaves)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", _C.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 5, 37, hx=False),
        Case(3, 40, 5, 37, hx=False, bias=False, reverse=BOTH),
        Case(9, 32, 5, 130, hx=False),
        Case(4, 3, 2, 18, hx=False, lengths=(4, 2, 1), reverse=BOTH),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_no_states_are_zeros(cell: str, case: Case, dtype: torch.dtype, name: str) -> None:
    """To the bit, though the first step's product is left out."""
    inputs = make_inputs(cell, case, dtype)
    weights = list(inputs.weights)
    zeros = (torch.zeros(len(case.reverse), case.B, case.H, dtype=dtype),) * CELLS[cell].states
    with isa(name), fastrnn.backend("cpu"):
        found, expected = (
            functional.layer(cell, inputs.x, states, weights, case.reverse, case.batch_sizes)
            for states in (None, zeros)
        )
    assert torch.equal(found[0], expected[0])
    assert all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize("later", _C.isas())
@pytest.mark.parametrize("first", _C.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_what_one_instruction_set_saves_another_reads(
    cell: str, dtype: torch.dtype, first: str, later: str
) -> None:
    case = Case(5, 3, 7, 37, reverse=BOTH)
    expected = truth(cell, case, dtype)
    inputs = make_inputs(cell, case, dtype)
    leaves, layer = as_function(cell, case, inputs)
    with poisoned():
        with isa(first), using("cpu"):
            outputs = layer(*leaves)
        with isa(later):
            ours = collect(outputs, inputs)
    expected.check(ours)


@pytest.mark.parametrize("name", _C.isas())
@pytest.mark.parametrize(
    "case",
    [
        Case(3, 2, 3, 4),
        Case(2, 1, 2, 17, hx=False, bias=False),
        Case(4, 3, 2, 3, lengths=(4, 2, 1), reverse=BOTH),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_in_double(cell: str, case: Case, name: str) -> None:
    leaves, layer = as_function(cell, case, make_inputs(cell, case, torch.float64))
    with isa(name):
        assert torch.autograd.gradcheck(layer, leaves, fast_mode=False)


@pytest.mark.parametrize("name", _C.isas())
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_finite_stays_in_its_row(cell: str, name: str) -> None:
    """And does there what it does in plain arithmetic, by whatever parts products are summed up."""
    case = Case(8, 32, 320, 320)
    inputs = make_inputs(cell, case, torch.float32)
    with torch.no_grad():
        inputs.x[2, 3, 5] = math.inf
        inputs.x[4, 1, 0] = -math.inf
        inputs.x[5, 7, 3] = math.nan

    def outputs(given: Inputs, backend: str) -> tuple[torch.Tensor, ...]:
        leaves, layer = as_function(cell, case, given)
        with torch.no_grad(), using(backend):
            return layer(*leaves)

    with isa(name), poisoned():
        ours = outputs(inputs, "cpu")
    for found, exact in zip(ours, outputs(inputs.to(torch.float64), "reference"), strict=True):
        finite = exact.isfinite()
        assert 0 < finite.sum() < finite.numel()
        assert torch.equal(found[~finite].double().nan_to_num(1), exact[~finite].nan_to_num(1))
        assert_close(found[finite], exact[finite], case.I + case.H, torch.float32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [Case(20, 3, 17, 37, reverse=BOTH), Case(8, 32, 320, 320), Case(9, 1, 40, 96)],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_on_repeat_runs(cell: str, case: Case, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    first, *others = (run(cell, case, make_inputs(cell, case, dtype), "cpu") for _ in range(4))
    for other in others:
        for key, value in first.items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "case",
    [
        Case(6, 1, 5, 37),
        Case(6, 2, 5, 100),
        Case(6, 25, 5, 37),
        Case(6, 3, 5, 37, reverse=BOTH),
        Case(4, 64, 320, 320),
        Case(9, 7, 5, 37, lengths=(9, 9, 8, 5, 4, 2, 1), reverse=BOTH),
        Case(30, 24, 5, 64, lengths=tuple(range(30, 6, -1))),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_any_number_of_threads(cell: str, case: Case, threads: int) -> None:
    expected = truth(cell, case, torch.float32)
    torch.set_num_threads(threads)
    with poisoned():
        ours = run(cell, case, make_inputs(cell, case, torch.float32), "cpu")
    expected.check(ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_tensors_read_by_their_methods(cell: str, dtype: torch.dtype) -> None:
    """As where torch publishes no table of functions to read them by."""
    case = Case(6, 3, 5, 37, reverse=BOTH, layout="batch_first")
    expected = truth(cell, case, dtype)
    before = _C.reads_by_table()
    _C.read_by_table(False)
    try:
        ours = run(cell, case, make_inputs(cell, case, dtype), "cpu")
    finally:
        _C.read_by_table(before)
    expected.check(ours)


@pytest.mark.skipif(not _C.reads_by_table(), reason="this torch publishes no table")
def test_a_view_reads_the_same_either_way() -> None:
    layer = fastrnn.LSTM(4, 5)
    x = torch.randn(3, 2, 6, 9)[:, 1, :, 2:6].transpose(0, 1)
    found = layer(x)[0]
    _C.read_by_table(False)
    try:
        again = layer(x)[0]
    finally:
        _C.read_by_table(True)
    assert torch.equal(found, again)
    assert torch.equal(found, layer(x.contiguous())[0])


def test_forced_instruction_set() -> None:
    code = "from fastrnn import _C; print(_C.isa())"
    for name in _C.isas():
        assert run_python(code, FASTRNN_ISA=name).stdout.strip() == name
    assert run_python(code).stdout.strip() == _C.isas()[0]
    wrong = run_python(code, FASTRNN_ISA="nope")
    assert wrong.returncode != 0
    assert "nope" in wrong.stderr
    with pytest.raises((ValueError, RuntimeError), match="nope"):
        _C.use_isa("nope")
