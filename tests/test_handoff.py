"""Models of how the CUDA kernels' blocks hand operands to each other (csrc/cuda/exchange.h),
explored over every order of their steps: nobody waits for ever, and nobody reads a buffer that is
not what the reader thinks. Broken variants of the protocols are caught.

A block's step, for operand number o: wait until all blocks have published o; read all of buffer
o % 2; (all its warps have read); write its part of operand o + 1 into buffer (o + 1) % 2; publish.
Reading and writing go part by part, each a step that others may come between. In a grid there is
one copy of the buffers, with a flag for each block that counts what it published; in a cluster each
block has a copy, with a barrier for each buffer that knows the parity of its phase, which ends when
its block has told it what to expect and all parts have come, in either order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest


class BrokenError(Exception):
    pass


# Hashable. Of a block it has its operand, what it does next, and to which part of it.
State = Any


@dataclasses.dataclass(frozen=True)
class Grid:
    """A state: the blocks, all flags, and the operand number in each part of each buffer."""

    blocks: int
    steps: int
    buffers: int = 2
    wait: bool = True  # for the others, before reading
    publish_after_write: bool = True
    counters: int = 1 << 32  # flags wrap around at this

    def published(self, operand: int) -> int:
        return (operand + 1) % self.counters

    def start(self) -> State:
        n = self.blocks
        return (((-1, "write", 0),) * n, (0,) * n, ((-1,) * n,) * self.buffers)

    def successors(self, state: State) -> Iterator[State]:
        blocks, flags, memory = state
        n = self.blocks
        for i, (operand, doing, part) in enumerate(blocks):
            new_flags, new_memory = flags, memory
            if doing == "done":
                continue
            if doing == "wait":
                ready = flags[part] >= self.published(operand)
                if self.wait and not ready:
                    continue
                after = (operand, "wait", part + 1) if part + 1 < n else (operand, "read", 0)
            elif doing == "read":
                held = memory[operand % self.buffers][part]
                if held != operand:
                    raise BrokenError(f"block {i} reads {held} of block {part} for {operand}")
                after = (operand, "read", part + 1) if part + 1 < n else (operand, "write", 0)
                if part + 1 == n and operand == self.steps:
                    after = (operand, "done", 0)
            else:
                early = not self.publish_after_write
                if (doing == "write") != early:
                    buffer = (operand + 1) % self.buffers
                    row = _replaced(memory[buffer], i, operand + 1)
                    new_memory = _replaced(memory, buffer, row)
                else:
                    new_flags = _replaced(flags, i, self.published(operand + 1))
                last = doing == "publish"
                after = (operand + 1, "wait", 0) if last else (operand, "publish", 0)
            yield _replaced(blocks, i, after), new_flags, new_memory


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A state: the blocks; of each block and buffer its barrier, (whether it has been told what to
    expect, the parts that have come, phase); and of each block the operand number in each part of
    each of its buffers."""

    blocks: int
    steps: int
    buffers: int = 2
    wait: bool = True
    expect: bool = True  # again after each phase
    data_with_news: bool = True  # a part is there when the barrier hears of it
    missing: int = 0  # parts that a barrier does not ask for

    def start(self) -> State:
        n, buffers = self.blocks, self.buffers
        return (
            ((-1, "send", 0),) * n,
            (((True, 0, 0),) * buffers,) * n,
            (((-1,) * n,) * buffers,) * n,
        )

    def settled(self, told: bool, came: int, phase: int) -> tuple[bool, int, int]:
        done = told and came == self.blocks - self.missing
        return (False, 0, phase + 1) if done else (told, came, phase)

    def successors(self, state: State) -> Iterator[State]:
        blocks, barriers, memory = state
        n = self.blocks
        for i, (operand, doing, part) in enumerate(blocks):
            new_barriers, new_memory = barriers, memory
            if doing == "done":
                continue
            if doing == "wait":
                _, _, phase = barriers[i][operand % self.buffers]
                if self.wait and phase % 2 == operand // self.buffers % 2:
                    continue
                after = (operand, "expect", 0)
            elif doing == "expect":
                buffer = operand % self.buffers
                told, came, phase = barriers[i][buffer]
                if told:
                    raise BrokenError(f"block {i} tells a barrier twice what to expect")
                barrier = self.settled(self.expect, came, phase)
                new_barriers = _replaced(barriers, i, _replaced(barriers[i], buffer, barrier))
                after = (operand, "read", 0)
            elif doing == "read":
                held = memory[i][operand % self.buffers][part]
                if held != operand:
                    raise BrokenError(f"block {i} reads {held} of block {part} for {operand}")
                after = (operand, "read", part + 1) if part + 1 < n else (operand, "send", 0)
                if part + 1 == n and operand == self.steps:
                    after = (operand, "done", 0)
            else:  # to each block in turn
                buffer = (operand + 1) % self.buffers
                if doing == "send":
                    told, came, phase = barriers[part][buffer]
                    barrier = self.settled(told, came + 1, phase)
                    own = _replaced(barriers[part], buffer, barrier)
                    new_barriers = _replaced(barriers, part, own)
                if doing == "late" or self.data_with_news:
                    row = _replaced(memory[part][buffer], i, operand + 1)
                    new_memory = _replaced(memory, part, _replaced(memory[part], buffer, row))
                after = (operand, doing, part + 1)
                if part + 1 == n:
                    sent = doing == "late" or self.data_with_news
                    after = (operand + 1, "wait", 0) if sent else (operand, "late", 0)
            yield _replaced(blocks, i, after), new_barriers, new_memory


def _replaced(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])


def explore(protocol: Grid | Cluster) -> int:
    """Visit every state that can be reached; BrokenError on a wrong read or when all are stuck."""
    seen = {protocol.start()}
    stack = list(seen)
    while stack:
        state = stack.pop()
        following = list(protocol.successors(state))
        if not following and any(doing != "done" for _, doing, _ in state[0]):
            raise BrokenError("everybody waits")
        fresh = [s for s in following if s not in seen]
        seen.update(fresh)
        stack += fresh
    return len(seen)


@pytest.mark.parametrize(
    "protocol",
    [Grid(1, 6), Grid(2, 6), Grid(3, 3), Cluster(1, 6), Cluster(2, 6), Cluster(3, 2)],
    ids=str,
)
def test_no_order_of_steps_breaks_it(protocol: Grid | Cluster) -> None:
    assert explore(protocol) > protocol.blocks * protocol.steps


@pytest.mark.parametrize(
    ("protocol", "what"),
    [
        (Grid(2, 6, buffers=1), "reads"),
        (Grid(2, 6, wait=False), "reads"),
        (Grid(2, 6, publish_after_write=False), "reads"),
        (Grid(2, 6, counters=4), "everybody waits|reads"),
        (Cluster(2, 6, buffers=1), "reads"),
        (Cluster(2, 6, wait=False), "reads|twice"),
        (Cluster(2, 6, expect=False), "everybody waits"),
        (Cluster(2, 6, data_with_news=False), "reads"),
        (Cluster(2, 6, missing=1), "reads"),
    ],
    ids=str,
)
def test_what_the_kernels_rely_on_is_needed(protocol: Grid | Cluster, what: str) -> None:
    """One buffer, no wait, news before the data, flags too narrow to count all steps, a barrier
    that is not told what to expect, or too little of it."""
    with pytest.raises(BrokenError, match=what):
        explore(protocol)
