"""What the tests share: torch.nn's counterparts, one way to run a layer, and the error budget."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn import functional
from fastrnn.backends import BACKENDS
from fastrnn.cells import CELLS, States

Named = dict[str, Tensor]
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
KINKED = {"rnn_relu"}  # cells whose derivative jumps where the new state becomes 0
# Without a GPU these run in an interpreter, or on an emulated device, which takes too long for
# every test: test_triton.py and test_cuda_emulated.py have what they are put through there.
GPU_BACKENDS = ("cuda", "triton")
BACKEND_NAMES = [b.name for b in BACKENDS if b.name not in GPU_BACKENDS]
TORCH_LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}


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


@dataclass(frozen=True)
class Case:
    """One layer call.

    `lengths` makes it packed; `ends` are the lengths of a dense batch, and `cuts` the share of its
    steps that are resets, to given states with `to`. `every` asks for all states, `grouped` gives
    each group an input of its own, `layout` lays x out in memory."""

    T: int
    B: int
    I: int
    H: int
    reverse: tuple[bool, ...] = (False,)
    lengths: tuple[int, ...] = ()
    layout: str = "dense"
    bias: bool = True
    hx: bool = True
    P: int = 0
    ends: tuple[int, ...] = ()
    cuts: float = 0.0
    to: bool = False
    every: bool = False
    grouped: bool = False

    def __str__(self) -> str:
        parts = [f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"]
        parts += [f"P{self.P}"] * bool(self.P) + ["packed"] * bool(self.lengths)
        parts += ["reverse"] * (self.reverse == (True,)) + ["bidir"] * (len(self.reverse) == 2)
        parts += [self.layout] * (self.layout != "dense")
        parts += ["ends"] * bool(self.ends) + [f"cuts{self.cuts}"] * bool(self.cuts)
        parts += ["to"] * self.to + ["every"] * self.every + ["grouped"] * self.grouped
        return "-".join(parts + ["nobias"] * (not self.bias) + ["nohx"] * (not self.hx))

    @property
    def out(self) -> int:
        return self.P or self.H

    @property
    def batch_sizes(self) -> Tensor | None:
        if not self.lengths:
            return None
        return torch.tensor([sum(n > t for n in self.lengths) for t in range(self.T)])

    @property
    def reset(self) -> Tensor | None:
        if not self.cuts:
            return None
        generator = torch.Generator().manual_seed(7)
        return torch.rand(self.T, self.B, generator=generator) < self.cuts

    @property
    def options(self) -> dict[str, Any]:
        """What functional.layer takes by name but for the states at resets."""
        lengths = torch.tensor(self.ends) if self.ends else None
        return {"lengths": lengths, "reset": self.reset, "all_states": self.every}

    @property
    def has_torch_twin(self) -> bool:
        """Whether torch.nn has a layer for it."""
        own = self.ends or self.cuts or self.every or self.grouped
        return not own and self.reverse in ((False,), (False, True))


@dataclass
class Inputs:
    """Leaves of one call and the gradients that its outputs get, all in one dtype."""

    x: Tensor
    states: list[Tensor]
    weights: list[Tensor | None]
    at_reset: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    @property
    def leaves(self) -> Named:
        """By name, in the order in which :func:`as_function` takes them."""
        found = {"x": self.x}
        found |= {f"state{k}": s for k, s in enumerate(self.states)}
        found |= {f"at_reset{k}": s for k, s in enumerate(self.at_reset)}
        found |= {f"weight{k}": w for k, w in enumerate(self.weights) if w is not None}
        return found

    def to(self, dtype: torch.dtype) -> Inputs:
        """Fresh leaves in another dtype; x keeps its memory layout."""

        def leaf(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_()

        weights = [None if w is None else leaf(w) for w in self.weights]
        grads = [g.to(dtype) for g in self.grads]
        states, at_reset = ([leaf(s) for s in kind] for kind in (self.states, self.at_reset))
        return Inputs(leaf(self.x), states, weights, at_reset, grads)


def make_inputs(cell: str, case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random inputs, rounded to `dtype`, with weights of torch.nn's scale."""
    generator = torch.Generator().manual_seed(seed)
    kind, G = CELLS[cell], len(case.reverse)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Tensor:
        values = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return ((values * 2 - 1) / math.sqrt(case.H)).to(dtype).requires_grad_()

    lead = (sum(case.lengths),) if case.lengths else (case.T, case.B)
    rows, bias = kind.gates * case.H, case.bias
    weights: list[Tensor | None] = []
    for _ in range(G):
        weights += [uniform(rows, case.I), uniform(rows, case.out)]
        weights += [uniform(rows) if bias else None, uniform(rows) if bias else None]
        weights += [uniform(case.P, case.H)] if case.P else []
    widths = [case.out, case.H][: kind.states]
    states = [normal(G, case.B, w).requires_grad_() for w in widths] if case.hx else []
    grads = [normal(*lead, G * case.out), *(normal(G, case.B, w) for w in widths)]
    x = lay_out(normal(*lead, case.I * (G if case.grouped else 1)), case.layout).requires_grad_()
    at_reset = [normal(G, case.B, w).requires_grad_() for w in widths] if case.to else []
    grads += [normal(*lead, G * case.H)] if case.every and kind.states > 1 else []
    return Inputs(x, states, weights, at_reset, grads)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values elsewhere in memory (`expanded` keeps only the first row of the batch)."""
    if layout == "dense":
        return x
    if layout == "batch_first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "feature_first":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "padded":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if layout == "every_other":
        double = x.new_full((2 * x.shape[0], *x.shape[1:]), math.nan)
        double[::2] = x
        return double[::2]
    assert layout == "expanded"
    return x[:, :1].expand_as(x)


def collect(outputs: Sequence[Tensor], inputs: Inputs) -> Named:
    """Outputs and the gradients of every leaf, by name; x's only once."""
    torch.autograd.backward(list(outputs), inputs.grads)
    found: Named = dict(zip(("y", "h_n", "c_n", "c"), (o.detach() for o in outputs), strict=False))
    for name, leaf in inputs.leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.dtype == leaf.dtype
        found[f"d{name}"] = leaf.grad
    return found


