"""Time fastrnn against torch.nn on this machine, in turn, and print a short table.

The numbers are the best milliseconds of a call and the quotient of the two. A layer whose output
is further from float64 than the budget allows has no time.
"""

from __future__ import annotations

import argparse
import copy
import functools
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..convert import convert
from ..timing import Others, Subject, alternate
from ..validation import TORCH_LAYERS, WrongResultError, assert_within_budget
from .options import DTYPES, add_selection

MODES = ("inference", "training")


class Shape(NamedTuple):
    """T timesteps, B rows, I inputs and H hidden units."""

    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


SHAPES = (Shape(1, 1, 256, 256), Shape(100, 1, 128, 128), Shape(100, 32, 256, 256))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    parser.set_defaults(cell=["lstm", "gru", "rnn_tanh"], dtype=["float32", "bfloat16"])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument(
        "--shape", nargs="+", type=_shape, default=SHAPES, metavar="T,B,I,H", help="of the layers"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="for each layer (default: %(default)s)"
    )


def _shape(text: str) -> Shape:
    return Shape(*map(int, text.split(",")))


def run(options: argparse.Namespace) -> int:
    wrong, others = 0, Others()
    print(f"{'device':<8}{'cell':<10}{'dtype':<10}{'mode':<11}{'T,B,I,H':<16}", end="")
    print(f"{'torch.nn':>10}{'fastrnn':>10}{'ratio':>7}")
    choices = (options.device, options.cell, options.dtype, options.mode, options.shape)
    for device, cell, dtype, mode, shape in product(*choices):
        head = f"{device!s:<8}{cell:<10}{dtype:<10}{mode:<11}{shape!s:<16}"
        pair = Pair(cell, shape, DTYPES[dtype], device)
        try:
            pair.check()
        except WrongResultError as error:
            print(f"{head}  WRONG: {error}")
            wrong += 1
            continue
        timings = alternate(pair.subjects(mode == "training"), options.seconds)
        theirs, ours = (timings[name].best * 1e3 for name in ("torch.nn", "fastrnn"))
        print(f"{head}{theirs:>10.3f}{ours:>10.3f}{theirs / ours:>7.2f}", flush=True)
    if (complaint := others.complaint("measure")) is not None:
        print(complaint)
    return 1 if wrong else 0


class Pair:
    """torch.nn's layer and ours with the same weights, and one input."""

    def __init__(self, cell: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.shape, self.dtype = shape, dtype
        self.theirs: nn.RNNBase = TORCH_LAYERS[cell](shape.I, shape.H).to(device, dtype)
        self.ours = convert(copy.deepcopy(self.theirs))
        self.x = torch.randn(shape.T, shape.B, shape.I).to(device, dtype)
        self.dy = torch.randn(shape.T, shape.B, shape.H).to(device, dtype)

    def check(self) -> None:
        """Raise WrongResultError if our output is not within the budget."""
        double = copy.deepcopy(self.theirs).double()
        with torch.no_grad():
            ours, plain = ({"y": layer(self.x)[0]} for layer in (self.ours, self.theirs))
            exact: dict[str, Tensor] = {"y": double(self.x.double())[0]}
        assert_within_budget(ours, plain, exact, self.dtype, self.shape.I + self.shape.H)

    def subjects(self, training: bool) -> dict[str, Subject]:
        """What is timed: forward, or forward and all gradients; on a GPU until they are there."""
        layers = {"torch.nn": self.theirs, "fastrnn": self.ours}
        call = self._train if training else self._infer
        return {name: functools.partial(call, layer) for name, layer in layers.items()}

    def _infer(self, layer: nn.Module) -> None:
        with torch.inference_mode():
            layer(self.x)
        self._wait()

    def _train(self, layer: nn.Module) -> None:
        x = self.x.detach().requires_grad_()
        torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], self.dy)
        self._wait()

    def _wait(self) -> None:
        if self.x.device.type != "cpu":
            torch.cuda.synchronize(self.x.device)
