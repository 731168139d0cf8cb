"""Writes a results file into README.md, between the two marks that delimit the measured section."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks.results import Run, Summary, load, newest, summaries, verdicts

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- measured: begin (written by `python -m benchmarks.report`) -->"
END = "<!-- measured: end -->"


def table(rows: list[Summary]) -> Iterator[str]:
    yield "| layer | dtype | mode | shapes | geometric mean | least |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        cell, dtype, mode, kind = row.key
        layer = cell if kind == "plain" else f"{cell}, {kind}"
        yield f"| {layer} | {dtype} | {mode} | {row.shapes} | {row.mean:.2f} | {row.least:.2f} |"


def against_opponents(run: Run) -> Iterator[str]:
    names = [name for name in run.machine["versions"] if any(name in r.ms for r in run.measured)]
    others = [name for name in names if name != "torch"]
    if not others:
        return
    yield ""
    yield "Float32 inference, best milliseconds, each runtime in its own process:"
    yield ""
    yield f"| cell | T,B,I,H | fastrnn | torch | {' | '.join(others)} |"
    yield "|---|---|---|---|" + "---|" * len(others)
    for row in run.measured:
        if row.opponent is None:
            continue
        times = [row.ms["fastrnn"], row.ms["torch"], *(row.ms[name] for name in others)]
        cells = " | ".join(f"{ms:.3f}" for ms in times)
        yield f"| {row.case.cell} | {row.case.shape} | {cells} |"


def section(run: Run) -> str:
    about = run.machine
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        BEGIN,
        f"Measured on {about['cpu']}, {about['threads']} threads, kernels for `{about['isa']}`,"
        f" commit `{about['commit']}`; {versions}.",
        f"Peak: {run.peak_gflops:.0f} GF/s of float32 multiply-adds, measured on those threads.",
        "The numbers are the time of `torch.nn` over that of fastrnn, best of many samples taken",
        "in turn in one process, over the shapes of `benchmarks/shapes.py`.",
        "",
        *table(summaries(run.measured)),
        *against_opponents(run),
    ]
    left_out = sum(row.disturbed for row in run.rows)
    if left_out:
        lines += ["", f"Left out: {left_out} cases during which other processes were at work."]
    missed = [verdict for verdict in verdicts(run) if not verdict.met]
    if missed:
        lines += ["", "Targets of our own that this run misses:", ""]
        lines += [f"- {each.what}: {each.measured:.2f} of {each.target:.2f}" for each in missed]
    return "\n".join([*lines, END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="a JSON file; default: the newest")
    options = parser.parse_args()
    text = README.read_text()
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"README.md has lost its marks: {BEGIN} ... {END}")
    README.write_text(before + section(load(options.results or newest())) + after)
    print("README.md: measured section written")


if __name__ == "__main__":
    main()