def as_function(
    cell: str, case: Case, inputs: Inputs
) -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    """The leaves, and the layer as a function of them that returns all its outputs."""
    names = list(inputs.leaves)

    def layer(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, leaves, strict=True))
        states = tuple(given[f"state{k}"] for k in range(len(inputs.states)))
        at_reset = tuple(given[f"at_reset{k}"] for k in range(len(inputs.at_reset)))
        weights = [given.get(f"weight{k}") for k in range(len(inputs.weights))]
        y, ends, c = functional.layer(
            cell,
            given["x"],
            states or None,
            weights,
            case.reverse,
            case.batch_sizes,
            reset_states=at_reset or None,
            **case.options,
        )
        return (y, *ends) if c is None else (y, *ends, c)

    return list(inputs.leaves.values()), layer


def run(cell: str, case: Case, inputs: Inputs, backend: str) -> Named:
    """Forward and backward of one layer on a backend."""
    leaves, layer = as_function(cell, case, inputs)
    with using(backend):
        outputs = layer(*leaves)
    return collect(outputs, inputs)


def run_plain(cell: str, case: Case, inputs: Inputs) -> Named:
    """The same in plain PyTorch: torch.nn's layer where there is one, else our reference."""
    if cell not in TORCH_LAYERS or not case.has_torch_twin:
        return run(cell, case, inputs, "reference")
    options: dict[str, Any] = {"proj_size": case.P} if case.P else {}
    layer = TORCH_LAYERS[cell](
        case.I, case.H, bias=case.bias, bidirectional=len(case.reverse) == 2, **options
    )
    names = layer._flat_weights_names
    given = dict(zip(names, (w for w in inputs.weights if w is not None), strict=True))
    hx: Any = tuple(inputs.states) if len(inputs.states) == 2 else next(iter(inputs.states), None)
    x: Any = inputs.x
    if case.batch_sizes is not None:
        x = nn.utils.rnn.PackedSequence(x, case.batch_sizes)
    y, ends = torch.func.functional_call(layer, given, (x, hx))
    y = y.data if case.lengths else y
    return collect([y, *(ends if isinstance(ends, tuple) else [ends])], inputs)


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


TF32_EPS = 2.0**-10  # as torch.finfo's


