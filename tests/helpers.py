"""What the tests share: torch.nn's counterparts, ways to run a layer, and helpers around the error
budget of :mod:`fastrnn.validation`."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn import functional, validation
from fastrnn.backends import BACKENDS
from fastrnn.validation import (
    TF32_EPS,
    Case,
    Inputs,
    Named,
    Truth,
    as_function,
    assert_within_budget,
    collect,
    float32_products,
    floor,
    make_inputs,
    rms,
    run_plain,
)

# Part of it is only handed on to the tests.
__all__ = ["TF32_EPS", "Inputs", "Truth", "as_function", "collect", "float32_products", "run_plain"]

# Torch 2.10 was the first that let its tensors be looked into without Python, and so the first with
# which it costs nothing to see that a call looks like one that has passed the checks.
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
REMEMBERS_CALLS = TORCH >= (2, 10)

Layer = Callable[..., tuple[Tensor, ...]]

LAYERS = [
    pytest.param(nn.LSTM, fastrnn.LSTM, {}, id="lstm"),
    pytest.param(nn.GRU, fastrnn.GRU, {}, id="gru"),
    pytest.param(nn.RNN, fastrnn.RNN, {}, id="rnn_tanh"),
    pytest.param(nn.RNN, fastrnn.RNN, {"nonlinearity": "relu"}, id="rnn_relu"),
]
STEPS = [
    pytest.param(nn.LSTMCell, fastrnn.LSTMCell, {}, id="lstm"),
    pytest.param(nn.GRUCell, fastrnn.GRUCell, {}, id="gru"),
    pytest.param(nn.RNNCell, fastrnn.RNNCell, {}, id="rnn_tanh"),
    pytest.param(nn.RNNCell, fastrnn.RNNCell, {"nonlinearity": "relu"}, id="rnn_relu"),
]
# Without a GPU these run in an interpreter, or on an emulated device, which takes too long for
# every test: test_triton.py and test_cuda_emulated.py have what they are put through there.
GPU_BACKENDS = ("cuda", "triton")
# And test_half.py has those of the one that is for float16 alone.
BACKEND_NAMES = [b.name for b in BACKENDS if b.name not in (*GPU_BACKENDS, "widened")]


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Run on this backend; a problem that it refuses skips the test, with the backend's reason."""
    try:
        with fastrnn.backend(name):
            yield
    except RuntimeError as error:
        if f"fastrnn backend {name!r} was asked for, but refuses" not in str(error):
            raise
        pytest.skip(str(error))


def run(cell: str, case: Case, inputs: Inputs, backend: str) -> Named:
    """Forward and backward of one layer on a backend; what it refuses skips the test."""
    with using(backend):
        return validation.run(cell, case, inputs, backend)


def assert_close(found: Tensor, truth: Tensor, terms: int, dtype: torch.dtype) -> None:
    """Equal up to the floor."""
    assert found.shape == truth.shape
    assert rms(found - truth) <= floor(dtype, terms, truth.numel()) * rms(truth)


def assert_right(ours: Named, cell: str, case: Case, inputs: Inputs) -> None:
    """What a layer made of these inputs is within the budget."""
    dtype = inputs.x.dtype
    exact = run(cell, case, inputs.to(torch.float64), "reference")
    plain = run_plain(cell, case, inputs.to(dtype))
    terms = case.T * case.B + case.I + case.H
    assert_within_budget(ours, plain, exact, dtype, terms)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN: whatever a kernel reads before writing shows."""

    def poison(result: Tensor) -> Tensor:
        if result.is_floating_point():
            return result.fill_(math.nan)
        return result.fill_(255) if result.dtype == torch.uint8 else result

    def wrap(allocate: Any) -> Any:
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", wrap(torch.empty))
        patch.setattr(torch, "empty_like", wrap(torch.empty_like))
        patch.setattr(Tensor, "new_empty", wrap(Tensor.new_empty))
        yield


def outputs_of(result: Any) -> dict[str, Tensor]:
    """The tensors that a layer or cell returned, by name."""
    if isinstance(result, Tensor):
        return {"h": result}
    first, rest = result
    named = {"y": first.data if isinstance(first, PackedSequence) else first}
    if isinstance(rest, Tensor):
        return named | {"h_n": rest}
    return named | {f"end{k}": s for k, s in enumerate(rest)}


def call(module: nn.Module, x: Any, hx: Any, dtype: torch.dtype) -> Named:
    """Outputs and all gradients of a module called in `dtype` with fresh leaves like x and hx."""
    generator = torch.Generator().manual_seed(1)

    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(dtype).requires_grad_()

    data = leaf(x.data if isinstance(x, PackedSequence) else x)
    given = x._replace(data=data) if isinstance(x, PackedSequence) else data
    states = [] if hx is None else [leaf(s) for s in ([hx] if isinstance(hx, Tensor) else hx)]
    again = None if hx is None else states[0] if isinstance(hx, Tensor) else type(hx)(states)
    module = copy.deepcopy(module).to(dtype)
    module.zero_grad()
    named = outputs_of(module(given, again))
    grads = [torch.randn(o.shape, generator=generator).to(o) for o in named.values()]
    torch.autograd.backward(list(named.values()), grads)
    found = {k: v.detach() for k, v in named.items()}
    leaves = {"x": data} | {f"state{k}": s for k, s in enumerate(states)}
    for name, tensor in (leaves | dict(module.named_parameters())).items():
        if tensor.requires_grad:
            assert tensor.grad is not None, name
            found[f"d{name}"] = tensor.grad
    return found


def check_module(
    theirs: nn.Module,
    ours: nn.Module,
    x: Any,
    hx: Any = None,
    *,
    backend: str = "reference",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Outputs and all gradients of our module are within the budget of torch.nn's, which has the
    same weights; `hx` is a tensor, a list, a tuple or None."""
    ours.load_state_dict(theirs.state_dict())
    rounded = copy.deepcopy(theirs).to(dtype)  # the weights that both have in `dtype`
    data = x.data if isinstance(x, PackedSequence) else x
    exact = call(rounded, _rounded(x, dtype), _rounded(hx, dtype), torch.float64)
    plain = call(rounded, x, hx, dtype)
    with using(backend):
        found = call(ours, x, hx, dtype)
    longest = data[..., 0].numel() + sum(max(w.shape) for w in theirs.parameters())
    assert_within_budget(found, plain, exact, dtype, longest)


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.to(dtype))
    if isinstance(value, (list, tuple)):
        return type(value)(_rounded(v, dtype) for v in value)
    return value if value is None else value.to(dtype)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; of fastrnn's environment variables it has those given, and
    the one that keeps records out."""
    inherited = {
        k: v for k, v in os.environ.items() if k == "FASTRNN_CACHE" or not k.startswith("FASTRNN_")
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**inherited, **environment},
    )


def small_layer(cell: str, case: Case | None = None) -> tuple[list[Tensor], Layer]:
    """Detached leaves in double, and the layer as a function of x, w_ih, w_hh and the biases."""
    case = case or Case(4, 2, 3, 5, hx=False)
    inputs = make_inputs(cell, case, torch.float64)
    leaves = [t.detach() for t in inputs.leaves.values()]

    def layer(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        y, ends, _ = functional.layer(cell, x, None, weights, case.reverse)
        return (y, *ends)

    return leaves, layer


def loss_of_layer(layer: Layer) -> Callable[..., Tensor]:
    def loss(*leaves: Tensor) -> Tensor:
        return torch.stack([(o * o.cos()).sum() for o in layer(*leaves)]).sum()

    return loss
