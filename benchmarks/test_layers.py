"""The same cases under pytest-benchmark, for its own comparisons and history.

The two libraries of a case stand in one group and run one after the other; for a ratio that is
worth citing, with the two taking turns, use `python -m benchmarks.run`.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import LIBRARIES, Setup, flops
from benchmarks.check import verify
from benchmarks.shapes import Case, all_cases

ROUNDS = 5


@pytest.fixture(scope="module")
def setup(request: pytest.FixtureRequest) -> Setup:
    """A case's layers, checked once and used for both libraries."""
    made = Setup(request.param)
    verify(made)
    return made


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("setup", all_cases(), ids=str, indirect=True)
def test_layer(benchmark: BenchmarkFixture, setup: Setup, library: str) -> None:
    case: Case = setup.case
    benchmark.group = str(case)
    benchmark.extra_info["flops"] = flops(case)
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        setup.subject(library), rounds=ROUNDS, warmup_rounds=1
    )
