"""What the layers compute and return, against torch.nn's, on every backend."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from helpers import BACKEND_NAMES, LAYERS, check_module, using
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import fastrnn
from fastrnn.backends import by_name

pytestmark = [
    pytest.mark.parametrize("backend", BACKEND_NAMES),
    pytest.mark.parametrize(("torch_kind", "kind", "options"), LAYERS),
]

T, B, I, H = 6, 5, 4, 9


def states(module: nn.RNNBase, batch: int | None = B) -> Any:
    """Random initial states of the kind that the module takes; without a batch axis for None."""
    rows = module.num_layers * (1 + module.bidirectional)
    lead = (rows,) if batch is None else (rows, batch)
    h = torch.randn(*lead, module.proj_size or module.hidden_size)
    return (h, torch.randn(*lead, module.hidden_size)) if module.mode == "LSTM" else h


def data_of(y: Tensor | PackedSequence) -> Tensor:
    return y.data if isinstance(y, PackedSequence) else y


def as_list(hx: Any) -> list[Tensor]:
    return [hx] if isinstance(hx, Tensor) else list(hx)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("given", [True, False])
def test_stacks(
    torch_kind: Any,
    kind: Any,
    options: Any,
    backend: str,
    layers: int,
    bidirectional: bool,
    bias: bool,
    given: bool,
) -> None:
    args = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias, **options}
    theirs, ours = torch_kind(I, H, **args), kind(I, H, **args)
    hx = states(theirs) if given else None
    check_module(theirs, ours, torch.randn(T, B, I), hx, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(
    torch_kind: Any, kind: Any, options: Any, backend: str, dtype: torch.dtype
) -> None:
    if options and dtype != torch.float64:
        pytest.skip("the kink of a ReLU: test_kernels compares it with the right slope")
    theirs, ours = torch_kind(I, H, 2, **options), kind(I, H, 2, **options)
    x, hx = torch.randn(T, B, I), states(theirs)
    check_module(theirs, ours, x, hx, backend=backend, dtype=dtype)
    with using(backend):
        y, end = ours.to(dtype)(x.to(dtype))
    assert {t.dtype for t in (y, *as_list(end))} == {dtype}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_projection(
    torch_kind: Any, kind: Any, options: Any, backend: str, bias: bool, bidirectional: bool
) -> None:
    args = {"num_layers": 2, "proj_size": 3, "bidirectional": bidirectional, "bias": bias}
    if torch_kind is not nn.LSTM:
        for broken in (torch_kind, kind):
            with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
                broken(I, H, **args, **options)
        return
    theirs, ours = torch_kind(I, H, **args), kind(I, H, **args)
    check_module(theirs, ours, torch.randn(T, B, I), states(theirs), backend=backend)
    packed = pack_padded_sequence(torch.randn(T, 3, I), [2, 6, 4], enforce_sorted=False)
    check_module(theirs, ours, packed, states(theirs, 3), backend=backend)


def test_batch_first_concerns_the_sequence_and_not_the_states(
    torch_kind: Any, kind: Any, options: Any, backend: str
) -> None:
    args = {"batch_first": True, "num_layers": 2, **options}
    theirs, ours = torch_kind(I, H, **args), kind(I, H, **args)
    check_module(theirs, ours, torch.randn(B, T, I), states(theirs), backend=backend)
    check_module(theirs, ours, torch.randn(T, I), states(theirs, None), backend=backend)
    packed = pack_padded_sequence(torch.randn(B, T, I), [6, 5, 5, 2, 1], batch_first=True)
    check_module(theirs, ours, packed, states(theirs), backend=backend)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_unbatched(
    torch_kind: Any, kind: Any, options: Any, backend: str, bidirectional: bool, given: bool
) -> None:
    args = {"num_layers": 2, "bidirectional": bidirectional, **options}
    theirs, ours = torch_kind(I, H, **args), kind(I, H, **args)
    hx = states(theirs, None) if given else None
    check_module(theirs, ours, torch.randn(T, I), hx, backend=backend)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [(6, 6, 4, 1), (1, 6, 2, 6), (3,), (2, 2)])
def test_packed(
    torch_kind: Any,
    kind: Any,
    options: Any,
    backend: str,
    lengths: tuple[int, ...],
    bidirectional: bool,
    given: bool,
) -> None:
    args = {"num_layers": 2, "bidirectional": bidirectional, **options}
    theirs, ours = torch_kind(I, H, **args), kind(I, H, **args)
    packed = pack_sequence([torch.randn(n, I) for n in lengths], enforce_sorted=False)
    hx = states(theirs, len(lengths)) if given else None
    check_module(theirs, ours, packed, hx, backend=backend)
    with using(backend):
        y, end = ours(packed, hx)
    assert isinstance(y, PackedSequence)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(y, name), getattr(packed, name))
    padded, found = pad_packed_sequence(y)
    assert tuple(found.tolist()) == lengths
    h_n = as_list(end)[0]
    for row, n in enumerate(lengths):
        torch.testing.assert_close(h_n[-1 - bidirectional, row], padded[n - 1, row, :H])
        if bidirectional:
            torch.testing.assert_close(h_n[-1, row], padded[0, row, H:])


def test_packed_without_indices(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    theirs, ours = torch_kind(I, H, **options), kind(I, H, **options)
    packed = pack_padded_sequence(torch.randn(T, 3, I), [6, 4, 1])
    assert packed.sorted_indices is None
    check_module(theirs, ours, packed, states(theirs, 3), backend=backend)


@pytest.mark.parametrize("shape", [(T, 0, I), (1, 0, I)])
def test_empty_batch(
    torch_kind: Any, kind: Any, options: Any, backend: str, shape: tuple[int, ...]
) -> None:
    ours = kind(I, H, 2, bidirectional=True, **options)
    x = torch.randn(*shape, requires_grad=True)
    with using(backend):
        y, end = ours(x)
    assert y.shape == (shape[0], 0, 2 * H)
    assert all(s.shape == (4, 0, H) for s in as_list(end))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert all((p.grad == 0).all() for p in ours.parameters())


def test_list_and_tuple_of_states(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    theirs, ours = torch_kind(I, H, **options), kind(I, H, **options)
    hx = states(theirs)
    if torch_kind is nn.LSTM:
        hx = list(hx)
    check_module(theirs, ours, torch.randn(T, B, I), hx, backend=backend)


def test_states_that_are_not_contiguous(
    torch_kind: Any, kind: Any, options: Any, backend: str
) -> None:
    ours = kind(I, H, 2, bidirectional=True, dtype=torch.float64, **options)
    x = torch.randn(T, B, I, dtype=torch.float64)
    learned = [s[:, :1].double().requires_grad_() for s in as_list(states(ours))]

    def run(make: Any) -> list[Tensor]:
        hx = [make(s) for s in learned]
        with using(backend):
            y, end = ours(x, tuple(hx) if len(hx) == 2 else hx[0])
        loss = y.square().sum() + sum(s.square().sum() for s in as_list(end))
        return [y, *as_list(end), *torch.autograd.grad(loss, learned)]

    expanded = run(lambda s: s.expand(4, B, H))
    copied = run(lambda s: s.repeat(1, B, 1))
    strided = run(lambda s: s.repeat(1, B, 2)[..., :H].transpose(0, 1).contiguous().transpose(0, 1))
    for a, b, c in zip(expanded, copied, strided, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.movedim(2, 0).contiguous().movedim(0, 2),
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: torch.cat([x, x], -1)[..., :I],
        lambda x: x.flip(0).as_strided(x.shape, x.stride()).flip(0),
    ],
    ids=["batch_first", "feature_first", "every_other", "padded", "flipped"],
)
def test_strides_of_the_input(
    torch_kind: Any, kind: Any, options: Any, backend: str, view: Any
) -> None:
    ours = kind(I, H, 2, dtype=torch.float64, **options)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    with using(backend):
        straight, viewed = ours(x)[0], ours(view(x))[0]
    torch.testing.assert_close(straight, viewed)
    expected, found = (torch.autograd.grad(y.square().sum(), x)[0] for y in (straight, viewed))
    torch.testing.assert_close(expected, found)


def test_negative_view(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    """The imaginary part of a conjugate is a view whose memory holds the opposite sign."""
    ours = kind(I, H, **options)
    x = torch.randn(T, B, I, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    with using(backend):
        with torch.no_grad():
            assert torch.equal(ours(x)[0], ours(x.resolve_neg())[0])
        assert torch.equal(ours(x)[0], ours(x.resolve_neg())[0])


def test_outputs_share_no_memory(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    ours = kind(I, H, **options)
    x, hx = torch.randn(1, B, I), states(ours)
    with using(backend), torch.no_grad():
        y, end = ours(x, hx)
    tensors = [x, *as_list(hx), y, *as_list(end), *ours.parameters()]
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    assert len(storages) == len(tensors)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_draws_torchs_masks(
    torch_kind: Any, kind: Any, options: Any, backend: str, layers: int, packed: bool
) -> None:
    args = {"num_layers": layers, "dropout": 0.4, "bidirectional": True, **options}
    theirs, ours = torch_kind(I, H, **args).double(), kind(I, H, **args).double()
    ours.load_state_dict(theirs.state_dict())
    x: Any = torch.randn(T, B, I, dtype=torch.float64)
    if packed:
        x = pack_padded_sequence(x, [6, 5, 3, 3, 1])
    found = []
    with using(backend):
        for module in (theirs, ours, ours):
            torch.manual_seed(7)
            y, _ = module(x)
            found.append(y.data)
        torch.testing.assert_close(found[0], found[1])
        assert torch.equal(found[1], found[2])
        assert not torch.equal(ours(x)[0].data, found[1])
        torch.testing.assert_close(ours.eval()(x)[0].data, theirs.eval()(x)[0].data)


def test_dropout_of_everything_stays_finite(
    torch_kind: Any, kind: Any, options: Any, backend: str
) -> None:
    ours = kind(I, H, 2, dropout=1.0, **options)
    x = torch.randn(T, B, I, requires_grad=True)
    with using(backend):
        y, _ = ours(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert (x.grad == 0).all()


@pytest.mark.parametrize("packed", [False, True])
def test_autocast(torch_kind: Any, kind: Any, options: Any, backend: str, packed: bool) -> None:
    """Everything of at most 32 bits is computed in autocast's dtype; weight gradients are
    float32."""
    ours = kind(I, H, 2, **options)
    x: Any = torch.randn(T, B, I)
    if packed:
        x = pack_padded_sequence(x, [6, 5, 3, 3, 1])
    hx = states(ours)
    with using(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, end = ours(x, hx)
        lower = kind(I, H, 2, **options).bfloat16()
        lower.load_state_dict(ours.state_dict())
        low = [s.bfloat16() for s in as_list(hx)]
        expected, _ = lower(x.to(torch.bfloat16), tuple(low) if len(low) == 2 else low[0])
    assert {t.dtype for t in (y.data, *as_list(end))} == {torch.bfloat16}
    assert torch.equal(y.data, expected.data)
    data_of(y).float().square().sum().backward()
    data_of(expected).float().square().sum().backward()
    for p, q in zip(ours.parameters(), lower.parameters(), strict=True):
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert torch.equal(p.grad, q.grad.float())


def test_backward_inside_autocast(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    """A double layer is left alone, and its backward pass too."""
    ours = kind(I, H, **options).double()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    with using(backend):
        y, _ = ours(x)
        (expected,) = torch.autograd.grad(y.sum(), x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = ours(x)
            assert y.dtype == torch.float64
            (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(expected, found)
    if by_name(backend).differentiable:
        return  # torch's own formulas run, as autocast has them
    single = kind(I, H, **options)
    z = torch.randn(T, B, I, requires_grad=True)
    with using(backend):
        y, _ = single(z)
        (expected,) = torch.autograd.grad(y.sum(), z, retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (found,) = torch.autograd.grad(y.sum(), z)
    assert torch.equal(expected, found)


def test_same_seed_same_weights(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    args = {"num_layers": 2, "bidirectional": True, **options}
    if torch_kind is nn.LSTM:
        args["proj_size"] = 3
    modules = []
    for k in (torch_kind, kind):
        torch.manual_seed(3)
        modules.append(k(I, H, **args))
    theirs, ours = (list(m.named_parameters()) for m in modules)
    assert [n for n, _ in theirs] == [n for n, _ in ours]
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(theirs, ours, strict=True))
    assert all(p.abs().max() <= H**-0.5 for _, p in ours)
    assert repr(modules[1]) == f"fastrnn.{modules[0]!r}"


def test_constructor_signature(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    """Explicit, in torch's documented order, with its defaults; what is ours is by keyword."""
    parameters = inspect.signature(kind).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    expected = ["input_size", "hidden_size", "num_layers"]
    expected += ["nonlinearity"] * (torch_kind is nn.RNN)
    expected += ["bias", "batch_first", "dropout", "bidirectional", "proj_size", "device", "dtype"]
    assert names == expected
    ours, theirs = kind(I, H), torch_kind(I, H)
    for name in set(names) - {"device", "dtype"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    positional = (I, H, 2, "relu") if torch_kind is nn.RNN else (I, H, 2)
    args = (*positional, False, True, 0.25, True)
    assert repr(kind(*args)) == f"fastrnn.{torch_kind(*args)!r}"
    assert isinstance(kind(I, H, 2, dropout=1).dropout, float)
    layer = kind(I, H, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


def test_dropout_of_one_layer_warns(torch_kind: Any, kind: Any, options: Any, backend: str) -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        kind(I, H, dropout=0.5, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(I, H, 2, dropout=0.5, **options)


def test_training_flag_changes_nothing_but_dropout(
    torch_kind: Any, kind: Any, options: Any, backend: str
) -> None:
    ours = kind(I, H, 2, **options)
    x = torch.randn(T, B, I)
    with using(backend):
        assert torch.equal(ours.train()(x)[0], ours.eval()(x)[0])
        ours(x)[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_explicit_choice_is_kept_or_refused(
    torch_kind: Any, kind: Any, options: Any, backend: str
) -> None:
    ours = kind(I, H, **options)
    with using(backend):
        (explanation,) = fastrnn.explain(ours, torch.randn(T, B, I))
    assert explanation.serves == backend
    assert backend not in explanation.refusals
