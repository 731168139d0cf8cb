"""Per-sample gradients and ensembles through torch.func, over loops around the same layers."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import fastrnn
from fastrnn.timing import Subject, alternate

LAYERS: dict[str, Callable[[int, int], nn.RNNBase]] = {
    "lstm": fastrnn.LSTM,
    "gru": fastrnn.GRU,
    "rnn_tanh": fastrnn.RNN,
}
MEMBERS = 8
Params = dict[str, Tensor]


class Case(NamedTuple):
    """The loop's time over ours shall be at least `target`."""

    name: str
    shape: tuple[int, int, int, int]  # T, B, I, H
    target: float


CASES = [
    Case("samples", (50, 8, 128, 128), 2.0),
    Case("members", (50, 8, 128, 128), 1.0),
    Case("members", (50, 1, 32, 32), 2.0),
    Case("members, own x", (50, 8, 128, 128), 1.0),
    Case("members, own x", (50, 1, 32, 32), 2.0),
]


def loss_of(y: Tensor) -> Tensor:
    return y.square().sum()


def gradients(module: nn.RNNBase, x: Tensor) -> list[Tensor]:
    """As a training step finds them, without any transform."""
    return list(torch.autograd.grad(loss_of(module(x)[0]), list(module.parameters())))


def by_member(stacked: Iterable[Tensor]) -> list[list[Tensor]]:
    return [list(kind) for kind in zip(*stacked, strict=True)]


def subjects_of(case: Case, cell: str) -> dict[str, Callable[[], list[Any]]]:
    """Both find the gradients of each parameter for each member. Per-sample gradients are wanted
    as one tensor; those of members may stay apart, as each may have its own optimizer."""
    T, B, I, H = case.shape
    modules = [LAYERS[cell](I, H) for _ in range(MEMBERS)]
    base = copy.deepcopy(modules[0]).to("meta")

    def loss(params: Params, x: Tensor) -> Tensor:
        return loss_of(functional_call(base, params, (x,))[0])

    params: Params = {}
    stacked: Params = {}
    if case.name == "samples":
        x = torch.randn(B, T, I)
        module = modules[0]
        params = {name: p.detach() for name, p in module.named_parameters()}
        each = [(module, sample.unsqueeze(1)) for sample in x]
        dims: tuple[int | None, int | None] = (None, 0)
    else:
        own = case.name == "members, own x"
        x = torch.randn(*[MEMBERS] * own, T, B, I)
        stacked, _ = stack_module_state(modules)
        each = [(m, x[k] if own else x) for k, m in enumerate(modules)]
        dims = (0, 0 if own else None)

    def looped() -> list[Any]:
        found = [gradients(module, mine) for module, mine in each]
        if case.name != "samples":
            return found
        return [torch.stack(kind) for kind in zip(*found, strict=True)]

    def mapped() -> list[Any]:
        if case.name == "samples":
            return list(vmap(grad(loss), dims)(params, x).values())
        leaves = list(stacked.values())
        return by_member(torch.autograd.grad(vmap(loss, dims)(stacked, x).sum(), leaves))

    return {"loop": looped, "vmap": mapped}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each side")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, ms, best of many; loop over vmap")
    print(f"{'':<10}{'':<16}{'(T,B,I,H)':<20}{'loop':>9}{'vmap':>9}{'ratio':>7}{'target':>8}")
    met = True
    for case in CASES:
        for cell in LAYERS:
            torch.manual_seed(0)
            subjects = subjects_of(case, cell)
            torch.testing.assert_close(*(run() for run in subjects.values()))
            timings = alternate(dict[str, Subject](subjects), options.seconds)
            loop, ours = (timings[name].best * 1e3 for name in ("loop", "vmap"))
            shape = "({},{},{},{})".format(*case.shape)
            row = f"{cell:<10}{case.name:<16}{shape:<20}{loop:>9.2f}{ours:>9.2f}"
            print(f"{row}{loop / ours:>7.2f}{case.target:>8.1f}", flush=True)
            met &= loop / ours >= case.target
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
