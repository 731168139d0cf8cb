"""How the kernels behave in a process: long sequences, threads, forks, a busy machine, padding."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Case, Inputs, Named, Truth, assert_close, make_inputs, run, run_python, using
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import functional
from fastrnn.cells import CELLS, States
from fastrnn.cores import usable_cores

pytest.importorskip("fastrnn._C")

HANG_GUARD_SECONDS = 300  # not a measurement: only a deadlocked child is ever stopped by it


def _in_chunks(cell: str, inputs: Inputs, length: int) -> Named:
    states: States | None = tuple(inputs.states) or None
    ys: list[Tensor] = []
    with using("cpu"):
        for part in inputs.x.split(length):
            y, states, _ = functional.layer(cell, part, states, inputs.weights)
            ys.append(y)
    assert states is not None
    return {"y": torch.cat(ys), **{f"state{k}": s for k, s in enumerate(states)}}


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("case", [Case(64, 3, 5, 19), Case(64, 1, 40, 33)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_chunks_of_time_equal_one_run(cell: str, case: Case, length: int) -> None:
    """Carrying the state over, to rounding: the blocking of the sums depends on the number of
    rows."""
    whole = _in_chunks(cell, make_inputs(cell, case, torch.float32), case.T)
    parts = _in_chunks(cell, make_inputs(cell, case, torch.float32), length)
    for name, value in whole.items():
        assert_close(parts[name], value, case.T * case.B + case.I + case.H, torch.float32)


@pytest.mark.parametrize("cell", CELLS)
def test_sequence_of_70000_steps(cell: str) -> None:
    """Longer than 65536, where some libraries end. The double kernels are the truth here:
    test_kernels compares them with the reference."""
    case = Case(70_000, 1, 3, 6)
    ours = run(cell, case, make_inputs(cell, case, torch.float32), "cpu")
    Truth(cell, case, torch.float32, exact_on="cpu").check(ours)


@pytest.mark.parametrize("cell", CELLS)
def test_eight_python_threads_at_once_equal_serial(cell: str) -> None:
    torch.set_num_threads(2)
    cases = [Case(30, 1, 16, 70), Case(30, 9, 16, 24), Case(12, 33, 8, 20, reverse=(False, True))]

    def work(k: int) -> Named:
        case = cases[k % len(cases)]
        return run(cell, case, make_inputs(cell, case, torch.float32, seed=k), "cpu")

    serial = [work(k) for k in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for expected, found in zip(serial, pool.map(work, range(24)), strict=True):
            for name, value in expected.items():
                assert torch.equal(value, found[name]), name


def test_one_module_called_from_many_threads() -> None:
    layer = fastrnn.LSTM(8, 40, num_layers=2, bidirectional=True)
    xs = [torch.randn(11, 3, 8) for _ in range(32)]
    with torch.no_grad():
        serial = [layer(x)[0] for x in xs]

    def infer(x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = layer(x)[0]
            return y

    with ThreadPoolExecutor(8) as pool:
        assert all(map(torch.equal, serial, pool.map(infer, xs)))


class _Encoded(torch.utils.data.Dataset[Tensor]):
    """A dataset whose items are made by a layer, in whichever process asks."""

    def __init__(self, layer: fastrnn.GRU) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        x = torch.randn(20, 2, 8, generator=torch.Generator().manual_seed(index))
        y: Tensor = self.layer(x)[0]
        y.square().sum().backward()
        return y.detach()


def test_forked_worker_runs_a_layer_after_the_parent_has() -> None:
    layer = fastrnn.GRU(8, 96)
    dataset = _Encoded(layer)
    expected = [dataset[k] for k in range(len(dataset))]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
        timeout=HANG_GUARD_SECONDS,
    )
    # A worker has one thread and the parent has two, so the bits may differ, but not more.
    for found, truth in zip(loader, expected, strict=True):
        assert_close(found, truth, 8 + 96, torch.float32)


_SPIN = """
import time
end = time.monotonic() + 120
while time.monotonic() < end: pass
"""
_TRAIN = """
import torch, fastrnn
torch.set_num_threads(2)
for layer in (fastrnn.LSTM(64, 128), fastrnn.GRU(64, 128), fastrnn.RNN(64, 128)):
    for batch in (1, 3, 32):
        y, _ = layer(torch.randn(50, batch, 64))
        y.sum().backward()
print("done")
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="there is no list of threads here")
def test_small_calls_wake_no_threads() -> None:
    code = """
import os, torch, fastrnn
torch.set_num_threads(2)
def started(layer, *shape):
    before = len(os.listdir("/proc/self/task"))
    layer(torch.randn(*shape))[0].sum().backward()
    return len(os.listdir("/proc/self/task")) - before
print(*(started(kind(16, 16), 5, 2, 16) for kind in (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN)))
print(started(fastrnn.LSTM(64, 128), 20, 16, 64))
"""
    woken = min(2, usable_cores()) - 1
    assert run_python(code).stdout.split() == ["0", "0", "0", str(woken)]


def test_busy_cores_do_not_hang_it() -> None:
    neighbours = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(2)]
    try:
        result = subprocess.run(
            [sys.executable, "-c", _TRAIN],
            capture_output=True,
            text=True,
            timeout=HANG_GUARD_SECONDS,
            env={k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"},  # the tests' own
        )
        assert all(n.poll() is None for n in neighbours)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert result.stdout.strip() == "done", result.stderr


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_nan_in_padding_never_leaks(kind: Any, bidirectional: bool) -> None:
    lengths = [3, 9, 1, 6]
    padded = torch.randn(9, 4, 5)
    for row, n in enumerate(lengths):
        padded[n:, row] = math.nan
    padded.requires_grad_()
    layer = kind(5, 11, num_layers=2, bidirectional=bidirectional)
    packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
    y, hidden = layer(packed)
    states = hidden if isinstance(hidden, tuple) else (hidden,)
    out, _ = pad_packed_sequence(y)
    loss = out.square().sum() + sum(s.square().sum() for s in states)
    loss.backward()
    assert padded.grad is not None
    tensors = [y.data, *states, padded.grad, *(p.grad for p in layer.parameters())]
    assert all(t is not None and t.isfinite().all() for t in tensors)
    for row, n in enumerate(lengths):
        assert (padded.grad[n:, row] == 0).all()
