"""Builds the driver with setup.py's kernels and flags: build.py FOLDER, with CXXFLAGS to add.

Runs in the repository's root, with that on PYTHONPATH.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import setup as build

TILES = ["-include", "tests/sanitize/tiles.h"]


def main(folder: Path) -> None:
    compiler = build.find_compiler()
    sources = ["tests/sanitize/driver.cpp", *build.files("csrc/cpu/*.cpp")]
    units = build.compile_units(build.instruction_sets(compiler), sources)
    units = [u._replace(flags=u.flags + TILES * ("-mamx-tile" in u.flags)) for u in units]
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "build.ninja"
    script.write_text(build.ninja_text(compiler, units, f"{folder.as_posix()}/driver", []))
    subprocess.run([sys.executable, "-m", "ninja", "--quiet", "-f", str(script)], check=True)


main(Path(sys.argv[1]))
