"""The table: fastrnn against torch.nn, and against other runtimes, on every shape.

    python -m benchmarks.run --cell gru --mode training --quick

Each case is checked first, then its subjects are timed in turn, again where other processes took
part of the machine meanwhile. The results go into a JSON file under benchmarks/results/, the
geometric means and the targets onto the screen.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import graph, machine, shapes
from benchmarks.cases import Setup, flops
from benchmarks.check import verify, verify_opponent
from benchmarks.opponents import OPPONENTS, Opponent, OpponentError, missing
from benchmarks.results import FOLDER, Row, Run, summaries, verdicts
from benchmarks.shapes import Case
from fastrnn.cores import usable_cores
from fastrnn.timing import Timing, alternate
from fastrnn.validation import WrongResultError


class Effort(NamedTuple):
    seconds: float  # for each subject of a case, in all rounds
    rounds: int  # turns of the processes
    least: int  # samples a round


FULL = Effort(seconds=1.2, rounds=3, least=3)
QUICK = Effort(seconds=0.2, rounds=1, least=3)
DISTURBANCE = 0.1  # cores used by other processes, above which a round does not count
RETRIES = 4  # rounds that may be lost to that
COLUMNS = f"{'case':<52}{'torch':>10}{'fastrnn':>10}{'GF/s':>8}{'peak':>6}{'ratio':>7}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cell", nargs="+", choices=shapes.CELLS, default=shapes.CELLS)
    parser.add_argument("--mode", nargs="+", choices=shapes.MODES, default=shapes.MODES)
    parser.add_argument("--dtype", nargs="+", choices=shapes.DTYPES, default=list(shapes.DTYPES))
    parser.add_argument("--kind", nargs="+", choices=shapes.KINDS, default=shapes.KINDS)
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="T,B,I,H",
        choices=list(map(str, shapes.SHAPES)),
        help="only these of the table",
    )
    parser.add_argument(
        "--opponents", action="store_true", help=f"time {' and '.join(OPPONENTS)} too"
    )
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--quick", action="store_true", help="less time for each case")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    return parser.parse_args(arguments)


def selected(options: argparse.Namespace) -> list[Case]:
    cases = [
        case
        for case in shapes.all_cases()
        if case.cell in options.cell
        and case.mode in options.mode
        and case.dtype in options.dtype
        and case.kind in options.kind
        and (options.shape is None or str(case.shape) in options.shape)
    ]
    if not cases:
        raise SystemExit("no case of the table is left after these filters")
    return cases


def has_opponents(case: Case) -> bool:
    return case.mode == "inference" and case.dtype == "fp32" and case.kind == "plain"


def refusal(opponent: Opponent, setup: Setup) -> str | None:
    """Gives the opponent the model; the reason why it cannot be timed on it, or None."""
    case = setup.case
    model = graph.model(setup.layers["torch"], case.cell, case.shape.T, case.shape.B)
    try:
        y = torch.from_numpy(opponent.load(model, setup.x.numpy())).squeeze(1)  # [T, B, H]
        verify_opponent(y, setup)
    except (OpponentError, WrongResultError) as failure:
        return str(failure)
    return None


def spare_cores() -> float:
    """What other processes may use without disturbing ours."""
    return max(0, usable_cores() - torch.get_num_threads()) + DISTURBANCE


def quietest(setup: Setup, effort: Effort, opponents: list[Opponent]) -> dict[str, Timing]:
    """The times over the rounds in which the machine was ours, over all where there was none."""
    subjects = {name: setup.subject(name) for name in setup.layers}
    seconds = effort.seconds / effort.rounds
    quiet: list[dict[str, Timing]] = []
    disturbed: list[dict[str, Timing]] = []
    while len(quiet) < effort.rounds and len(disturbed) < RETRIES:
        turn = alternate(subjects, seconds, effort.least)
        turn |= {opponent.name: opponent.time(seconds) for opponent in opponents}
        calm = all(timing.others <= spare_cores() for timing in turn.values())
        (quiet if calm else disturbed).append(turn)
    first, *rest = quiet or disturbed
    for turn in rest:
        first = {name: timing.merged(turn[name]) for name, timing in first.items()}
    return first


def measure(case: Case, effort: Effort, opponents: list[Opponent]) -> Row:
    row = Row(case, flops(case))
    setup = Setup(case)
    try:
        row.error_share = max(verify(setup).values())
    except WrongResultError as failure:
        row.failure = str(failure)
        return row
    reasons = {opponent.name: refusal(opponent, setup) for opponent in opponents}
    row.absent = {name: reason for name, reason in reasons.items() if reason is not None}
    present = [opponent for opponent in opponents if opponent.name not in row.absent]
    timings = quietest(setup, effort, present)
    row.others = max(timing.others for timing in timings.values())
    row.disturbed = row.others > spare_cores()
    row.ms = {name: timing.best * 1e3 for name, timing in timings.items()}
    row.median_ms = {name: timing.median * 1e3 for name, timing in timings.items()}
    return row


def line(row: Row, peak: float) -> str:
    if row.failure is not None:
        return f"{row.case!s:<52}  WRONG: {row.failure}"
    times = f"{row.ms['torch']:>10.3f}{row.ms['fastrnn']:>10.3f}"
    rates = f"{row.gflops:>8.1f}{row.gflops / peak:>6.0%}{row.ratio:>7.2f}"
    others = "".join(
        f"  {name} {ms:.3f} ({ms / row.ms['fastrnn']:.2f})"
        for name, ms in row.ms.items()
        if name in OPPONENTS
    )
    others += "".join(f"  {name} FAILED: {reason}" for name, reason in row.absent.items())
    mark = f"  DISTURBED by {row.others:.1f} cores" if row.disturbed else ""
    return f"{row.case!s:<52}{times}{rates}{others}{mark}"


def print_head(run: Run) -> None:
    about = run.machine
    print(f"{about['cpu']}, {about['threads']} threads, {about['isa']}, commit {about['commit']}")
    print(f"measured FMA peak: {run.peak_gflops:.0f} GF/s (float32, all threads)")
    for name, reason in run.missing.items():
        print(f"opponent {name} is MISSING: {reason}")
    print("best ms of many; ratio: torch.nn / fastrnn; an opponent's ratio: its time / fastrnn's\n")
    print(COLUMNS)


def print_summary(run: Run) -> None:
    disturbed = sum(row.disturbed for row in run.rows)
    if disturbed:
        print(f"\n{disturbed} cases were disturbed by other processes: left out of what follows")
    print("\ntorch.nn / fastrnn")
    for summary in summaries(run.measured):
        cell, dtype, mode, kind = summary.key
        name = f"{cell} {dtype} {mode} {'' if kind == 'plain' else kind}"
        print(f"  {name:<40} geometric mean {summary.mean:5.2f}, least {summary.least:5.2f}")
    print("\ntargets")
    for verdict in verdicts(run):
        word = "met   " if verdict.met else "MISSED"
        print(f"  {word} {verdict.measured:6.2f} of {verdict.target:.2f}  {verdict.what}")


def default_path(run: Run) -> Path:
    now = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return FOLDER / f"{now}-{run.machine['commit']}.json"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    cases = selected(options)
    effort = QUICK if options.quick else FULL
    absent = missing() if options.opponents else {}
    settings = {"effort": effort._asdict(), "opponents": options.opponents}
    run = Run(machine.describe(), settings, machine.fma_peak(options.threads), absent)
    print_head(run)
    with ExitStack() as stack:
        wanted = [name for name in OPPONENTS if options.opponents and name not in absent]
        opponents = [stack.enter_context(Opponent(name, options.threads)) for name in wanted]
        for case in cases:
            row = measure(case, effort, opponents if has_opponents(case) else [])
            run.rows.append(row)
            print(line(row, run.peak_gflops), flush=True)
    print_summary(run)
    path = options.output or default_path(run)
    run.save(path)
    print(f"\nwritten: {path}")
    return 1 if any(row.failure or row.absent for row in run.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
