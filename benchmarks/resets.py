"""Resets and lengths: a training step of a layer, against what people write without them.

Resets against a loop over torch.nn's cells that zeroes the states of rows that begin anew, and
lengths= against packing, the same layer, and unpacking."""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from benchmarks.cases import Results
from benchmarks.check import compare
from benchmarks.run import DISTURBANCE
from benchmarks.shapes import SHORTEST, VARIANT_SHAPE, Shape
from fastrnn.cores import usable_cores
from fastrnn.machine import cpu_name
from fastrnn.timing import alternate

SHARE = 0.05  # of the steps are resets
RESET_TARGETS = {Shape(256, 8, 64, 64): 8.0, Shape(256, 32, 256, 256): 1.8}
LENGTHS_TARGET = 1 / 1.05
CELLS = {"lstm": (nn.LSTMCell, fastrnn.LSTM), "gru": (nn.GRUCell, fastrnn.GRU)}
Call = Callable[[Tensor], Tensor]


class Subject(NamedTuple):
    """A way to run a layer: from x to the output, and the weights that it uses."""

    call: Call
    weights: Sequence[Tensor]

    def gradients(self, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        y = self.call(x)
        return y.detach(), *torch.autograd.grad(y, [x, *self.weights], dy)


class Comparison(NamedTuple):
    name: str
    ours: Subject
    theirs: Subject
    exact: Subject  # in double precision
    target: float  # times that ours should be faster


def loop_over_cells(cell: Any, reset: Tensor) -> Call:
    """The recurrence of recurrent policies: ``(1 - done) * state`` before every step."""

    def run(x: Tensor) -> Tensor:
        going_on = (~reset).to(x.dtype).unsqueeze(-1)  # [T, B, 1]
        h = c = x.new_zeros(x.shape[1], cell.hidden_size)
        outputs = []
        for t in range(len(x)):
            if isinstance(cell, nn.LSTMCell):
                h, c = cell(x[t], (going_on[t] * h, going_on[t] * c))
            else:
                h = cell(x[t], going_on[t] * h)
            outputs.append(h)
        return torch.stack(outputs)

    return run


def packed(layer: Any, lengths: Tensor, T: int) -> Call:
    def run(x: Tensor) -> Tensor:
        y, _ = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(y, total_length=T)[0]

    return run


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    with torch.no_grad():
        for weight, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            weight.copy_(other)


def resets(cell: str, shape: Shape) -> Comparison:
    torch.manual_seed(0)
    theirs, ours = CELLS[cell]
    step, layer = theirs(shape.I, shape.H), ours(shape.I, shape.H)
    same_weights(layer, step)
    reset = torch.rand(shape.T, shape.B) < SHARE
    exact = copy.deepcopy(step).double()
    return Comparison(
        f"{cell} resets {shape}",
        Subject(lambda x: layer(x, reset=reset)[0], list(layer.parameters())),
        Subject(loop_over_cells(step, reset), list(step.parameters())),
        Subject(loop_over_cells(exact, reset), list(exact.parameters())),
        RESET_TARGETS[shape],
    )


def lengths(cell: str, shape: Shape) -> Comparison:
    torch.manual_seed(0)
    layer = CELLS[cell][1](shape.I, shape.H)
    exact = getattr(nn, cell.upper())(shape.I, shape.H).double()
    same_weights(exact, layer)
    ends = torch.randint(SHORTEST, shape.T + 1, (shape.B,))
    weights = list(layer.parameters())
    return Comparison(
        f"{cell} lengths {shape}",
        Subject(lambda x: layer(x, lengths=ends)[0], weights),
        Subject(packed(layer, ends, shape.T), weights),
        Subject(packed(exact, ends, shape.T), list(exact.parameters())),
        LENGTHS_TARGET,
    )


def verified(comparison: Comparison, x: Tensor, dy: Tensor) -> None:
    """Raise unless our error is within the budget that the other way's gives."""
    _, ours, theirs, exact, _ = comparison
    names = ("y", "dx", *(f"dweight{k}" for k in range(len(ours.weights))))
    found, plain = (Results(names, s.gradients(x, dy)) for s in (ours, theirs))
    right = Results(names, exact.gradients(x.detach().double().requires_grad_(), dy.double()))
    T, B, I = x.shape
    compare(found, plain, right, max(T * B, I + dy.shape[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each subject")
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    print(f"{cpu_name()}, {torch.get_num_threads()} threads; ms a training step, best")
    print(f"{'':<30}{'ours':>9}{'loop or packed':>16}{'ratio':>7}{'target':>8}")
    met = True
    for cell in options.cell:
        cases = [(resets, shape) for shape in RESET_TARGETS] + [(lengths, VARIANT_SHAPE)]
        for make, shape in cases:
            comparison = make(cell, shape)
            x = torch.randn(shape.T, shape.B, shape.I, requires_grad=True)
            dy = torch.randn(shape.T, shape.B, shape.H)
            verified(comparison, x, dy)
            subjects = {
                "ours": functools.partial(comparison.ours.gradients, x, dy),
                "theirs": functools.partial(comparison.theirs.gradients, x, dy),
            }
            ours, theirs = alternate(subjects, options.seconds).values()
            ratio = theirs.best / ours.best
            met &= ratio >= comparison.target
            disturbed = "  (disturbed)" if ours.others > DISTURBANCE else ""
            print(
                f"{comparison.name:<30}{ours.best * 1e3:>9.2f}{theirs.best * 1e3:>16.2f}"
                f"{ratio:>7.2f}{comparison.target:>8.2f}{disturbed}"
            )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
