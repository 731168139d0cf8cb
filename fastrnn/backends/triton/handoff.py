"""How programs that run at the same time tell each other that their parts are there."""

from __future__ import annotations

import triton
import triton.language as tl

# About a second of polling an L2 counter: a grid that is resident needs microseconds.
SPINS = tl.constexpr(1 << 20)
# From one counter to the next: each has a cache line of its own.
APART = tl.constexpr(32)


@triton.jit
def counter_of_rows(arrived):
    """The counter that this program shares with those of its group and its rows."""
    return arrived + (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * APART


@triton.jit
def announce(arrived):
    """Tell the programs of the same rows that this one's part is in global memory."""
    if arrived is not None:
        tl.debug_barrier()  # all threads have stored when one of them releases
        tl.atomic_add(arrived, 1, sem="release", scope="gpu")


@triton.jit
def await_parts(arrived, parts, came):
    """Wait for `parts` announcements; False if they did not come, which then shows as NaN. Who has
    waited in vain once, `came` being False, does not wait again."""
    if arrived is not None:
        seen = tl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
        spins = 0
        while (seen < parts) & (spins < SPINS) & came:
            seen = tl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
            spins += 1
        tl.debug_barrier()
        came = came & (seen >= parts)
    return came
