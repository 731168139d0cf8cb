"""Bad arguments: the exception of torch.nn, or a clearer one where torch.nn's is obscure, never a
crash."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BACKEND_NAMES, LAYERS, STEPS, TORCH
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import functional
from fastrnn.backends import BACKENDS
from fastrnn.cells import CELLS

T, B, I, H = 5, 2, 3, 4
Make = Callable[..., Any]


def outcome(action: Callable[[], Any]) -> BaseException | None:
    try:
        action()
    except Exception as error:
        return error
    return None


# The texts are those of this version of torch and later ones.
TEXTS_OF = (2, 13)


def assert_same_error(theirs: Callable[[], Any], ours: Callable[[], Any]) -> None:
    expected, found = outcome(theirs), outcome(ours)
    assert expected is not None
    if TORCH < TEXTS_OF:
        assert isinstance(found, (RuntimeError, TypeError, ValueError, AttributeError, IndexError))
        return
    assert type(found) is type(expected), (expected, found)
    assert str(found) == str(expected)


CONSTRUCTIONS: list[dict[str, Any]] = [
    {"dropout": -0.1},
    {"dropout": 1.5},
    {"dropout": True},
    {"dropout": "much"},
    {"dropout": None},
    {"dropout": math.nan},
    {"bias": 1},
    {"bias": None},
    {"batch_first": 1},
    {"batch_first": "yes"},
    {"input_size": 0},
    {"input_size": -1},
    {"input_size": 2.0},
    {"hidden_size": 0},
    {"hidden_size": -1},
    {"hidden_size": "4"},
    {"num_layers": 0},
    {"num_layers": -1},
    {"proj_size": 1},
    {"proj_size": -1},
    {"proj_size": 4},
    {"proj_size": 9},
    {"dtype": torch.int64},
    {"dtype": "float"},
    {"device": "nowhere"},
]


@pytest.mark.parametrize("wrong", CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
def test_construction(torch_kind: Any, kind: Any, options: Any, wrong: dict[str, Any]) -> None:
    args = {"input_size": I, "hidden_size": H, **options, **wrong}
    if outcome(lambda: torch_kind(**args)) is None:
        kind(**args)
        return
    assert_same_error(lambda: torch_kind(**args), lambda: kind(**args))


def test_nonlinearity() -> None:
    for name in ("sigmoid", "", None):
        wrong: Any = {"nonlinearity": name}
        assert_same_error(partial(nn.RNN, I, H, **wrong), partial(fastrnn.RNN, I, H, **wrong))
    x = torch.randn(B, I)
    theirs, ours = (k(I, H, nonlinearity="sigmoid") for k in (nn.RNNCell, fastrnn.RNNCell))
    assert_same_error(lambda: theirs(x), lambda: ours(x))


def x_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def hx(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    h = torch.zeros(shape, dtype=dtype)
    return (h, h.clone()) if "LSTM" in kind else h


SAME: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "input 1-D": lambda k: (x_of(I),),
    "input 0-D": lambda k: (torch.tensor(1.0),),
    "input 4-D": lambda k: (x_of(1, T, B, I),),
    "input_size": lambda k: (x_of(T, B, I + 1),),
    "input_size unbatched": lambda k: (x_of(T, I + 1),),
    "double": lambda k: (x_of(T, B, I, dtype=torch.float64),),
    "integers": lambda k: (x_of(T, B, I, dtype=torch.int64),),
    "bool": lambda k: (x_of(T, B, I, dtype=torch.bool),),
    "no steps": lambda k: (x_of(0, B, I),),
    "no steps unbatched": lambda k: (x_of(0, I),),
    "no steps with hx": lambda k: (x_of(0, B, I), hx(k, 1, B, H)),
    "hx batch": lambda k: (x_of(T, B, I), hx(k, 1, B + 1, H)),
    "hx hidden": lambda k: (x_of(T, B, I), hx(k, 1, B, H + 1)),
    "hx layers": lambda k: (x_of(T, B, I), hx(k, 2, B, H)),
    "hx 2-D": lambda k: (x_of(T, B, I), hx(k, B, H)),
    "hx 4-D": lambda k: (x_of(T, B, I), hx(k, 1, 1, B, H)),
    "hx 3-D unbatched": lambda k: (x_of(T, I), hx(k, 1, 1, H)),
    "hx hidden unbatched": lambda k: (x_of(T, I), hx(k, 1, H + 1)),
    "hx on another device": lambda k: (x_of(T, B, I), to_meta(hx(k, 1, B, H))),
    "input on another device": lambda k: (x_of(T, B, I).to("meta"),),
}


def sparse(states: Any) -> Any:
    return tuple(map(sparse, states)) if isinstance(states, tuple) else states.to_sparse()


def to_meta(states: Any) -> Any:
    return tuple(map(to_meta, states)) if isinstance(states, tuple) else states.to("meta")


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
def test_call(torch_kind: Any, kind: Any, options: Any, backend: str, name: str) -> None:
    theirs, ours = torch_kind(I, H, **options), kind(I, H, **options)
    args = SAME[name](theirs.mode)
    with fastrnn.backend(backend):
        assert_same_error(lambda: theirs(*args), lambda: ours(*args))


def packed(*shape: int, dtype: torch.dtype = torch.float32) -> PackedSequence:
    return pack_padded_sequence(torch.zeros(*shape, dtype=dtype), [T, T - 2])


CLEARER: dict[str, tuple[Make, type[Exception], str]] = {
    "hx dtype": (
        lambda k: (x_of(T, B, I), hx(k, 1, B, H, dtype=torch.float64)),
        RuntimeError,
        "Input and hidden tensors are not the same dtype, found input tensor with torch.float32",
    ),
    "packed, input_size": (
        lambda k: (packed(T, B, I + 1),),
        RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 3, got 4",
    ),
    "packed, dtype": (
        lambda k: (packed(T, B, I, dtype=torch.float64),),
        ValueError,
        "RNN input dtype (torch.float64) does not match weight dtype (torch.float32)",
    ),
    "packed, hx batch": (
        lambda k: (packed(T, B, I), hx(k, 1, B + 1, H)),
        RuntimeError,
        "size (1, 2, 4), got [1, 3, 4]",
    ),
    "packed, hx 2-D": (
        lambda k: (packed(T, B, I), hx(k, B, H)),
        RuntimeError,
        "size (1, 2, 4), got [2, 4]",
    ),
    "packed, data 3-D": (
        lambda k: (PackedSequence(x_of(T, B, I), torch.ones(T, dtype=torch.int64)),),
        RuntimeError,
        "input must have 2 dimensions, got 3",
    ),
    "packed, increasing": (
        lambda k: (PackedSequence(x_of(5, I), torch.tensor([1, 2, 2])),),
        RuntimeError,
        "batch_sizes must be positive and must not increase",
    ),
    "packed, zero": (
        lambda k: (PackedSequence(x_of(5, I), torch.tensor([3, 2, 0])),),
        RuntimeError,
        "batch_sizes must be positive and must not increase",
    ),
    "packed, negative": (
        lambda k: (PackedSequence(x_of(5, I), torch.tensor([7, -2])),),
        RuntimeError,
        "batch_sizes must be positive and must not increase",
    ),
    "packed, too many rows": (
        lambda k: (PackedSequence(x_of(5, I), torch.tensor([3, 3])),),
        RuntimeError,
        "batch_sizes sum to 6, but the packed input has 5 rows",
    ),
    "packed, too few rows": (
        lambda k: (PackedSequence(x_of(5, I), torch.tensor([3, 1])),),
        RuntimeError,
        "batch_sizes sum to 4, but the packed input has 5 rows",
    ),
    "packed, int32": (
        lambda k: (PackedSequence(x_of(4, I), torch.tensor([3, 1], dtype=torch.int32)),),
        RuntimeError,
        "batch_sizes should always be a 1-D int64 CPU tensor",
    ),
    "sparse hx": (
        lambda k: (x_of(T, B, I), sparse(hx(k, 1, B, H))),
        RuntimeError,
        "hx must be dense tensors, got torch.sparse_coo",
    ),
    "sparse": (
        lambda k: (x_of(T, B, I).to_sparse(),),
        RuntimeError,
        "input must be a dense tensor, got torch.sparse_coo",
    ),
    "hx batch of 1": (
        lambda k: (x_of(T, B, I), hx(k, 1, 1, H)),
        RuntimeError,
        "size (1, 2, 4), got [1, 1, 4]; to begin every row from one state, "
        "give it as .expand(-1, 2, -1)",
    ),
    "packed, hx batch of 1": (
        lambda k: (packed(T, B, I), hx(k, 1, 1, H)),
        RuntimeError,
        "size (1, 2, 4), got [1, 1, 4]; to begin every row from one state, "
        "give it as .expand(-1, 2, -1)",
    ),
    "list": (lambda k: ([1.0, 2.0],), TypeError, "expects input to be a tensor, got list"),
    "None": (lambda k: (None,), TypeError, "expects input to be a tensor, got NoneType"),
    "number": (lambda k: (3,), TypeError, "expects input to be a tensor, got int"),
}
WRONG_STATES: dict[str, tuple[Any, str]] = {
    "number": (3, "int"),
    "text": ("ab", "str"),
    "numbers": ((1, 2), "tuple"),
    "tuple of one": ((x_of(1, B, H),), "tuple"),
    "empty": ((), "tuple"),
}


@pytest.mark.parametrize("name", CLEARER)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
def test_call_with_a_clearer_error(
    torch_kind: Any, kind: Any, options: Any, backend: str, name: str
) -> None:
    ours = kind(I, H, **options)
    make, error, text = CLEARER[name]
    with fastrnn.backend(backend), pytest.raises(error, match=re.escape(text)):
        ours(*make(ours.mode))


@pytest.mark.parametrize("name", WRONG_STATES)
@pytest.mark.parametrize("input", [x_of(T, B, I), packed(T, B, I)], ids=["dense", "packed"])
@pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
def test_states_of_another_kind(
    torch_kind: Any, kind: Any, options: Any, input: Any, name: str
) -> None:
    """torch.nn tells of attributes and indices that are not there."""
    wrong, given = WRONG_STATES[name]
    text = f"expects hx to be a tensor, got {given}"
    if kind is fastrnn.LSTM:
        text = r"LSTM expects hx to be a tuple \(h_0, c_0\), got "
    with pytest.raises(TypeError, match=text):
        kind(I, H, **options)(input, wrong)


@pytest.mark.parametrize("layers", [1, 2])
def test_lstm_refuses_one_tensor_for_two_states(layers: int) -> None:
    """One of two layers could be taken for a pair."""
    ours = fastrnn.LSTM(I, H, layers)
    for wrong in (x_of(layers, B, H), x_of(2, layers, B, H)):
        with pytest.raises(TypeError, match=r"a tuple \(h_0, c_0\), got one tensor"):
            ours(x_of(T, B, I), wrong)
    theirs, h = nn.LSTM(I, H, layers), x_of(layers, B, H)
    assert_same_error(
        lambda: theirs(x_of(T, B, I), (h,) * 3), lambda: ours(x_of(T, B, I), (h,) * 3)
    )


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("position", "change", "text"),
    [
        (0, lambda w: w[:, :-1], "Expected weight_ih size"),
        (0, lambda w: w[:-1], "Expected weight|do not make a"),
        (0, lambda w: w[0], "Expected weight|do not make a"),
        (0, lambda w: w[:0], "Expected weight_hh size"),
        (0, lambda w: None, "do not make a"),
        (1, lambda w: w[:, :-1], "Expected weight_hh size"),
        (1, lambda w: w.flatten(), "Expected weight_hh size"),
        (1, lambda w: None, "weight_hh is None"),
        (1, lambda w: w.double(), "Input and parameter tensors are not the same dtype"),
        (1, lambda w: w.to("meta"), "Input and parameter tensors are not at the same device"),
        (2, lambda w: w[:-1], "Expected bias_ih size"),
        (3, lambda w: w[:1], "Expected bias_hh size"),
        (3, lambda w: w[None], "Expected bias_hh size"),
        (3, lambda w: w.bfloat16(), "Input and parameter tensors are not the same dtype"),
    ],
)
def test_weights(cell: str, backend: str, position: int, change: Any, text: str) -> None:
    rows = CELLS[cell].gates * H
    weights: list[Any] = [x_of(rows, I), x_of(rows, H), x_of(rows), x_of(rows)]
    # Remembered, it lets no other by.
    functional.layer(cell, x_of(T, B, I), None, weights)
    weights[position] = change(weights[position])
    with fastrnn.backend(backend), pytest.raises(RuntimeError, match=text):
        functional.layer(cell, x_of(T, B, I), None, weights)


@pytest.mark.parametrize("count", [0, 1, 3, 6, 7])
def test_number_of_weights(count: int) -> None:
    with pytest.raises(RuntimeError, match=r"weights for each of 1 groups|do not make a"):
        functional.layer("gru", x_of(T, B, I), None, [x_of(3 * H, I)] * count)


@pytest.mark.parametrize("cell", CELLS)
def test_number_of_states(cell: str) -> None:
    rows, n = CELLS[cell].gates * H, CELLS[cell].states
    weights = [x_of(rows, I), x_of(rows, H), None, None]
    for states in (None, (x_of(1, B, H),) * n):
        functional.layer(cell, x_of(T, B, I), states, weights)
    for count in {0, 1, 2, 3} - {n}:
        with pytest.raises(RuntimeError, match=f"expects {n} hidden states, got {count}"):
            functional.layer(cell, x_of(T, B, I), (x_of(1, B, H),) * count, weights)


def test_weights_of_another_shape_inside_a_module() -> None:
    """torch.nn's LSTM reads beyond such a weight without an error."""
    layer = fastrnn.LSTM(I, H)
    layer(x_of(T, B, I))
    layer.weight_hh_l0 = nn.Parameter(torch.zeros(4 * H, H - 1))
    with pytest.raises(RuntimeError, match=r"Expected weight_hh size \(16, 4\), got \[16, 3\]"):
        layer(x_of(T, B, I))


