"""A recurrent policy that has to remember, trained on sequences with episode ends inside them.

    python examples/recurrent_policy.py --cell gru

At the first step of an episode one of a few signs is shown; after a random delay, in which nothing
is seen, the policy is asked for it, is paid 1 if it acts out the right sign, and the next episode
begins. Rows of a batch are at different points of different episodes, so that every rollout is full
of episode ends: ``layer(x, hx, reset=begins)`` starts them from zeros, in the update as in the
rollout, where :func:`fastrnn.stream` acts step by step.

The update is REINFORCE with a learned baseline (Williams 1992; the loss of A2C, Mnih et al. 2016,
with returns to the episode's end). At the end the update is timed against the loop over torch.nn's
cells with ``(1 - done) * state`` that it replaces, which gives the same gradients.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastrnn

SIGNS = 4
DELAY = (2, 12)  # steps between the sign and the question, both included
CELLS = {"lstm": (fastrnn.LSTM, nn.LSTMCell), "gru": (fastrnn.GRU, nn.GRUCell)}
LAST = 10  # updates whose mean reward is reported


class Recall:
    """The environment, for B rows at once. What is seen is one-hot: a sign, nothing, a question."""

    width = SIGNS + 2

    def __init__(self, rows: int) -> None:
        self.sign = torch.zeros(rows, dtype=torch.long)
        self.left = torch.zeros(rows, dtype=torch.long)
        self.begin(torch.ones(rows, dtype=torch.bool))

    def begin(self, where: Tensor) -> None:
        self.begins = where
        rows = len(where)
        self.sign = torch.where(where, torch.randint(SIGNS, (rows,)), self.sign)
        delay = torch.randint(DELAY[0], DELAY[1] + 1, (rows,))
        self.left = torch.where(where, delay, self.left - 1)

    def see(self) -> Tensor:
        """[B, width]"""
        nothing, question = SIGNS, SIGNS + 1
        seen = torch.where(self.left == 0, question, nothing)
        return nn.functional.one_hot(torch.where(self.begins, self.sign, seen), self.width).float()

    def act(self, action: Tensor) -> Tensor:
        """The rewards [B]; goes on to the next step."""
        asked = self.left == 0
        reward = (asked & (action == self.sign)).float()
        self.begin(asked)
        return reward


Categorical: Any = torch.distributions.Categorical  # torch has no types for it


class Rollout(NamedTuple):
    """T steps of B rows."""

    x: Tensor  # [T, B, width]
    begins: Tensor  # bool [T, B]
    actions: Tensor  # [T, B]
    rewards: Tensor  # [T, B]
    hx: Any  # states before the first step

    def returns(self) -> Tensor:
        """[T, B]: what the rest of each episode pays, as far as the rollout shows it."""
        found = torch.zeros_like(self.rewards)
        following = torch.zeros_like(self.rewards[0])
        for t in reversed(range(len(found))):
            found[t] = following + self.rewards[t]
            following = torch.where(self.begins[t], 0, found[t])
        return found

    def paid(self) -> float:
        """The share of questions that were answered rightly."""
        asked = (self.x[..., -1] > 0).sum()
        return float(self.rewards.sum() / asked.clamp(min=1))


class Policy(nn.Module):
    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.recurrent = CELLS[cell][0](Recall.width, hidden)
        self.head = nn.Linear(hidden, SIGNS + 1)  # logits of the actions, and the value

    def forward(self, x: Tensor, hx: Any, begins: Tensor) -> tuple[Tensor, Tensor]:
        """[T, B, width] -> logits [T, B, SIGNS] and values [T, B]."""
        y, _ = self.recurrent(x, hx, reset=begins)
        return self.read(y)

    def read(self, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.head(y)
        return out[..., :SIGNS], out[..., SIGNS]


class LoopPolicy(nn.Module):
    """The same policy as it has to be written over torch.nn's cells."""

    def __init__(self, policy: Policy, cell: str) -> None:
        super().__init__()
        layer = policy.recurrent
        self.cell = CELLS[cell][1](layer.input_size, layer.hidden_size)
        self.head = policy.head
        state = {name.removesuffix("_l0"): w for name, w in layer.state_dict().items()}
        self.cell.load_state_dict(state)

    def forward(self, x: Tensor, hx: Any, begins: Tensor) -> tuple[Tensor, Tensor]:
        states = tuple(s[0] for s in (hx if isinstance(hx, tuple) else (hx,)))
        going_on = 1 - begins.float().unsqueeze(-1)
        outputs = []
        for t in range(len(x)):
            states = tuple(going_on[t] * s for s in states)
            found = self.cell(x[t], states if len(states) > 1 else states[0])
            states = found if isinstance(found, tuple) else (found,)
            outputs.append(states[0])
        out = self.head(torch.stack(outputs))
        return out[..., :SIGNS], out[..., SIGNS]


