"""Every backend that serves CUDA tensors, on a CUDA or HIP device: `pytest -m gpu`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    GPU_BACKENDS,
    Case,
    Inputs,
    Truth,
    assert_close,
    float32_products,
    make_inputs,
    poisoned,
    run,
    using,
)
from torch import Tensor

import fastrnn
from fastrnn import backends, functional
from fastrnn.backends.cuda import Cuda
from fastrnn.cells import CELLS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
BOTH = (False, True)
CASES = [
    Case(1, 1, 1, 1),
    Case(7, 3, 5, 13),
    Case(5, 37, 19, 48, hx=False),
    Case(50, 64, 20, 64, reverse=BOTH),
    Case(40, 1, 30, 128),
    Case(40, 20, 30, 128, bias=False),
    Case(30, 7, 16, 130),
    Case(30, 7, 16, 300, reverse=BOTH),
    Case(20, 64, 40, 256),
    Case(20, 33, 40, 512, hx=False),
    Case(10, 32, 40, 1024),
    Case(3, 600, 20, 1100),
    Case(6, 5, 9, 11, reverse=(True,), layout="batch_first"),
    Case(90, 24, 40, 100, lengths=(90,) * 3 + tuple(range(63, 0, -3)), reverse=BOTH),
    Case(30, 24, 5, 270, lengths=tuple(range(30, 6, -1)), every=True),
    Case(9, 6, 7, 19, ends=(3, 9, 0, 1, 9, 4), cuts=0.2, to=True, every=True, reverse=BOTH),
    Case(40, 18, 7, 270, ends=tuple(range(2, 38, 2)), cuts=0.1, to=True, reverse=BOTH),
    Case(40, 5, 7, 140, cuts=0.1, hx=False),
    Case(5, 4, 6, 17, grouped=True, reverse=(False, True, False)),
    Case(5, 4, 6, 200, grouped=True, reverse=(False,) * 3),
    Case(5, 4, 6, 17, reverse=(True,) * 40),
]
on_each = pytest.mark.parametrize("backend", GPU_BACKENDS)
of_each_cell = pytest.mark.parametrize("cell", CELLS)


def on_device(inputs: Inputs) -> Inputs:
    """Fresh leaves on the device."""
    return inputs.to(inputs.x.dtype, torch.device("cuda"))


@functools.lru_cache(maxsize=2)
def truth(cell: str, case: Case, arithmetic: str) -> Truth:
    tf32 = arithmetic == "tf32"
    return Truth(cell, case, DTYPES[arithmetic], device=torch.device("cuda"), tf32=tf32)


def layer(kind: str, *args: Any, **options: Any) -> fastrnn.LSTM:
    """A layer on the device; `kind` is the name of the class."""
    made: fastrnn.LSTM = getattr(fastrnn, kind)(*args, **options).to("cuda")
    return made


@on_each
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@of_each_cell
def test_values_and_gradients(backend: str, cell: str, case: Case, name: str) -> None:
    expected = truth(cell, case, name)
    inputs = on_device(make_inputs(cell, case, DTYPES[name]))
    with float32_products(name), poisoned():
        ours = run(cell, case, inputs, backend)
    expected.check(ours)


@pytest.fixture
def grids() -> Iterator[str]:
    """The name of a backend of CUDA kernels that knows no clusters."""

    class Grids(Cuda):
        name = "cuda_grids"
        on_request = None

        def _find_limits(self, device: int) -> Any:
            found = _cuda.device_limits(device)
            return _cuda.Limits(found.capability, found.multiprocessors, found.shared_bytes, 0)

    _cuda = pytest.importorskip("fastrnn._cuda")
    backend = Grids(_cuda)
    backends.BACKENDS.append(backend)
    yield backend.name
    backends.BACKENDS.remove(backend)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("case", [c for c in CASES if c.H <= 512], ids=str)
@of_each_cell
def test_grids_where_clusters_would_serve(grids: str, cell: str, case: Case, name: str) -> None:
    expected = truth(cell, case, name)
    inputs = on_device(make_inputs(cell, case, DTYPES[name]))
    with float32_products(name), poisoned():
        ours = run(cell, case, inputs, grids)
    expected.check(ours)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(
    "case", [Case(20, 33, 17, 37, reverse=BOTH), Case(50, 40, 17, 270)], ids=str
)
@of_each_cell
@on_each
def test_same_bits_on_repeat_runs(backend: str, cell: str, case: Case, name: str) -> None:
    with float32_products(name):
        first, *others = (
            run(cell, case, on_device(make_inputs(cell, case, DTYPES[name])), backend)
            for _ in range(4)
        )
    for other in others:
        for key, value in first.items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("H", [64, 270])
@on_each
def test_on_a_stream_of_ones_own(backend: str, H: int) -> None:
    net, x = layer("LSTM", 5, H), torch.randn(30, 9, 5).to("cuda")
    with using(backend), torch.no_grad():
        expected, _ = net(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y, _ = net(x)
        stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("H", [64, 270])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@on_each
def test_cuda_graph(backend: str, kind: str, H: int) -> None:
    """A captured training step gives on new inputs what an eager one gives."""
    net = layer(kind, 5, H)
    x = torch.randn(20, 9, 5).to("cuda").requires_grad_()
    wanted = [x, *net.parameters()]

    def step() -> tuple[Tensor, ...]:
        with using(backend):
            y, _ = net(x)
        return (y, *torch.autograd.grad(y.square().sum(), wanted))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn(x.shape))
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)


@of_each_cell
def test_triton_compiles_once_for_all_lengths_and_batches(cell: str) -> None:
    from fastrnn.backends.triton import kernels

    def compiled() -> int:
        scans = (kernels.forward_scan, kernels.backward_scan)
        return sum(len(cache[0]) for scan in scans for cache in scan.device_caches.values())

    counts = []
    for T, B in ((4, 3), (1, 1), (16, 16), (33, 15)):
        case = Case(T, B, 6, 70)
        run(cell, case, on_device(make_inputs(cell, case, torch.float16)), "triton")
        counts.append(compiled())
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@on_each
def test_compiled_by_torch(backend: str, kind: str) -> None:
    net, x = layer(kind, 5, 40), torch.randn(12, 3, 5).to("cuda")
    with using(backend):
        expected, _ = net(x)
        compiled = torch.compile(net, fullgraph=True)
        y, _ = compiled(x)
        y.sum().backward()
    assert torch.equal(y, expected)
    assert all(p.grad is not None for p in net.parameters())


@on_each
def test_more_steps_than_16_bits_count(backend: str) -> None:
    net, x = layer("GRU", 2, 16), torch.randn(70_000, 1, 2).to("cuda")

    def by_parts(parts: int) -> list[Tensor]:
        state, outputs = None, []
        for part in x.chunk(parts):
            y, state = net(part, state)
            outputs.append(y)
        y = torch.cat(outputs)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), list(net.parameters()))]

    with using(backend), float32_products("fp32"):
        for at_once, in_two in zip(by_parts(1), by_parts(2), strict=True):
            assert_close(at_once, in_two, len(x) + 16, torch.float32)


@on_each
def test_offsets_beyond_32_bits(backend: str) -> None:
    """The gates of all steps are more than 2^31 values; those of half the batch are less."""
    T, B, H = 4200, 1024, 128
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("takes a GPU with 40 GB of memory")
    net = layer("LSTM", 1, H).half()
    x = torch.randn(T, B, 1).to("cuda", torch.float16)
    with using(backend), torch.no_grad():
        y, (h_n, c_n) = net(x)
        second, ends = net(x[:, B // 2 :])
    found = (y[:, B // 2 :], h_n[:, B // 2 :], c_n[:, B // 2 :])
    for ours, their in zip(found, (second, *ends), strict=True):
        assert_close(ours, their, T * H, torch.float16)


@on_each
def test_explained(backend: str) -> None:
    net, x = layer("LSTM", 5, 40), torch.randn(12, 3, 5).to("cuda")
    with fastrnn.backend(backend):
        (found,) = fastrnn.explain(net, x)
    assert found.serves == backend or backend in found.refusals


@on_each
def test_another_device_than_the_current_one(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    case = Case(6, 3, 4, 20)
    states = {n: p.to("cuda:1") for n, p in fastrnn.LSTM(4, 20).state_dict().items()}
    net = fastrnn.LSTM(4, 20, device="cuda:1")
    net.load_state_dict(states)
    x = torch.randn(case.T, case.B, case.I, device="cuda:1")
    with using(backend):
        y, _ = net(x)
    with fastrnn.backend("reference"):
        expected, _ = net(x)
    torch.testing.assert_close(y, expected)


@on_each
def test_lengths_do_not_synchronize(backend: str) -> None:
    net = layer("LSTM", 5, 40)
    x = torch.randn(12, 3, 5).to("cuda")
    lengths = torch.tensor([12, 0, 5], device="cuda")
    with using(backend), torch.no_grad():
        weights = [*net.parameters()]
        functional.layer("lstm", x, None, weights, lengths=lengths)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            functional.layer("lstm", x, None, weights, lengths=lengths)
        finally:
            torch.cuda.set_sync_debug_mode("default")