def test_what_passed_as_a_function_is_looked_at_as_a_module() -> None:
    """Only there may each direction have columns of its own."""
    layer = fastrnn.GRU(I, H, bidirectional=True)
    x, weights = x_of(T, B, 2 * I), layer._weights()[0]
    assert functional.layer("gru", x, None, weights, (False, True))[0].shape == (T, B, 2 * H)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        layer(x)


def test_states_of_another_number_of_layers() -> None:
    theirs, ours = nn.GRU(I, H, 2), fastrnn.GRU(I, H, 2)
    ours(x_of(T, B, I), x_of(2, B, H))
    for layers in (1, 3):
        wrong = x_of(T, B, I), x_of(layers, B, H)
        assert_same_error(lambda w=wrong: theirs(*w), lambda w=wrong: ours(*w))  # type: ignore[misc]


STEP_CALLS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "input 0-D": lambda k: (torch.tensor(1.0),),
    "input 3-D": lambda k: (x_of(1, B, I),),
    "input_size": lambda k: (x_of(B, I + 1),),
    "input_size unbatched": lambda k: (x_of(I + 1),),
    "hx 3-D": lambda k: (x_of(B, I), hx(k, 1, B, H)),
    "hx 0-D": lambda k: (x_of(B, I), hx(k, 1).sum() if "LSTM" not in k else (x_of(1).sum(),) * 2),
    "hx batch": lambda k: (x_of(B, I), hx(k, B + 1, H)),
    "hx hidden": lambda k: (x_of(B, I), hx(k, B, H + 1)),
    "hx hidden unbatched": lambda k: (x_of(I), hx(k, H + 1)),
}


