"""What can be known of the CUDA extension without a GPU: it imports, its plans keep to a device's
limits, and the compiler's report of its kernels. Skipped where the build has left CUDA out."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastrnn
from fastrnn.backends.cuda import CUDA
from fastrnn.cells import CELLS

_cuda = pytest.importorskip("fastrnn._cuda")

LOGS = sorted(Path(__file__).parents[1].glob("build/ninja*/cuda/*.o.log"))
CHIPS = {
    "A100": _cuda.Limits(80, 108, 166912, 0),
    "RTX 4090": _cuda.Limits(89, 128, 101376, 0),
    "H100": _cuda.Limits(90, 132, 232448, 16),
    "a slice of an H100": _cuda.Limits(90, 16, 232448, 8),
    "RTX 5090": _cuda.Limits(120, 170, 101376, 8),
}
WARPS = 8


def test_cells_are_those_of_python() -> None:
    found = {name: tuple(rest) for name, (_, *rest) in _cuda.cells().items()}
    assert found == {
        name: (c.gates, c.states, c.saved, c.shared_dgates) for name, c in CELLS.items()
    }


@settings(max_examples=3000, deadline=None, derandomize=True)
@given(
    chip=st.sampled_from(sorted(CHIPS)),
    cell=st.integers(0, len(CELLS) - 1),
    precision=st.integers(0, 3),
    T=st.integers(1, 2**31 - 1),
    B=st.one_of(st.integers(1, 300), st.integers(1, 100_000)),
    H=st.one_of(st.integers(1, 2100), st.integers(1, 30_000)),
    G=st.integers(1, 40),
    backward=st.booleans(),
)
def test_a_plan_keeps_to_the_limits_or_has_a_reason(
    chip: str, cell: int, precision: int, T: int, B: int, H: int, G: int, backward: bool
) -> None:
    limits = CHIPS[chip]
    try:
        plan = _cuda.plan(cell, precision, T, B, H, G, backward, limits)
    except ValueError as error:
        reason = str(error)
        assert H > limits.multiprocessors * 128 - 32 or G > _cuda.max_groups, reason
        assert "hidden size" in reason or "groups" in reason
        return
    assert plan.threads <= 1024
    assert 0 < plan.shared_bytes <= limits.shared_bytes
    if plan.tier == "grid":  # one block a multiprocessor: all of a launch run at once
        assert 0 < plan.blocks <= limits.multiprocessors
    else:
        assert 0 < plan.slices <= limits.cluster
        assert not plan.streamed
    assert 1 <= plan.groups <= G
    assert plan.unit_tiles * plan.batch_tiles <= WARPS
    assert plan.slices * plan.unit_tiles * 16 >= H
    assert (plan.slices - 1) * plan.unit_tiles * 16 < -(-H // 32) * 32
    assert 1 <= plan.replicas <= -(-B // plan.rows_a_pass)
    chunk_units = 32 if precision >= 2 else 16
    gates = list(CELLS.values())[cell].gates
    chunks = -(-H // 32) * 32 // chunk_units * (gates if backward else 1)
    assert 0 <= plan.resident_chunks <= chunks
    assert plan.streamed == (plan.resident_chunks < chunks)


def test_equal_requests_get_equal_plans() -> None:
    request = (0, 2, 100, 64, 1024, 2, False, CHIPS["H100"])
    names = [name for name in dir(_cuda.Plan) if not name.startswith("_")]
    first, second = (_cuda.plan(*request) for _ in range(2))
    assert [getattr(first, n) for n in names] == [getattr(second, n) for n in names]


def test_weights_of_common_sizes_stay_on_the_chip() -> None:
    for hidden in (128, 256, 512, 1024):
        for backward in (False, True):
            for batch in (1, 16):
                plan = _cuda.plan(0, 2, 512, batch, hidden, 1, backward, CHIPS["H100"])
                assert not plan.streamed, (hidden, backward, batch)


def test_clusters_hold_what_they_can() -> None:
    """16-bit LSTMs up to H = 512 on an H100, and TF32 up to 256; a larger one is for the grid."""
    largest = {2: 512, 1: 256}
    for precision, most in largest.items():
        for hidden in (64, 128, 256, 512, 1024):
            for backward in (False, True):
                plan = _cuda.plan(0, precision, 512, 16, hidden, 1, backward, CHIPS["H100"])
                assert plan.tier == ("cluster" if hidden <= most else "grid"), (precision, hidden)


def test_no_more_clusters_than_run_at_once() -> None:
    """Where clusters of 16 leave multiprocessors over, one more would be a second wave."""
    at_once = [0] * 16 + [7]
    limits = _cuda.Limits(90, 132, 232448, 16, at_once)
    assert limits.at_once == at_once
    for backward in (False, True):
        plan = _cuda.plan(0, 2, 512, 64, 512, 2, backward, limits)
        assert plan.tier != "cluster" or plan.slices != 16 or 2 * plan.replicas <= 7
    spread = _cuda.plan(0, 2, 512, 64, 512, 1, False, CHIPS["H100"])
    assert (spread.slices, spread.replicas) == (16, 8)
    assert _cuda.plan(0, 2, 512, 64, 512, 1, False, limits).replicas <= 7


def test_old_devices_and_odd_requests_get_a_reason() -> None:
    with pytest.raises(ValueError, match="compute capability"):
        _cuda.plan(0, 2, 5, 1, 64, 1, False, _cuda.Limits(75, 40, 65536, 0))
    with pytest.raises(ValueError, match="shared memory"):
        _cuda.plan(0, 2, 5, 1, 64, 1, False, _cuda.Limits(80, 108, 1024, 0))
    with pytest.raises(ValueError, match="cell index"):
        _cuda.plan(99, 2, 5, 1, 64, 1, False, CHIPS["H100"])


def test_without_a_device_it_refuses_with_the_reason() -> None:
    layer, x = fastrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    assert "CUDA tensors, not on cpu" in fastrnn.explain(layer, x)[0].refusals["cuda"]
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present")
    problem = fastrnn.explain(layer, x)[0].problem._replace(device=torch.device("cuda"))
    assert CUDA.supports(problem) == _cuda.unavailable() != ""


def test_it_serves_only_when_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(CUDA), "supports", lambda self, problem: None)
    layer, x = fastrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    assert "asked for by name" in fastrnn.explain(layer, x)[0].refusals["cuda"]
    with fastrnn.backend("cuda"):
        assert fastrnn.explain(layer, x)[0].serves == "cuda"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_benchmark_of_hand_offs_compiles(architecture: str, tmp_path: Path) -> None:
    root, target = Path(__file__).parents[1], tmp_path / "handoff.o"
    flags = ["-std=c++17", "-Icsrc", f"-arch={architecture}", "-c", "-o", str(target)]
    subprocess.run(["nvcc", *flags, "benchmarks/handoff.cu"], cwd=root, check=True)
    assert target.exists()


@pytest.mark.skipif(not LOGS, reason="the logs of the CUDA build are not here")
def test_kernels_stay_in_their_registers() -> None:
    entries = [
        report
        for log in LOGS
        for report in log.read_text().split("Compiling entry function ")[1:]
        if "scan" in report.partition("\n")[0]
    ]
    architectures = {re.search(r"for '(sm_\w+)'", e)[1] for e in entries}
    precisions, passes, tiers = 4, 2, 2
    assert len(entries) == len(architectures) * len(CELLS) * precisions * passes * tiers
    for entry in entries:
        name = entry.partition("\n")[0]
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        assert not any(map(int, spilled.groups())), name
        # 256 threads of more would not fit the register file.
        assert int(re.search(r"Used (\d+) registers", entry)[1]) <= 255, name
