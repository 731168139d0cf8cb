"""Draws a results file: the ratio to torch.nn of every shape, one panel a mode and dtype."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.results import Row, Run, load, newest
from benchmarks.shapes import CELLS, DTYPES, MODES, SHAPES

WIDTH = 0.27  # of a bar, where the shapes are one apart
LOWEST = 0.5  # where the axis of ratios begins


def panel(axes: Any, rows: list[Row], title: str) -> None:
    for place, cell in enumerate(CELLS):
        ratios = {row.case.shape: row.ratio for row in rows if row.case.cell == cell}
        at = [index for index, shape in enumerate(SHAPES) if shape in ratios]
        heights = [ratios[SHAPES[index]] for index in at]
        bars = axes.bar([index + (place - 1) * WIDTH for index in at], heights, WIDTH, label=cell)
        axes.bar_label(bars, fmt="%.1f", fontsize=6)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.set_ylim(bottom=LOWEST)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(SHAPES)), [str(shape) for shape in SHAPES], rotation=30, fontsize=7)
    axes.set_title(title, fontsize=10)


def draw(run: Run, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        len(DTYPES), len(MODES), figsize=(13, 8), sharey=True, squeeze=False, layout="constrained"
    )
    for across, dtype in zip(grid, DTYPES, strict=True):
        for axes, mode in zip(across, MODES, strict=True):
            rows = [
                row
                for row in run.measured
                if (row.case.dtype, row.case.mode, row.case.kind) == (dtype, mode, "plain")
            ]
            panel(axes, rows, f"{mode}, {dtype}")
    grid[0][0].legend()
    grid[0][0].set_ylabel("torch.nn / fastrnn")
    grid[-1][0].set_xlabel("T,B,I,H")
    about = run.machine
    figure.suptitle(
        f"Time of torch.nn {about['versions']['torch']} over fastrnn {about['commit']}: "
        f"{about['cpu']}, {about['threads']} threads, {about['isa']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="a JSON file; default: the newest")
    parser.add_argument("--output", type=Path, help="default: the JSON's name with .png")
    options = parser.parse_args()
    results = options.results or newest()
    path = options.output or results.with_suffix(".png")
    draw(load(results), path)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
