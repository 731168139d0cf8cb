"""Gradients in float32 over many rows: the error of a layer's, over that of torch.nn's.

Both are measured against torch.nn in double precision, as the norm of the difference over that of
the gradient. What torch.nn gets right by luck, to half a unit in the last place, counts as that."""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

import fastrnn
from benchmarks.shapes import CELLS, Shape
from fastrnn.cores import usable_cores
from fastrnn.machine import cpu_name
from fastrnn.validation.budget import FACTOR

ROWS = {10**3: (20, 50), 10**4: (100, 100), 10**5: (200, 500), 10**6: (1000, 1000)}  # T and B
UNITS = 16
DEEP = Shape(4, 64, 2048, 2048)
LAYERS = {
    "lstm": (nn.LSTM, fastrnn.LSTM),
    "gru": (nn.GRU, fastrnn.GRU),
    "rnn_tanh": (nn.RNN, fastrnn.RNN),
}
NAMES = ("dx", "dW_ih", "dW_hh", "db_ih", "db_hh")
Gradients = list[Tensor]  # as NAMES has them


def gradients(layer: nn.RNNBase, x: Tensor, weights: Tensor) -> Gradients:
    """Those of a loss that weighs every unit alike in all rows, as the mean of a batch does."""
    x = x.to(next(layer.parameters()).dtype).requires_grad_()
    loss = (layer(x)[0] * weights.to(x.dtype)).sum()
    return list(torch.autograd.grad(loss, [x, *layer.parameters()]))


def errors(found: Gradients, exact: Gradients) -> list[float]:
    return [
        float((ours.double() - right).norm() / right.norm())
        for ours, right in zip(found, exact, strict=True)
    ]


def quotients(cell: str, shape: Shape) -> list[float]:
    """Our error over torch.nn's, by gradient."""
    torch.manual_seed(0)
    theirs, ours = (make(shape.I, shape.H) for make in LAYERS[cell])
    ours.load_state_dict(theirs.state_dict())
    right = LAYERS[cell][0](shape.I, shape.H).double()
    right.load_state_dict(theirs.state_dict())
    x, weights = torch.randn(shape.T, shape.B, shape.I), torch.randn(shape.H)
    exact = gradients(right, x, weights)
    found, plain = (errors(gradients(layer, x, weights), exact) for layer in (ours, theirs))
    half = torch.finfo(torch.float32).eps / 2
    return [our / max(their, half) for our, their in zip(found, plain, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--rows", nargs="+", type=int, choices=ROWS, default=list(ROWS))
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    print(f"{cpu_name()}, {torch.get_num_threads()} threads; our error over torch.nn's")
    print(f"{'':<30}" + "".join(f"{name:>8}" for name in NAMES))
    shapes = [Shape(*ROWS[rows], UNITS, UNITS) for rows in options.rows] + [DEEP]
    met = True
    for cell in options.cell:
        for shape in shapes:
            found = quotients(cell, shape)
            met &= max(found) <= FACTOR
            print(f"{f'{cell} {shape}':<30}" + "".join(f"{q:>8.2f}" for q in found), flush=True)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