def floor(dtype: torch.dtype, terms: int, elements: int, eps: float | None = None) -> float:
    """Relative error, root mean square over the elements of a tensor, that any implementation in
    `dtype` may have, besides what plain PyTorch has.

    A rounding error is up to half an ulp, 1/sqrt(3) of that in the mean square, and independent
    errors add up like a random walk. A result is a sum of up to `terms` products, so there are
    `terms` roundings of the accumulator (float32 or wider), 16 more for an activation (exp, sum,
    quotient), its derivative and the product of up to six of those, and 4 of `dtype`: those of
    three factors that come out of memory (activation, incoming gradient, state) and of the result.
    The mean over n elements scatters by 1/sqrt(2n) of itself, of which three times are allowed. In
    float64 the truth errs as much itself, and so does what plain PyTorch is measured by: 4 times.
    `eps` is that of `dtype`, unless products may round their factors further.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    wide, narrow = torch.finfo(accumulator).eps, eps or torch.finfo(dtype).eps
    ulps = math.sqrt(4) * narrow + math.sqrt(terms + 16) * wide
    truth = 4 if dtype == torch.float64 else 1
    return truth * ulps / 2 / math.sqrt(3) * (1 + 3 / math.sqrt(2 * max(elements, 1)))


def assert_close(found: Tensor, truth: Tensor, terms: int, dtype: torch.dtype) -> None:
    """Equal up to the floor."""
    assert found.shape == truth.shape
    assert rms(found - truth) <= floor(dtype, terms, truth.numel()) * rms(truth)


def assert_within_budget(
    ours: Named, plain: Named, exact: Named, dtype: torch.dtype, terms: int
) -> None:
    """Our error is at most twice that of plain PyTorch plus the floor, for every tensor.

    `exact` is the same in float64. Errors are root mean squares over a tensor, against its root
    mean square: a single element near zero has no relative error worth the name.
    """
    assert plain.keys() == exact.keys()
    _assert_within(
        {k: rms(plain[k].double() - v) for k, v in exact.items()}, ours, exact, dtype, terms
    )


def _assert_within(
    plain: dict[str, float],
    ours: Named,
    exact: Named,
    dtype: torch.dtype,
    terms: int,
    eps: float | None = None,
) -> None:
    assert ours.keys() == exact.keys()
    bad = []
    for name, truth in exact.items():
        assert ours[name].shape == truth.shape, name
        assert ours[name].dtype == dtype, name
        error = rms(ours[name].double() - truth)
        allowed = 2 * plain[name] + floor(dtype, terms, truth.numel(), eps) * rms(truth)
        if not error <= allowed:
            bad.append(
                f"{name}: {error:.3g}, plain PyTorch {plain[name]:.3g}, allowed {allowed:.3g}"
            )
    assert not bad, "; ".join(bad)


class Truth:
    """A layer call in float64, and what plain PyTorch makes of it in `dtype`."""

    def __init__(
        self, cell: str, case: Case, dtype: torch.dtype, backend: str = "reference"
    ) -> None:
        self.cell, self.case, self.dtype = cell, case, dtype
        inputs = make_inputs(cell, case, dtype)
        self.exact = run(cell, case, inputs.to(torch.float64), backend)
        result = run_plain(cell, case, inputs)
        exact = self._on_the_side_of(result)
        self.plain = {name: rms(result[name].double() - exact[name]) for name in exact}

    def check(self, ours: Named, eps: float | None = None) -> None:
        """Assert the budget (see :func:`assert_within_budget` and :func:`floor`)."""
        case = self.case
        longest = case.T * case.B + case.I + case.H  # a weight gradient's sum, or a gate's
        _assert_within(self.plain, ours, self._on_the_side_of(ours), self.dtype, longest, eps)

    def _on_the_side_of(self, result: Named) -> Named:
        """The truth for a result: at a kink, where a rounding error decides between two slopes that
        differ by O(1), either is right, so the exact run takes the slope that the result took."""
        if self.cell not in KINKED or torch.equal(result["y"] > 0, self.exact["y"] > 0):
            return self.exact
        case = self.case
        sizes = [case.B] * case.T if case.batch_sizes is None else case.batch_sizes.tolist()
        active = (result["y"] > 0).reshape(sum(sizes), len(case.reverse), case.H)
        steps: list[Tensor] = []
        for g, backwards in enumerate(case.reverse):
            in_time = list(active[:, g].split(sizes))
            steps += reversed(in_time) if backwards else in_time
        slopes = iter(steps)

        def step(gates_x: Tensor, gates_h: Tensor, states: States) -> States:
            return ((gates_x + gates_h) * next(slopes),)

        inputs = make_inputs(self.cell, case, self.dtype).to(torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(CELLS, self.cell, replace(CELLS[self.cell], step=step))
            return run(self.cell, case, inputs, "reference")


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Let products of float32, torch's own and those of recurrent layers, round their factors to
    TF32 where the hardware can, if that is the precision; else not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


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
    """Run code in a fresh interpreter; fastrnn's environment variables are those given."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTRNN_")}
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
