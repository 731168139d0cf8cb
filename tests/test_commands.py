"""`python -m fastrnn`: info, check, tune and bench, on grids as small as they go."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from fastrnn import machine, record, timing
from fastrnn.__main__ import COMMANDS, main
from fastrnn.backends import BACKENDS, refusal
from fastrnn.cells import CELLS
from fastrnn.commands.check import Kernel, Verdict, judge, judged, kernels_of
from fastrnn.commands.info import EXAMPLE
from fastrnn.validation import as_problem, make_inputs

pytest.importorskip("fastrnn._C")

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for records, and none is remembered."""
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path / "cache"))
    record.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    record.forget()


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert (COMMANDS[command].__doc__ or "").splitlines()[0] in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for fact in (torch.__version__, machine.cpu_name(), machine.instruction_set()):
        assert fact in printed
    assert f"{record.path_of(CPU)}: there is none" in printed
    problem, _ = as_problem("lstm", EXAMPLE, make_inputs("lstm", EXAMPLE, torch.float32))
    for backend in BACKENDS:
        reason = refusal(backend, problem)
        answer = "can serve" if reason is None else f"refuses: {reason}"
        assert f"  {backend.name}: {answer}\n" in printed


def test_info_tells_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = record.Kernel("cpu", "avx2", "gru", "float32")
    record.write_checked(CPU, {wrong: "y is off", wrong._replace(cell="lstm"): None})
    record.write_tuned(CPU, [record.Times("lstm", "float32", True, 8, 8, {"cpu": 1.0})])
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "1 right, 1 wrong" in printed
    assert "WRONG: cpu avx2 gru float32: y is off" in printed
    assert "1 points" in printed


def test_check_puts_its_verdicts_into_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    choice = ["--device", "cpu", "--cell", "gru", "--dtype", "float32", "--cases", "2"]
    assert main(["check", *choice]) == 0
    printed = capsys.readouterr().out
    found = record.of(CPU)
    assert found is not None
    ours = {record.Kernel("cpu", isa, "gru", "float32") for isa in machine.instruction_sets()}
    assert ours <= found.right
    assert not found.wrong
    assert printed.count("  right\n") == len(found.right)
    assert str(found.path) in printed


def test_check_takes_every_kernel_of_the_cpu() -> None:
    backends = [b.name for b in BACKENDS if not b.differentiable]
    kernels = kernels_of(CPU, backends, ["lstm"], ["float32", "float16"])
    names = [kernel.name for kernel in kernels]
    isas = machine.instruction_sets()
    assert names == [
        *(record.Kernel("cpu", isa, "lstm", "float32") for isa in isas),
        record.Kernel("aten", "", "lstm", "float32"),
        *(record.Kernel("widened", isa, "lstm", "float16") for isa in isas),
        record.Kernel("aten", "", "lstm", "float16"),
    ]


@pytest.mark.parametrize("backend", ["cpu", "aten"])
@pytest.mark.parametrize("cell", CELLS)
def test_every_case_can_be_judged(cell: str, backend: str) -> None:
    isa = machine.instruction_set() if backend == "cpu" else ""
    verdict = judge(Kernel("cpu", record.Kernel(backend, isa, cell, "float64")))
    assert verdict.wrong is None
    assert verdict.cases >= 20  # a training step and inference of ten layers at least
    assert 0 < verdict.share <= 1


def misbehave(kernels: Sequence[Kernel], connection: Connection) -> None:
    """Work that goes wrong as the kernel's dtype, of all its fields, says."""
    connection.send(None)
    for kernel in kernels:
        if kernel.name.dtype == "hangs":
            time.sleep(1000)
        elif kernel.name.dtype == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif kernel.name.dtype == "leaves":
            os._exit(3)
        connection.send(Verdict(1, 0.5, None, float(os.getpid())))


def test_a_kernel_that_hangs_or_crashes_is_wrong() -> None:
    behaviours = ["well", "hangs", "crashes", "well", "well", "leaves"]
    kernels = [Kernel("cpu", record.Kernel("cpu", "", "gru", name)) for name in behaviours]
    verdicts = [verdict for _, verdict in judged(kernels, misbehave, limit=2.0)]
    assert [v.wrong for v in verdicts] == [
        None,
        "it had not ended after 2 s",
        "its process was killed by SIGSEGV",
        None,
        None,
        "its process ended",
    ]
    pids = [v.seconds for v in verdicts if v.wrong is None]
    assert pids[0] != pids[1] == pids[2]


