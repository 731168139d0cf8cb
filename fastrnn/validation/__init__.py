"""Whether a backend computes what it should: the criterion of the tests, the benchmarks and
``python -m fastrnn check`` alike."""

from .budget import (
    KINKED,
    TF32_EPS,
    Truth,
    WrongResultError,
    assert_within_budget,
    errors,
    floor,
    on_the_side_of,
    rms,
)
from .cases import (
    OUTPUTS,
    TORCH_LAYERS,
    Case,
    Inputs,
    Named,
    as_function,
    as_problem,
    collect,
    float32_products,
    make_inputs,
    run,
    run_plain,
)

__all__ = [
    "KINKED",
    "OUTPUTS",
    "TF32_EPS",
    "TORCH_LAYERS",
    "Case",
    "Inputs",
    "Named",
    "Truth",
    "WrongResultError",
    "as_function",
    "as_problem",
    "assert_within_budget",
    "collect",
    "errors",
    "float32_products",
    "floor",
    "make_inputs",
    "on_the_side_of",
    "rms",
    "run",
    "run_plain",
]
