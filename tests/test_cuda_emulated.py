"""The CUDA kernels and their backend without a GPU: the very kernels, compiled for the host, on an
emulated device (tests/emulation) that runs a grid's threads in a random order. It shows wrong
indices, missing barriers and deadlocks; not the memory model, and no speed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emulation.build import load
from helpers import Case, Truth, assert_right, make_inputs, run, using
from test_kernels import poisoned
from torch import Tensor

import fastrnn
from fastrnn import backends, functional
from fastrnn.backends import Inputs, Problem
from fastrnn.backends.cuda import Cuda, _Rows
from fastrnn.cells import CELLS
from fastrnn.ops import describe

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOTH = (False, True)
UNEVEN = (9, 6, 6, 3, 1, 1)
CASES = [
    Case(1, 1, 1, 1),
    Case(7, 3, 5, 33, bias=False),
    Case(3, 2, 70, 129, hx=False),
    Case(3, 65, 33, 40),
    Case(6, 5, 9, 21, reverse=BOTH),
    Case(6, 5, 9, 11, reverse=(True,), layout="batch_first"),
    Case(6, 4, 10, 15, layout="feature_first"),
    Case(9, 6, 7, 19, lengths=(9, 8, 8, 3, 1, 1)),
    Case(8, 4, 6, 17, every=True, lengths=(8, 5, 5, 2), reverse=BOTH, hx=False),
    Case(9, 6, 7, 19, ends=(3, 9, 0, 1, 9, 4), reverse=BOTH, layout="batch_first"),
    Case(40, 5, 7, 21, cuts=0.1, to=True, reverse=BOTH),
    Case(9, 4, 7, 18, ends=(3, 0, 9, 1), cuts=0.3, hx=False),
    Case(9, 6, 7, 19, ends=(3, 9, 0, 1, 9, 4), cuts=0.2, to=True, every=True, reverse=BOTH),
    Case(6, 4, 10, 15, every=True),
    Case(5, 4, 6, 17, grouped=True, reverse=(False, True, False)),
]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device small enough to force a plan's ways out."""

    multiprocessors: int
    shared_bytes: int
    capability: int = 90
    cluster: int = 0  # the most blocks of one


