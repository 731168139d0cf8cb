"""The torch.library operators: their schema, fake kernels, and what tracers make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LAYERS, Case, make_inputs
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.backends import BACKENDS
from fastrnn.cells import CELLS

KERNELS = [b for b in BACKENDS if not b.differentiable]
ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
WITHOUT_VALUES = ALL[:3]
CASES = [
    Case(5, 3, 4, 7),
    Case(5, 3, 4, 20, reverse=(False, True), hx=False),
    Case(1, 1, 4, 7, bias=False),
    Case(4, 3, 4, 7, lengths=(4, 2, 1), reverse=(False, True)),
    Case(4, 3, 4, 7, ends=(2, 0, 3), cuts=0.3, to=True, reverse=(False, True)),
]


def forward_arguments(cell: str, case: Case, backend: str, save: bool) -> tuple[Any, ...]:
    inputs = make_inputs(cell, case, torch.float32)
    x, *rest = (t.detach() for t in (inputs.x, *inputs.states))
    h0, c0 = [*rest, None, None][:2]
    weights = [None if w is None else w.detach() for w in inputs.weights]
    reverse = list(case.reverse)
    at_reset = [*(s.detach() for s in inputs.at_reset), None, None][:2]
    lengths = torch.tensor(case.ends) if case.ends else None
    states = [h0, c0, *at_reset]
    sizes = case.batch_sizes
    return (
        cell, backend, x, sizes, lengths, case.reset, states, weights, reverse, case.B, save, False
    )  # fmt: skip


def backward_arguments(cell: str, case: Case, backend: str) -> tuple[Any, ...]:
    arguments = forward_arguments(cell, case, backend, True)
    *inputs, _, _ = arguments
    _, _, x, *_, states, weights, _, _ = inputs
    y, h_n, c_n, _, *saved = torch.ops.fastrnn.forward(*arguments)
    grads: list[Tensor | None] = [torch.randn_like(y), torch.randn_like(h_n)]
    grads.append(torch.randn_like(c_n) if CELLS[cell].states > 1 else None)
    needs = [t is not None for t in (x, *states, *weights)]
    return *inputs, y, saved, [*grads, None], needs, 1


@pytest.fixture(params=KERNELS, ids=lambda b: b.name)
def backend(request: pytest.FixtureRequest) -> str:
    (explained,) = fastrnn.explain(fastrnn.GRU(2, 3), torch.ones(1, 1, 2))
    if request.param.name in explained.refusals:
        pytest.skip(explained.refusals[request.param.name])
    return str(request.param.name)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell: str, case: Case, backend: str) -> None:
    for save in (True, False):
        arguments = forward_arguments(cell, case, backend, save)
        # What is saved may end in memory that was never written, where rows are short.
        checks = WITHOUT_VALUES if save and case.ends else ALL
        torch.library.opcheck(torch.ops.fastrnn.forward.default, arguments, test_utils=checks)
    arguments = backward_arguments(cell, case, backend)
    torch.library.opcheck(torch.ops.fastrnn.backward.default, arguments)


@pytest.mark.parametrize("case", CASES[1:], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_with_gradients(cell: str, case: Case, backend: str) -> None:
    """As the operator stands in an exported program."""
    arguments = forward_arguments(cell, case, backend, True)
    leaves = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.requires_grad_(t.is_floating_point()), arguments
    )
    checks = WITHOUT_VALUES if case.ends else ALL  # see test_opcheck
    torch.library.opcheck(torch.ops.fastrnn.forward.default, leaves, test_utils=checks)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_fake_kernels_tell_the_truth(cell: str, case: Case, backend: str) -> None:
    for operator, arguments in (
        (torch.ops.fastrnn.forward, forward_arguments(cell, case, backend, True)),
        (torch.ops.fastrnn.backward, backward_arguments(cell, case, backend)),
    ):
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
def test_layer_on_fake_tensors(torch_kind: Any, kind: Any, options: Any) -> None:
    with FakeTensorMode():
        layer = kind(4, 6, 2, bidirectional=True, **options)
        y, _ = layer(torch.randn(5, 3, 4, requires_grad=True))
        y.sum().backward()
    assert y.shape == (5, 3, 12)
    assert all(p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_records_plain_torch(backend: str) -> None:
    layer = fastrnn.GRU(4, 6).eval()
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(5, 3, 4))
        x = torch.randn(5, 3, 4)
        torch.testing.assert_close(traced(x)[0], layer(x)[0])


class PadsAndPacks(nn.Module):
    """A layer over a PackedSequence, or over the padded batch and its lengths."""

    def __init__(self, layer: nn.Module, packs: bool) -> None:
        super().__init__()
        self.layer, self.packs = layer, packs

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if not self.packs:
            return self.layer(x, lengths=lengths)[0]
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(self.layer(packed)[0], total_length=len(x))[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")
@pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
def test_trace_refuses_a_packed_sequence(torch_kind: Any, kind: Any, options: Any) -> None:
    """It would have the batch sizes for constants; what the message advises has not."""
    layer, x = kind(4, 6, 2, bidirectional=True, **options), torch.randn(5, 3, 4)
    given, other = torch.tensor([5, 3, 2]), torch.tensor([1, 5, 4])
    packs, masks = PadsAndPacks(layer, True), PadsAndPacks(layer, False)
    with torch.no_grad():
        expected = packs(x, other)
        with pytest.raises(RuntimeError, match=r"lengths= .* fastrnn.revert\(model\)"):
            torch.jit.trace(packs, (x, given))
        torch.testing.assert_close(torch.jit.trace(masks, (x, given))(x, other), expected)
        fastrnn.revert(packs)
        torch.testing.assert_close(torch.jit.trace(packs, (x, given))(x, other), expected)


def test_profiler_and_modes_see_the_operator(backend: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, x = fastrnn.GRU(4, 6), torch.randn(5, 3, 4)
    with Spy(), torch.no_grad():
        layer(x)
    assert "fastrnn.forward.default" in seen


@pytest.mark.parametrize("above_autograd", [False, True])
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS)
def test_traced_training_step(
    torch_kind: Any, kind: Any, options: Any, cell: bool, above_autograd: bool
) -> None:
    """Its operators compute again, with autograd around them and without. (Above autograd make_fx
    takes an output that is saved, a tanh's too, for a constant: there the input is the same.)"""
    make = getattr(fastrnn, f"{kind.__name__}Cell") if cell else kind
    layer = make(4, 7, **options)
    weights = list(layer.parameters())
    shape = (3, 4) if cell else (5, 3, 4)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        y = layer(x)
        return torch.autograd.grad((y if isinstance(y, Tensor) else y[0]).square().sum(), weights)

    example = torch.randn(shape)
    traced = make_fx(step, pre_dispatch=above_autograd)(example)
    assert any("fastrnn.backward" in str(node.target) for node in traced.graph.nodes)
    x = example if above_autograd else torch.randn(shape)
    with fastrnn.backend("cpu"):  # a step that nobody traces might be torch's, of other bits
        expected = step(x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = traced(x)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.detach(), theirs)
