"""A recurrent critic with a gradient penalty, which takes the derivative of a derivative.

    python examples/gradient_penalty.py --cell gru

The critic of a Wasserstein GAN tells real sequences from false ones and must not change faster
than its input does: training pulls the norm of its gradient, at points between the two kinds,
towards 1 (Gulrajani et al., Improved Training of Wasserstein GANs, 2017). Here the real sequences
are sine waves and the false ones are random walks. Two critics take turns, one with the penalty and
one without, whose gradient grows as training goes on. The program fails if the penalty does not
hold the norm near 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastrnn

CELLS: dict[str, Callable[[int, int], nn.RNNBase]] = {
    "lstm": fastrnn.LSTM,
    "gru": fastrnn.GRU,
    "rnn": fastrnn.RNN,
}
STEPS, BATCH, HIDDEN, WEIGHT = 24, 32, 32, 10.0
NEAR_ONE = (0.75, 1.25)


class Critic(nn.Module):
    """A score for each sequence of a batch [T, B, 1]."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.rnn = CELLS[cell](1, HIDDEN)
        self.score = nn.Linear(HIDDEN, 1)

    def forward(self, sequences: Tensor) -> Tensor:
        y, _ = self.rnn(sequences)
        scores: Tensor = self.score(y.mean(0)).squeeze(-1)
        return scores


def real() -> Tensor:
    phase, speed = torch.rand(2, BATCH)
    time = torch.arange(STEPS)[:, None] * (0.3 + 0.3 * speed)
    wave = torch.sin(time + 6.28 * phase)  # [T, B]
    return wave.unsqueeze(-1)


def false() -> Tensor:
    return torch.randn(STEPS, BATCH, 1).cumsum(0).mul(STEPS**-0.5)


def gradient_norms(critic: Critic, sequences: Tensor) -> Tensor:
    """Of each sequence's score by the sequence, [B]; differentiable."""
    sequences = sequences.detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(sequences).sum(), sequences, create_graph=True)
    norms: Tensor = torch.linalg.vector_norm(slope, dim=(0, 2))
    return norms


def train(critic: Critic, optimizer: torch.optim.Optimizer, weight: float) -> tuple[float, float]:
    """One step; the critic's gap between the two kinds, and the mean norm of its gradient."""
    right, wrong = real(), false()
    share = torch.rand(1, BATCH, 1)
    norms = gradient_norms(critic, share * right + (1 - share) * wrong)
    gap = critic(right).mean() - critic(wrong).mean()
    loss = weight * (norms - 1).square().mean() - gap
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return gap.item(), norms.mean().item()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cell", choices=CELLS, default="gru")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    critics = {"with penalty": Critic(options.cell), "without": Critic(options.cell)}
    optimizers = {name: torch.optim.Adam(c.parameters(), 5e-3) for name, c in critics.items()}
    norms: dict[str, list[float]] = {name: [] for name in critics}
    print(f"{'step':>5}" + "".join(f"{name:>16}: gap   |gradient|" for name in critics))
    for step in range(options.steps):
        line = f"{step:>5}"
        for name, critic in critics.items():
            weight = WEIGHT if name == "with penalty" else 0.0
            gap, norm = train(critic, optimizers[name], weight)
            norms[name].append(norm)
            line += f"{gap:>21.3f}{norm:>13.3f}"
        if step % 20 == 0 or step == options.steps - 1:
            print(line)
    last = {name: sum(found[-10:]) / len(found[-10:]) for name, found in norms.items()}
    low, high = NEAR_ONE
    held = low <= last["with penalty"] <= high
    print(f"the penalty {'held' if held else 'DID NOT HOLD'} the norm near 1: {last}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
