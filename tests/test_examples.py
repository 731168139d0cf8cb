"""The examples run and do what they say, on small settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_recurrent_policy(cell: str) -> None:
    """It learns (its exit status tells), and the loop over torch.nn's cells has its gradients."""
    small = ["--updates", "130", "--rows", "32", "--steps", "32", "--repeats", "1"]
    assert "by reset=" in run("recurrent_policy.py", "--cell", cell, *small)
