"""Every Triton kernel compiles for GPUs of NVIDIA and AMD, and fits them; no device is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")
FOLDER = Path(__file__).parent
# ptxas now and then keeps a few of a loop's invariants, addresses mostly, in local memory rather
# than compute them again. Gates that do not fit the registers would be hundreds of bytes.
INVARIANTS = 64


def run(what: str, cache: Path) -> list[dict[str, Any]]:
    """In a process of its own, as this one's kernels may be the interpreter's."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    paths = os.pathsep.join(filter(None, [inherited.get("PYTHONPATH"), str(FOLDER.parent)]))
    environment = {**inherited, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    command = [sys.executable, str(FOLDER / "triton_aot.py"), what]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_resources(target: str, tmp_path: Path) -> None:
    found = run(target, tmp_path)
    assert found
    bad = [
        one
        for one in found
        if one["registers"] > one["limits"][0]
        or one["shared"] > one["limits"][1]
        or one["spilled"] > INVARIANTS
    ]
    assert not bad


def test_new_lengths_and_batches_compile_nothing(tmp_path: Path) -> None:
    for one in run("launch", tmp_path):
        assert one["compiled"] == 1, one
