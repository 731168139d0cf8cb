"""A model of how the CUDA kernels' blocks hand operands to each other (csrc/cuda/exchange.h),
explored over every order of its steps: nobody waits for ever, and nobody reads a buffer that is not
what the reader thinks. BrokenError variants of the protocol are caught.

A block's step, for operand number o: wait until all blocks have published o; read all of buffer
o % 2; (all its warps have read); write its part of operand o + 1 into buffer (o + 1) % 2; publish.
Reading and writing go part by part, each a step that others may come between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest


@dataclasses.dataclass(frozen=True)
class Protocol:
    blocks: int
    steps: int
    buffers: int = 2
    wait: bool = True  # for the others, before reading
    publish_after_write: bool = True
    counters: int = 1 << 32  # flags wrap around at this

    def published(self, operand: int) -> int:
        return (operand + 1) % self.counters


# A block: its operand, what it does next, and how many parts it has read of that operand.
Block = tuple[int, str, int]
# The blocks, all flags, and the operand number that each part of each buffer holds.
State = tuple[tuple[Block, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]


class BrokenError(Exception):
    pass


def start(protocol: Protocol) -> State:
    """Every block has yet to publish operand 0."""
    n = protocol.blocks
    return (((-1, "write", 0),) * n, (0,) * n, ((-1,) * n,) * protocol.buffers)


def successors(protocol: Protocol, state: State) -> Iterator[State]:
    blocks, flags, memory = state
    n = protocol.blocks
    for i, (operand, doing, part) in enumerate(blocks):
        new_flags, new_memory = flags, memory
        if doing == "done":
            continue
        if doing == "wait":
            ready = flags[part] >= protocol.published(operand)
            if protocol.wait and not ready:
                continue
            after = (operand, "wait", part + 1) if part + 1 < n else (operand, "read", 0)
        elif doing == "read":
            held = memory[operand % protocol.buffers][part]
            if held != operand:
                raise BrokenError(f"block {i} reads {held} of block {part} for {operand}")
            after = (operand, "read", part + 1) if part + 1 < n else (operand, "write", 0)
            if part + 1 == n and operand == protocol.steps:
                after = (operand, "done", 0)
        else:
            early = not protocol.publish_after_write
            if (doing == "write") != early:
                buffer = (operand + 1) % protocol.buffers
                rows = list(memory)
                rows[buffer] = (*rows[buffer][:i], operand + 1, *rows[buffer][i + 1 :])
                new_memory = tuple(rows)
            else:
                new_flags = (*flags[:i], protocol.published(operand + 1), *flags[i + 1 :])
            last = doing == "publish"
            after = (operand + 1, "wait", 0) if last else (operand, "publish", 0)
        yield (*blocks[:i], after, *blocks[i + 1 :]), new_flags, new_memory


def explore(protocol: Protocol) -> int:
    """Visit every state that can be reached; BrokenError on a wrong read or when all are stuck."""
    seen = {start(protocol)}
    stack = list(seen)
    while stack:
        state = stack.pop()
        following = list(successors(protocol, state))
        if not following and any(doing != "done" for _, doing, _ in state[0]):
            raise BrokenError("everybody waits")
        fresh = [s for s in following if s not in seen]
        seen.update(fresh)
        stack += fresh
    return len(seen)


@pytest.mark.parametrize(("blocks", "steps"), [(1, 6), (2, 6), (3, 3)])
def test_no_order_of_steps_breaks_it(blocks: int, steps: int) -> None:
    assert explore(Protocol(blocks, steps)) > blocks * steps


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"buffers": 1}, "reads"),
        ({"wait": False}, "reads"),
        ({"publish_after_write": False}, "reads"),
        ({"counters": 4}, "everybody waits|reads"),
    ],
    ids=str,
)
def test_what_the_kernels_rely_on_is_needed(change: dict[str, int], what: str) -> None:
    """One buffer, no wait, a flag before its data, flags too narrow to count all steps."""
    with pytest.raises(BrokenError, match=what):
        explore(Protocol(2, 6, **change))