HOPPER = {"grid": Chip(12, 232448), "cluster": Chip(12, 232448, cluster=8)}
# name: chip and case; what the plan must then look like is asserted below.
TIGHT = {
    "several passes a block": (Chip(3, 232448), Case(5, 150, 3, 40, reverse=(True,), cuts=0.3)),
    "several unit tiles a block": (Chip(2, 232448), Case(4, 5, 3, 100)),
    "all unit tiles in one block": (Chip(1, 232448), Case(4, 9, 3, 128, ends=(4, 0) + (2,) * 7)),
    "weights streamed": (Chip(20, 24000), Case(4, 5, 3, 150, reverse=BOTH)),
    "a launch a group": (Chip(1, 232448), Case(4, 3, 3, 40, reverse=(False, True, False))),
    "several passes a cluster": (
        Chip(4, 232448, cluster=2),
        Case(5, 70, 3, 40, reverse=BOTH, ends=tuple(k % 6 for k in range(70))),
    ),
    "a cluster of one": (Chip(4, 232448, cluster=1), Case(4, 20, 3, 33, reverse=BOTH)),
}


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Built once for all, in a folder that keeps it."""
    return load(Path(__file__).parents[1] / "build/emulation")


@pytest.fixture(params=HOPPER)
def emulated(request: pytest.FixtureRequest, module: ModuleType) -> Iterator[Cuda]:
    yield from _installed(module, HOPPER[request.param])


def limits_of(module: ModuleType, chip: Chip) -> Any:
    return module.Limits(chip.capability, chip.multiprocessors, chip.shared_bytes, chip.cluster)


def _installed(module: ModuleType, chip: Chip) -> Iterator[Cuda]:
    class Emulated(Cuda):
        name = "emulated"
        on_request = None

        def _find_limits(self, device: int) -> object:
            return limits_of(module, chip)

    backend = Emulated(module, device="cpu")
    backend.poll_limit = 1 << 18  # a broken hand-off shall end a test, not hold it up
    backends.BACKENDS.append(backend)
    functional._checked.clear()  # which may know another of that name
    yield backend
    backends.BACKENDS.remove(backend)


truth = functools.lru_cache(maxsize=4)(Truth)


@pytest.fixture(autouse=True)
def true_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients(cell: str, case: Case, dtype: torch.dtype, emulated: Cuda) -> None:
    inputs = make_inputs(cell, case, dtype)
    with poisoned():
        ours = run(cell, case, inputs, "emulated")
    truth(cell, case, dtype).check(ours)


@pytest.mark.parametrize("cell", CELLS)
def test_a_huge_input_moves_no_gradient_through_a_shut_gate(cell: str, emulated: Cuda) -> None:
    case = Case(4, 1, 2, 3)
    inputs = make_inputs(cell, case, torch.float32)
    with torch.no_grad():
        inputs.x[2, 0, 1] = 9.96921e36
    ours = run(cell, case, inputs, "emulated")
    assert_right(ours, cell, case, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TIGHT)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_way_to_lay_out_the_work(
    cell: str, kind: str, dtype: torch.dtype, module: ModuleType
) -> None:
    chip, case = TIGHT[kind]
    inputs = make_inputs(cell, case, dtype)
    for _ in _installed(module, chip):
        for plan in plans_of(module, chip, cell, case, dtype):
            passes = -(-case.B // plan.rows_a_pass)
            assert {
                "several passes a block": passes > plan.replicas,
                "several unit tiles a block": plan.unit_tiles > 1 and plan.slices > 1,
                "all unit tiles in one block": plan.unit_tiles == 8 and plan.slices == 1,
                "weights streamed": plan.streamed,
                "a launch a group": plan.groups == 1,
                "several passes a cluster": passes > plan.replicas,
                "a cluster of one": plan.slices == 1,
            }[kind]
            assert plan.tier == ("cluster" if chip.cluster else "grid")
        with poisoned():
            ours = run(cell, case, inputs, "emulated")
    truth(cell, case, dtype).check(ours)


def plans_of(
    module: ModuleType, chip: Chip, cell: str, case: Case, dtype: torch.dtype
) -> list[Any]:
    """Of the forward and of the backward pass."""
    precision = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}[dtype]
    request = module.cells()[cell][0], precision, case.T, case.B, case.H, len(case.reverse)
    return [module.plan(*request, back, limits_of(module, chip)) for back in (False, True)]


def test_more_clusters_than_run_at_once(module: ModuleType) -> None:
    """As many as it takes for each to have room for its operands."""
    chip, case = Chip(4, 232448, cluster=2), Case(2, 150, 3, 40, reverse=BOTH)
    _, plan = plans_of(module, chip, "lstm", case, torch.float32)
    assert (plan.tier, plan.blocks > chip.multiprocessors) == ("cluster", True)
    inputs = make_inputs("lstm", case, torch.float32)
    for _ in _installed(module, chip):
        with poisoned():
            ours = run("lstm", case, inputs, "emulated")
    truth("lstm", case, torch.float32).check(ours)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_same_bits_in_any_order_of_threads(
    seed: int, emulated: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(9, 20, 5, 70, reverse=BOTH, cuts=0.2)
    first = run("lstm", case, make_inputs("lstm", case, torch.bfloat16), "emulated")
    monkeypatch.setenv("FASTRNN_EMULATION_SEED", str(seed))
    again = run("lstm", case, make_inputs("lstm", case, torch.bfloat16), "emulated")
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


def test_tf32_rounds_the_products_and_nothing_else(emulated: Cuda) -> None:
    """TF32 has 10 bits of mantissa: coarser than float32, finer than bfloat16."""
    case = Case(5, 9, 7, 40, reverse=BOTH)
    exact = run("lstm", case, make_inputs("lstm", case, torch.float32).to(torch.float64), "cpu")
    errors = []
    for allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        found = run("lstm", case, make_inputs("lstm", case, torch.float32), "emulated")
        assert found["y"].dtype == torch.float32
        errors.append((found["y"].double() - exact["y"]).abs().max().item())
    assert errors[0] < 1e-6
    assert 1e-6 < errors[1] < 2**-10


def test_compiled_by_torch(emulated: Cuda) -> None:
    """Dynamo does not look into the extension, and one graph serves other T and B."""
    torch._dynamo.reset()
    net = fastrnn.GRU(5, 20)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    with using("emulated"):
        for T, B in ((4, 3), (6, 2)):
            x = torch.randn(T, B, 5)
            with torch._dynamo.config.patch(error_on_recompile=T == 6):
                y, h = compiled(x)
            y.sum().backward()
            for ours, expected in zip((y, h), net(x), strict=True):
                assert torch.equal(ours, expected)
    assert all(p.grad is not None for p in net.parameters())


def _lstm(x: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None) -> tuple[Problem, Inputs]:
    """A small layer, as backends get it."""
    weights = [torch.randn(80, x.shape[-1]), torch.randn(80, 20), None, None]
    inputs = Inputs(x, batch_sizes, lengths, None, (None,) * 4, weights)
    batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    return describe("lstm", inputs, (False,), batch, False, False), inputs


def test_whatever_the_callers_mode(module: ModuleType) -> None:
    """What is the host's stays there, and can be written to after a first call without autograd."""
    packed = _lstm(torch.randn(7, 3), torch.tensor([3, 2, 1, 1]), None)
    backend = Cuda(module, device="cpu")
    with torch.device("meta"), torch.inference_mode():
        backend._check_report()
        rows = _Rows(*packed)
    assert rows.lengths is not None
    assert rows.lengths.tolist() == [4, 2, 1]
    assert backend._report is not None
    backend._report.fill_(1)
    with pytest.raises(RuntimeError, match="gave up"):
        backend._check_report()
    backend._check_report()


