"""What is known of tensors before a kernel reads them where they lie."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from helpers import BACKEND_NAMES, REMEMBERS_CALLS, using
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import BaseTorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import functional
from fastrnn.backends import Inputs
from fastrnn.cells import Cell
from fastrnn.plain import all_plain, signature
from fastrnn.transforms import Peeled, peel

_C = pytest.importorskip("fastrnn._C")


class Subclass(Tensor):
    pass


ANOTHER_KIND: dict[str, Callable[[], Tensor]] = {
    "subclass": lambda: torch.zeros(2, 3).as_subclass(Subclass),
    "negated view": lambda: torch.zeros(2, 3, dtype=torch.complex64).conj().imag,
    "sparse": lambda: torch.zeros(2, 3).to_sparse(),
    "without memory": lambda: torch.zeros(2, 3, device="meta"),
}


@pytest.fixture(params=["by table", "by methods"])
def table(request: pytest.FixtureRequest) -> bool:
    return str(request.param) == "by table"


@pytest.fixture(autouse=True)
def reading(request: pytest.FixtureRequest) -> object:
    """Tensors are read as the test wants them read."""
    before = _C.reads_by_table()
    wanted = request.getfixturevalue("table") if "table" in request.fixturenames else before
    if wanted and not before:
        pytest.skip("this torch publishes no table")
    _C.read_by_table(wanted)
    yield
    _C.read_by_table(before)


def test_signature_tells_tensors_apart() -> None:
    like = torch.zeros(2, 3)
    if signature((like,)) is None:
        pytest.skip("this torch publishes no table")
    others = [
        (like.double(),),
        (like.bfloat16(),),
        (torch.zeros(3, 2),),
        (torch.zeros(6),),
        (torch.zeros(1, 2, 3),),
        (like, None),
        (None, like),
        (like, like),
        (),
    ]
    found = [signature(each) for each in ((like,), *others)]
    assert len(set(found)) == len(found)
    assert None not in found
    assert signature((nn.Parameter(torch.ones(3, 2).t()),)) == found[0]


@pytest.mark.parametrize("name", ANOTHER_KIND)
def test_of_another_kind(name: str) -> None:
    assert signature((torch.zeros(2), ANOTHER_KIND[name]())) is None


@pytest.mark.parametrize("name", ["subclass", "negated view"])
def test_not_plain(name: str, table: bool) -> None:
    assert all_plain((torch.zeros(2), None, nn.Parameter(torch.zeros(1))))
    assert not all_plain((torch.zeros(2), ANOTHER_KIND[name]()))


def test_wrappers_of_transforms_have_no_signature() -> None:
    found = []

    def look(x: Tensor) -> Tensor:
        found.append(signature((x,)))
        return x.sum()

    torch.vmap(look)(torch.zeros(2, 3))
    torch.func.grad(look)(torch.zeros(2, 3))
    assert found == [None, None]


WATCHES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "function mode": BaseTorchFunctionMode,
    "dispatch mode": lambda: FlopCounterMode(display=False),
    "forward mode": forward_ad.dual_level,
    "hooks on what is saved": lambda: saved_tensors_hooks(lambda t: t, lambda t: t),
}


@pytest.mark.parametrize("name", WATCHES)
def test_no_signature_while_watched(name: str) -> None:
    with WATCHES[name]():
        assert signature((torch.zeros(2),)) is None


def test_no_signature_inside_transforms() -> None:
    """Not even of tensors that they have not wrapped."""
    found = []

    def look(x: Tensor) -> Tensor:
        found.append(signature((torch.zeros(2),)))
        return x

    torch.vmap(look)(torch.zeros(2, 3))
    assert found == [None]


def test_checks_run_once_for_what_transforms_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[torch.Size] = []

    def check(cell: Cell, x: Tensor, *others: Any) -> tuple[int, int]:
        checked.append(x.shape)
        return run(cell, x, *others)

    run = functional._check_weights
    monkeypatch.setattr(functional, "_checked", {})
    monkeypatch.setattr(functional, "_check_weights", check)
    layer = fastrnn.GRU(3, 4)
    for _ in range(3):
        torch.vmap(lambda x: layer(x)[0])(torch.randn(6, 5, 2, 3))
    assert checked == [(5, 2, 3)] * (1 if REMEMBERS_CALLS else 3)
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        torch.vmap(layer)(torch.randn(2, 5, 2, 4))
    with pytest.raises(ValueError, match="does not match weight dtype"):
        torch.vmap(layer)(torch.randn(2, 5, 2, 3).double())


def peeled(*tensors: Tensor | None, in_dims: object = 0) -> Peeled | None:
    """Under a vmap, in the places of x, batch_sizes, lengths, reset."""
    found = []

    def look(*tensors: Tensor | None) -> Tensor:
        x = tensors[0]
        assert x is not None
        found.append(peel(Inputs(*(*tensors, None, None, None)[:4], (None,) * 4, [])))  # type: ignore[arg-type]
        return x.sum()

    torch.vmap(look, in_dims)(*tensors)
    return found[0]


def signature_of(*tensors: Tensor | None, in_dims: object = 0) -> object:
    found = peeled(*tensors, in_dims=in_dims)
    assert found is not None
    return found.signature


def test_what_transforms_wrap_is_told_apart() -> None:
    x = torch.zeros(3, 3)
    if not REMEMBERS_CALLS:
        assert peeled(x) is None
        pytest.skip("this torch publishes no table")
    leaf = torch.zeros(3, 3, requires_grad=True)
    assert signature_of(x) == signature_of(torch.ones(3, 3))
    others = [
        signature_of(x),
        signature_of(torch.zeros(5, 3)),
        signature_of(torch.zeros(3, 4)),
        signature_of(x.double()),
        signature_of(leaf),
        signature_of(x, in_dims=1),
        signature_of(x, x),
        signature_of(x, leaf),
        signature_of(x, x, in_dims=(0, None)),
    ]
    assert len(set(others)) == len(others)


def test_what_transforms_wrap_is_not_told_while_watched() -> None:
    for watch in list(WATCHES.values())[:3]:
        with watch():
            assert peeled(torch.zeros(3, 3)) is None
    other = torch.zeros(2).as_subclass(Subclass)
    assert peeled(torch.zeros(3, 3), other, in_dims=(0, None)) is None


def test_what_has_escaped_a_transform_is_not_told() -> None:
    kept = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    torch.func.grad(keep)(torch.zeros(2))
    assert peeled(torch.zeros(3, 3), *kept, in_dims=(0, None)) is None


def negated(tensor: Tensor) -> Tensor:
    """A view whose values are those of `tensor`, and whose memory holds the opposite."""
    return torch._neg_view(-tensor)


@pytest.mark.parametrize("what", ["x", "hx", "weights", "gradients"])
def test_negated_views(what: str, table: bool) -> None:
    layer = fastrnn.LSTM(3, 4)
    inputs = {"x": torch.randn(5, 2, 3), "h": torch.randn(1, 2, 4), "c": torch.randn(1, 2, 4)}
    given = inputs | {k: w.detach() for k, w in layer.named_parameters()}
    dy = torch.randn(5, 2, 4)

    def run(given: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
        leaves = {k: t.requires_grad_() for k, t in given.items()}
        x, h, c, *weights = leaves.values()
        names = dict(zip(dict(layer.named_parameters()), weights, strict=True))
        y, _ = torch.func.functional_call(layer, names, (x, (h, c)))
        return [y, *torch.autograd.grad(y, list(leaves.values()), dy)]

    expected = run({k: t.clone() for k, t in given.items()}, dy)
    kinds = {"x": "x", "h": "hx", "c": "hx"}
    chosen = {k: negated(t) if kinds.get(k, "weights") == what else t for k, t in given.items()}
    found = run(chosen, negated(dy) if what == "gradients" else dy)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_what_a_hook_saved_in_another_way(table: bool) -> None:
    """A backward pass reads no memory of a tensor that is not plain."""
    layer, x = fastrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    layer(x)
    expected = torch.autograd.grad(layer(x)[0].sum(), layer.weight_hh_l0)[0]
    with saved_tensors_hooks(torch.neg, torch._neg_view):
        y, _ = layer(x)
    assert torch.equal(torch.autograd.grad(y.sum(), layer.weight_hh_l0)[0], expected)


def test_what_is_remembered_is_the_backend_that_was_asked_for() -> None:
    layer, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
    for name in ("cpu", "reference", "cpu", None):
        with fastrnn.backend(name):
            y, _ = layer(x)
        assert ("Scan" in type(y.grad_fn).__name__) == (name != "reference")


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_checked", {})
    monkeypatch.setattr(functional, "_MOST_CHECKED", 3)
    layer = fastrnn.RNN(3, 4)
    for steps in range(1, 9):
        layer(torch.zeros(steps, 2, 3))
        assert len(functional._checked) <= 3


def test_a_default_device_is_no_watcher() -> None:
    x = torch.zeros(2, 3)
    expected = signature((x,))
    with torch.device("meta"):
        assert signature((x,)) == expected
        with BaseTorchFunctionMode():
            assert signature((x,)) is None
    with BaseTorchFunctionMode(), torch.device("meta"):
        assert signature((x,)) is None


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], dict[str, Any]]] = {
    "lstm cell": (lambda: fastrnn.LSTMCell(3, 4), lambda: (torch.randn(2, 3),), {}),
    "gru cell": (
        lambda: fastrnn.GRUCell(3, 4),
        lambda: (torch.randn(2, 3), torch.randn(2, 4)),
        {},
    ),
    "unbatched cell": (lambda: fastrnn.RNNCell(3, 4), lambda: (torch.randn(3),), {}),
    "layer": (lambda: fastrnn.LSTM(3, 4, 2), lambda: (torch.randn(5, 2, 3),), {}),
    "two directions": (
        lambda: fastrnn.GRU(3, 4, bidirectional=True, batch_first=True),
        lambda: (torch.randn(2, 5, 3), torch.randn(2, 2, 4)),
        {},
    ),
    "projection": (lambda: fastrnn.LSTM(3, 4, proj_size=2), lambda: (torch.randn(5, 2, 3),), {}),
    "recompute": (lambda: fastrnn.GRU(3, 4, recompute=2), lambda: (torch.randn(5, 2, 3),), {}),
    "lengths": (
        lambda: fastrnn.GRU(3, 4),
        lambda: (torch.randn(5, 2, 3),),
        {"lengths": [5, 2]},
    ),
    "resets": (
        lambda: fastrnn.LSTM(3, 4),
        lambda: (torch.randn(5, 2, 3),),
        {"reset": torch.tensor([[False, True]] * 5)},
    ),
}


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("name", CALLS)
def test_a_default_device_changes_nothing(name: str, backend: str) -> None:
    """Not even one that has no memory: nothing of a call is allocated on it."""
    make, draw, options = CALLS[name]
    layer, args = make(), draw()

    def run() -> list[Tensor]:
        out = layer(*args, **options)
        outputs = tree_leaves(out)
        return [*outputs, *torch.autograd.grad(outputs[0].sum(), list(layer.parameters()))]

    with using(backend):
        expected = run()
        with torch.device("meta"):
            found = run()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device.type == "cpu"
        assert torch.equal(ours, theirs)


def test_a_default_device_reaches_what_computes_a_weight() -> None:
    """It is the user's code, and makes what it makes where the user wants it."""
    made: list[str] = []

    class Scaled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            made.append(torch.zeros(1).device.type)
            return weight * 2

    for layer, x in (
        (fastrnn.GRU(3, 4), torch.zeros(5, 2, 3)),
        (fastrnn.GRUCell(3, 4), torch.zeros(2, 3)),
    ):
        name = next(name for name, _ in layer.named_parameters() if "weight_hh" in name)
        nn.utils.parametrize.register_parametrization(layer, name, Scaled())
        made.clear()
        with torch.device("meta"):
            layer(x)
        assert set(made) == {"meta"}