def roll_out(policy: Policy, stream: Any, world: Recall, steps: int) -> Rollout:
    """Act for some steps. The stream carries the states from rollout to rollout."""
    hx = stream.states
    seen, begun, acted, paid = [], [], [], []
    with torch.no_grad():
        for _ in range(steps):
            now, new = world.see(), world.begins
            stream.reset(new)
            logits, _ = policy.read(stream(now))
            action = Categorical(logits=logits).sample()
            seen.append(now)
            begun.append(new)
            acted.append(action)
            paid.append(world.act(action))
    x, begins, actions, rewards = (torch.stack(part) for part in (seen, begun, acted, paid))
    return Rollout(x, begins, actions, rewards, hx)


def loss_of(policy: nn.Module, rollout: Rollout, entropy_weight: float = 0.01) -> Tensor:
    logits, values = policy(rollout.x, rollout.hx, rollout.begins)
    chosen = Categorical(logits=logits)
    returns = rollout.returns()
    advantage = (returns - values).detach()
    policy_loss = -(advantage * chosen.log_prob(rollout.actions)).mean()
    value_loss = (returns - values).square().mean()
    loss: Tensor = policy_loss + 0.5 * value_loss - entropy_weight * chosen.entropy().mean()
    return loss


def gradients(policy: nn.Module, rollout: Rollout) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(policy, rollout), list(policy.parameters())))


def compare(policy: Policy, cell: str, rollout: Rollout, repeats: int) -> tuple[float, float]:
    """Best seconds of an update by reset= and by the loop, in turn, after checking both agree."""
    loop = LoopPolicy(policy, cell)
    ours = dict(
        zip((n for n, _ in policy.named_parameters()), gradients(policy, rollout), strict=True)
    )
    theirs = gradients(loop, rollout)
    for (name, _), expected in zip(loop.named_parameters(), theirs, strict=True):
        own = name if name in ours else f"recurrent.{name.removeprefix('cell.')}_l0"
        torch.testing.assert_close(ours[own], expected, rtol=1e-3, atol=1e-5)
    taken: dict[nn.Module, list[float]] = {policy: [], loop: []}
    for _ in range(repeats):
        for subject, seconds in taken.items():
            start = time.perf_counter()
            gradients(subject, rollout)
            seconds.append(time.perf_counter() - start)
    return min(taken[policy]), min(taken[loop])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--cell", choices=CELLS, default="gru")
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--rows", type=int, default=64, help="episodes that run side by side")
    parser.add_argument("--steps", type=int, default=64, help="steps of a rollout")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="of the timed update")
    parser.add_argument(
        "--threads", type=int, default=1, help="so small a network gains by no more"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    policy = Policy(options.cell, options.hidden)
    optimizer = torch.optim.Adam(policy.parameters(), 5e-3)
    world, stream = Recall(options.rows), fastrnn.stream(policy.recurrent, options.rows)
    print(f"{options.cell}, chance would be paid {1 / SIGNS:.2f} a question")
    paid: list[float] = []
    start = time.perf_counter()
    for update in range(1, options.updates + 1):
        rollout = roll_out(policy, stream, world, options.steps)
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(policy, rollout))
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
        paid.append(rollout.paid())
        if update % 25 == 0:
            print(f"update {update:>4}: paid {statistics.mean(paid[-LAST:]):.2f} a question")
    print(f"{options.updates} updates in {time.perf_counter() - start:.1f} s")
    ours, loop = compare(policy, options.cell, rollout, options.repeats)
    print(
        f"an update ({options.steps} steps of {options.rows} rows): {ours * 1e3:.1f} ms by reset=, "
        f"{loop * 1e3:.1f} ms by the loop over torch.nn's cells: {loop / ours:.1f} times as fast"
    )
    first, last = statistics.mean(paid[:LAST]), statistics.mean(paid[-LAST:])
    print(f"paid {first:.2f} a question at first, {last:.2f} at last")
    return 0 if last > first else 1


if __name__ == "__main__":
    sys.exit(main())