def test_tune_writes_times_that_choices_go_by(capsys: pytest.CaptureFixture[str]) -> None:
    choice = ["--device", "cpu", "--cell", "rnn_tanh", "--dtype", "float32", "float16"]
    grid = ["--hidden", "4", "9", "--batch", "1", "--seconds", "0.1"]
    assert main(["tune", *choice, *grid]) == 0
    found = record.of(CPU)
    assert found is not None
    points = [t[:5] for t in found.times]
    assert points == [
        ("rnn_tanh", dtype, training, H, 1)
        for dtype in ("float32", "float16") for training in (False, True) for H in (4, 9)
    ]  # fmt: skip
    for times in found.times:
        ours = "cpu" if times.dtype == "float32" else "widened"
        assert times.seconds.keys() == {ours, "aten"}
        assert all(seconds > 0 for seconds in times.seconds.values())
        best = min(times.seconds, key=lambda name: times.seconds[name])
        asked = ("rnn_tanh", getattr(torch, times.dtype), CPU, times.training, times.H, 1)
        assert record.fastest(*asked)[0] == best
    assert str(found.path) in capsys.readouterr().out


def test_tune_leaves_wrong_kernels_out(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = record.Kernel("cpu", machine.instruction_set(), "gru", "float32")
    record.write_checked(CPU, {kernel: "y is off"})
    assert main(["tune", "--device", "cpu", "--cell", "gru", "--dtype", "float32"]) == 0
    assert "nothing to tune" in capsys.readouterr().out


@pytest.mark.parametrize("cores", [0.1, 0.7])
def test_bench(
    cores: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing.Others, "cores", lambda _: cores)
    choice = ["--device", "cpu", "--cell", "gru", "--dtype", "float32", "--shape", "2,1,3,4"]
    assert main(["bench", *choice, "--seconds", "0.01"]) == 0
    _, row, _, *rest = capsys.readouterr().out.splitlines()
    complaint = "other processes used 0.7 cores: measure again when they rest"
    assert rest == [complaint] * (cores == 0.7)
    *_, theirs, ours, ratio = row.split()
    assert float(ratio) == pytest.approx(float(theirs) / float(ours), rel=0.2)


@pytest.mark.long
def test_a_planted_wrong_kernel_is_found_and_switched_off(tmp_path: Path, cache: Path) -> None:
    """A copy of the sources with another sign in one derivative, built, checked and asked."""
    tree = tmp_path / "tree"
    no_libraries = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("csrc", "fastrnn"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=no_libraries)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    header = tree / "csrc" / "cells" / "gru.h"
    right, wrong = "dx[1] = dh * (s_before[0] - n)", "dx[1] = dh * (s_before[0] + n)"
    assert right in header.read_text()
    header.write_text(header.read_text().replace(right, wrong))

    def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("FASTRNN_")}
        variables = {**kept, "FASTRNN_CACHE": str(cache), **environment}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True)

    quick = {"FASTRNN_CUDA": "0", "FASTRNN_ISAS": "portable", "CXXFLAGS": "-O1"}
    built = python("setup.py", "-q", "build_ext", "--inplace", **quick)
    assert built.returncode == 0, built.stderr
    only = ["--backend", "cpu", "--cell", "gru", "lstm", "--dtype", "float32", "--cases", "3"]
    checked = python("-m", "fastrnn", "check", *only)
    assert checked.returncode == 1, checked.stderr
    rows = {row.split()[3]: row for row in checked.stdout.splitlines() if "portable" in row}
    assert "WRONG" in rows["gru"]
    assert "dweight" in rows["gru"]
    assert rows["lstm"].endswith("  right")
    code = (
        "import fastrnn, torch\n"
        "for layer in (fastrnn.GRU(3, 4), fastrnn.LSTM(3, 4)):\n"
        "    print(fastrnn.explain(layer, torch.randn(5, 2, 3)))\n"
    )
    told = python("-c", code)
    reason = "`python -m fastrnn check` found its gru float32 kernel wrong on this machine"
    assert f"cpu: refuses: {reason}\n" in told.stdout, told.stderr
    assert "aten: serves\n" in told.stdout
    assert "cpu: serves\n" in told.stdout  # the LSTM
