"""A run's results: the file, and what they say next to the targets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.shapes import (
    OPPONENT_SHORTEST,
    OPPONENT_TARGET,
    PEAK_CELLS,
    PEAK_SHAPE,
    PEAK_TARGET,
    TARGETS,
    Case,
    Key,
    Shape,
)

FOLDER = Path(__file__).resolve().parent / "results"
OWN = ("fastrnn", "torch")  # the rest of a row's times are opponents'


@dataclass
class Row:
    case: Case
    flops: float
    ms: dict[str, float] = field(default_factory=dict)  # the best, by library
    median_ms: dict[str, float] = field(default_factory=dict)
    error_share: float | None = None  # the largest part of an error budget that was used
    others: float = 0.0  # cores that other processes used meanwhile
    disturbed: bool = False  # and whether that was too much
    failure: str | None = None  # what was wrong with fastrnn's result; the case has no time then
    absent: dict[str, str] = field(default_factory=dict)  # opponents that could not be timed, why

    @property
    def ratio(self) -> float:
        return self.ms["torch"] / self.ms["fastrnn"]

    @property
    def gflops(self) -> float:
        return self.flops / self.ms["fastrnn"] / 1e6

    @property
    def opponent(self) -> tuple[str, float] | None:
        """The fastest opponent, and its time over ours."""
        others = {name: ms for name, ms in self.ms.items() if name not in OWN}
        if not others:
            return None
        best = min(others, key=lambda name: others[name])
        return best, others[best] / self.ms["fastrnn"]


@dataclass
class Run:
    machine: dict[str, Any]
    settings: dict[str, Any]
    peak_gflops: float
    missing: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    @property
    def measured(self) -> list[Row]:
        """The rows whose times count: right results on an undisturbed machine."""
        return [row for row in self.rows if row.failure is None and not row.disturbed]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = asdict(self)
        for entry, row in zip(record["rows"], self.rows, strict=True):
            entry["case"] = {**row.case._asdict(), "shape": row.case.shape._asdict()}
        path.write_text(json.dumps(record, indent=1) + "\n")


def load(path: Path) -> Run:
    record = json.loads(path.read_text())
    rows = []
    for entry in record.pop("rows"):
        case = entry.pop("case")
        rows.append(Row(Case(**{**case, "shape": Shape(**case["shape"])}), **entry))
    return Run(**record, rows=rows)


def newest() -> Path:
    """The results file that was written last."""
    found = sorted(FOLDER.glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit("no results yet: run `make bench` or `python -m benchmarks.run`")
    return found[-1]


class Verdict(NamedTuple):
    what: str
    measured: float
    target: float

    @property
    def met(self) -> bool:
        return self.measured >= self.target


class Summary(NamedTuple):
    """The ratios to torch.nn of one cell, dtype, mode and kind."""

    key: Key
    least: float
    mean: float
    shapes: int


def summaries(rows: Iterable[Row]) -> list[Summary]:
    groups: dict[Key, list[float]] = {}
    for row in rows:
        case = row.case
        groups.setdefault((case.cell, case.dtype, case.mode, case.kind), []).append(row.ratio)
    return [
        Summary(key, min(ratios), statistics.geometric_mean(ratios), len(ratios))
        for key, ratios in groups.items()
    ]


def verdicts(run: Run) -> Iterator[Verdict]:
    """Every target that the rows of this run can say something about."""
    for summary in summaries(run.measured):
        target = TARGETS.get(summary.key)
        if target is None:
            continue
        name = " ".join(part for part in summary.key if part != "plain")
        if target.each is not None:
            yield Verdict(f"{name}, least ratio to torch.nn", summary.least, target.each)
        if target.mean is not None:
            yield Verdict(f"{name}, geometric mean", summary.mean, target.mean)
    for row in run.measured:
        case = row.case
        opponent = row.opponent
        if opponent and case.shape.T >= OPPONENT_SHORTEST:
            yield Verdict(f"{case}, {opponent[0]} / fastrnn", opponent[1], OPPONENT_TARGET)
        plain = case.mode == "inference" and case.dtype == "fp32" and case.kind == "plain"
        if plain and case.shape == PEAK_SHAPE and case.cell in PEAK_CELLS:
            yield Verdict(f"{case}, of the FMA peak", row.gflops / run.peak_gflops, PEAK_TARGET)
