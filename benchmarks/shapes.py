"""What is measured, and what is asked of it: shapes, cells, modes, dtypes and targets."""

from __future__ import annotations

from itertools import product
from typing import Literal, NamedTuple

import torch

from fastrnn.commands.bench import Shape as Shape

Mode = Literal["inference", "training"]
Kind = Literal["plain", "bidirectional", "packed"]
Key = tuple[str, str, Mode, Kind]  # cell, dtype, mode and kind


class Case(NamedTuple):
    cell: str
    mode: Mode
    dtype: str
    shape: Shape
    kind: Kind = "plain"

    def __str__(self) -> str:
        kind = "" if self.kind == "plain" else f" {self.kind}"
        return f"{self.cell}{kind} {self.mode} {self.dtype} ({self.shape})"


class Target(NamedTuple):
    """Ratios to torch.nn that are asked for: of every shape, and of their geometric mean."""

    each: float | None
    mean: float | None


SHAPES = (
    Shape(1, 1, 256, 256),
    Shape(100, 1, 128, 128),
    Shape(100, 1, 512, 512),
    Shape(1000, 16, 64, 64),
    Shape(100, 8, 256, 256),
    Shape(100, 32, 256, 256),
    Shape(50, 64, 512, 512),
    Shape(20, 64, 1024, 1024),
)
CELLS = ("lstm", "gru", "rnn_tanh")
MODES: tuple[Mode, ...] = ("inference", "training")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

KINDS: tuple[Kind, ...] = ("plain", "bidirectional", "packed")
VARIANT_SHAPE = Shape(100, 32, 256, 256)
VARIANT_CELLS = ("lstm", "gru")
SHORTEST = 10  # packed rows are between this and T long

TARGETS: dict[Key, Target] = {
    ("lstm", "fp32", "inference", "plain"): Target(1.0, 1.35),
    ("lstm", "fp32", "training", "plain"): Target(1.05, 1.6),
    ("gru", "fp32", "inference", "plain"): Target(1.25, 2.3),
    ("gru", "fp32", "training", "plain"): Target(1.3, 3.0),
    ("rnn_tanh", "fp32", "inference", "plain"): Target(1.2, 2.0),
    ("rnn_tanh", "fp32", "training", "plain"): Target(1.2, 2.5),
    ("lstm", "bf16", "inference", "plain"): Target(1.0, None),
    ("lstm", "bf16", "training", "plain"): Target(1.0, None),
    ("gru", "bf16", "inference", "plain"): Target(None, 2.0),
    ("gru", "bf16", "training", "plain"): Target(None, 2.0),
    ("lstm", "fp32", "inference", "bidirectional"): Target(1.3, None),
    ("lstm", "fp32", "training", "bidirectional"): Target(1.3, None),
    ("gru", "fp32", "inference", "bidirectional"): Target(2.0, None),
    ("gru", "fp32", "training", "bidirectional"): Target(2.0, None),
    ("lstm", "fp32", "inference", "packed"): Target(2.5, None),
    ("lstm", "fp32", "training", "packed"): Target(2.5, None),
    ("gru", "fp32", "inference", "packed"): Target(2.5, None),
    ("gru", "fp32", "training", "packed"): Target(2.5, None),
}
OPPONENT_TARGET = 0.9  # of the faster opponent, in fp32 inference
OPPONENT_SHORTEST = 100  # timesteps from which that is asked
PEAK_TARGET = 0.8  # of the machine's measured FMA peak, in fp32 inference
PEAK_SHAPE = Shape(50, 64, 512, 512)
PEAK_CELLS = ("lstm", "gru")


def all_cases() -> list[Case]:
    plain = [Case(c, m, d, s) for c, m, d, s in product(CELLS, MODES, DTYPES, SHAPES)]
    kinds = product(VARIANT_CELLS, MODES, DTYPES, KINDS[1:])
    return plain + [Case(c, m, d, VARIANT_SHAPE, kind) for c, m, d, kind in kinds]