@pytest.mark.parametrize("name", STEP_CALLS)
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_step(torch_kind: Any, kind: Any, options: Any, name: str) -> None:
    theirs, ours = torch_kind(I, H, **options), kind(I, H, **options)
    args = STEP_CALLS[name](kind.__name__)
    assert_same_error(lambda: theirs(*args), lambda: ours(*args))


@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_step_with_a_clearer_error(torch_kind: Any, kind: Any, options: Any) -> None:
    ours = kind(I, H, **options)
    name = kind.__name__
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x_of(B, I, dtype=torch.float64),), "not the same dtype"),
        ((x_of(B, I, dtype=torch.int64),), "not the same dtype"),
        ((x_of(B, I), hx(name, B, H, dtype=torch.float64)), "not the same dtype"),
        ((x_of(B, I).to("meta"),), "not at the same device"),
        ((x_of(B, I), hx(name, 1, H)), r"hidden0 batch size 1; .* give it as .expand\(2, -1\)"),
        ((x_of(I), hx(name, 1, H)), "as many dimensions as the input"),
        ((x_of(B, I), hx(name, H)), "as many dimensions as the input"),
    ]
    for args, text in cases:
        with pytest.raises(RuntimeError, match=text):
            ours(*args)


def test_unbatched_lstm_takes_the_first_two_of_three_states() -> None:
    theirs, ours = nn.LSTM(I, H), fastrnn.LSTM(I, H)
    ours.load_state_dict(theirs.state_dict())
    x, states = x_of(T, I), (torch.ones(1, H), torch.ones(1, H), x_of(9))
    torch.testing.assert_close(ours(x, states), theirs(x, states))


DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]
SHAPES = [
    (),
    (I,),
    (T, I),
    (T, B, I),
    (1, T, B, I),
    (T, B, I + 1),
    (T, I + 1),
    (T, B, 0),
    (0, B, I),
]
STATES = [
    (),
    (H,),
    (B, H),
    (1, H),
    (1, B, H),
    (1, 1, B, H),
    (1, B + 1, H),
    (1, 1, H),
    (1, B, H + 1),
]


def assert_same_types_of_errors(theirs: nn.Module, ours: nn.Module, xs: Any, states: Any) -> None:
    """Of calls with every input, and of calls with the first input and every state."""
    mode = type(theirs).__name__
    calls = [(x_of(*shape, dtype=dtype),) for shape in xs for dtype in DTYPES]
    for shape in states:
        for dtype in DTYPES:
            state = hx(mode, *shape, dtype=dtype)
            calls += [(x, state) for x in (x_of(T, B, I), x_of(T, I), x_of(B, I), x_of(I))]
    for args in calls:
        expected, found = outcome(lambda a=args: theirs(*a)), outcome(lambda a=args: ours(*a))  # type: ignore[misc]
        assert type(found) is type(expected), (args, expected, found)


@pytest.mark.parametrize(("torch_kind", "kind", "options"), [*LAYERS, *STEPS])
def test_types_of_errors(torch_kind: Any, kind: Any, options: Any) -> None:
    theirs, ours = torch_kind(I, H, **options), kind(I, H, **options)
    assert_same_types_of_errors(theirs, ours, SHAPES, STATES)