def test_lengths_beyond_the_batch_are_cut(emulated: Cuda) -> None:
    """Nobody looks at lengths that lie on a device."""
    problem, inputs = _lstm(torch.randn(4, 3, 3), None, torch.tensor([9, -2, 3]))
    within = inputs._replace(lengths=torch.tensor([4, 0, 3]))
    ours, expected = (emulated.forward(problem, given, False) for given in (inputs, within))
    for found, right in zip(ours[:3], expected[:3], strict=True):
        assert torch.equal(found, right)


def test_weights_gradients_of_blocks_of_the_batch(emulated: Cuda) -> None:
    case = Case(4, 6, 5, 20, reverse=BOTH, ends=(4, 2, 0, 3, 4, 1))
    weights = make_inputs("gru", case, torch.float32).weights
    x = make_inputs("gru", case, torch.float32).x.detach()
    kind = {"cell": CELLS["gru"], "dtype": x.dtype, "device": x.device, "reverse": BOTH}
    asked = {"lengths": True, "packed": False, "reset": False, "grouped": False}
    sizes = {"T": 4, "B": 6, "I": 5, "H": 20, "P": 0}
    problem = backends.Problem(**kind, **sizes, **asked, all_states=False, grad=True)
    lengths = torch.tensor(case.ends)
    inputs = backends.Inputs(x, None, lengths, None, (None,) * 4, [w.detach() for w in weights])
    y, _, _, _, saved = emulated.forward(problem, inputs, save=True)
    dy = torch.randn_like(y)
    needs = [True] + [False] * 4 + [True] * 8

    def gradients(dy: Tensor, samples: int) -> list[Tensor]:
        grads = backends.Grads(dy, None, None, None)
        found = emulated.backward(problem, inputs, y, saved, grads, needs, samples)
        return [d for d in found if d is not None]

    whole, parts = gradients(dy, 1), gradients(dy, 3)
    torch.testing.assert_close(parts[0], whole[0])
    for part, all_of_it in zip(parts[1:], whole[1:], strict=True):
        assert part.shape == (3, *all_of_it.shape)
        torch.testing.assert_close(part.sum(0), all_of_it)
    first = torch.arange(6) < 2
    alone = gradients(dy * first[:, None], 1)
    for part, expected in zip(parts[1:], alone[1:], strict=True):
        torch.testing.assert_close(part[0], expected)


def test_a_wait_that_runs_out_is_reported_and_leaves_nan(emulated: Cuda) -> None:
    case = Case(4, 3, 5, 40)
    emulated.poll_limit = 1
    inputs = make_inputs("lstm", case, torch.float32)
    with fastrnn.backend("emulated"):
        layer = fastrnn.LSTM(5, 40)
        assert layer(inputs.x)[0].isnan().any()
        emulated.poll_limit = 1 << 18
        with pytest.raises(RuntimeError, match="gave up waiting"):
            layer(inputs.x)
        assert layer(inputs.x)[0].isfinite().all()


def test_refusals_name_their_reason(emulated: Cuda) -> None:
    layers = {
        "float64": fastrnn.LSTM(3, 4, dtype=torch.float64),
        "proj_size": fastrnn.LSTM(3, 4, proj_size=2),
    }
    for word, layer in layers.items():
        x = torch.randn(2, 2, 3, dtype=next(layer.parameters()).dtype)
        with fastrnn.backend("emulated"), pytest.raises(RuntimeError, match=word):
            layer(x)