NON_TENSORS = [[1.0, 2.0], (), 3, 0.5, "ab", np.zeros((B, I)), np.float32(1), {}, object()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "wrong", [None, *NON_TENSORS, packed(T, B, I)], ids=lambda w: type(w).__name__
)
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_input_of_a_cell_that_is_no_tensor(
    torch_kind: Any, kind: Any, options: Any, wrong: Any, dtype: torch.dtype
) -> None:
    ours, state = kind(I, H, **options).to(dtype), hx(kind.__name__, B, H, dtype=dtype)
    text = f"{kind.__name__} expects input to be a tensor, got {type(wrong).__name__}"
    for args in ((wrong,), (wrong, state)):
        with pytest.raises(TypeError, match=text):
            ours(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wrong", NON_TENSORS, ids=lambda w: type(w).__name__)
@pytest.mark.parametrize(("torch_kind", "kind", "options"), STEPS)
def test_state_of_a_cell_that_is_no_tensor(
    torch_kind: Any, kind: Any, options: Any, wrong: Any, dtype: torch.dtype
) -> None:
    ours, x, h = kind(I, H, **options).to(dtype), x_of(B, I, dtype=dtype), x_of(B, H, dtype=dtype)
    calls = {"hx": wrong}
    if kind is fastrnn.LSTMCell:
        calls = {"hx[0]": (wrong, h), "hx[1]": [h, wrong]}
    for name, state in calls.items():
        text = f"{kind.__name__} expects {name} to be a tensor, got {type(wrong).__name__}"
        with pytest.raises(TypeError, match=re.escape(text)):
            ours(x, state)


@pytest.mark.parametrize(
    "wrong", [3, "ab", np.zeros((2, H)), iter(())], ids=lambda w: type(w).__name__
)
def test_states_of_an_lstm_cell_that_are_no_tuple(wrong: Any) -> None:
    with pytest.raises(
        TypeError, match=f"'hx'.* must be tuple of Tensors, not {type(wrong).__name__}"
    ):
        fastrnn.LSTMCell(I, H)(x_of(B, I), wrong)


def test_an_error_that_has_another_cause_is_raised_as_it_is() -> None:
    class Broken(fastrnn.GRUCell):
        def _weights(self) -> list[Any]:
            raise AttributeError("weights are not there")

    with pytest.raises(AttributeError, match="weights are not there"):
        Broken(I, H)(x_of(B, I))


STATES_OF_LSTM_CELL: dict[str, Any] = {
    "one tensor": x_of(2, H),
    "one": (x_of(B, H),),
    "three": (x_of(B, H),) * 3,
    "dict": {},
    "c batch": (x_of(B, H), x_of(B + 1, H)),
    "c hidden": (x_of(B, H), x_of(B, H + 1)),
}


@pytest.mark.parametrize("name", STATES_OF_LSTM_CELL)
def test_states_of_an_lstm_cell(name: str) -> None:
    theirs, ours = nn.LSTMCell(I, H), fastrnn.LSTMCell(I, H)
    states = STATES_OF_LSTM_CELL[name]
    assert_same_error(lambda: theirs(x_of(B, I), states), lambda: ours(x_of(B, I), states))


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS if not b.differentiable])
def test_operators_called_directly_do_not_crash(backend: str) -> None:
    x = x_of(5, I)
    weights = [x_of(4 * H, I), x_of(4 * H, H), None, None]
    for sizes in ([3, 3], [2, 3], [7, -2], [3, 2, 0], []):
        with pytest.raises(RuntimeError):
            torch.ops.fastrnn.forward(
                "lstm",
                backend,
                x,
                torch.tensor(sizes),
                None,
                None,
                [None] * 4,
                weights,
                [False],
                3,
                False,
                False,
            )
