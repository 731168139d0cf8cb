"""Where steps lie in memory, and tuples of tiles [units, batch]."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of(t, b, B, offsets):
    """Row of step t of batch row b in tensors of [N, ...]."""
    if offsets is None:
        return t.to(tl.int64) * B + b
    else:
        return tl.load(offsets + t) + b


@triton.jit
def lengths_of(b, T, B, lengths):
    if lengths is None:
        return tl.where(b < B, T, 0)
    else:
        return tl.load(lengths + b, mask=b < B, other=0)


@triton.jit
def is_cut(t, b, B, backward, length, reset):
    """Whether a reset cuts the row before the step t, in the group's own direction: going forward
    reset[t] does, going backwards reset[t + 1]. There is no step T, and no cut before it."""
    at = t + backward
    return tl.load(reset + at.to(tl.int64) * B + b, mask=at < length, other=0) != 0


@triton.jit
def goes_backwards(backwards):
    """Bit g of `backwards` for this program's group g; past the last bit there is but its sign."""
    return ((backwards.to(tl.int64) >> tl.minimum(tl.program_id(2), 63)) & 1).to(tl.int32)


@triton.jit
def load_tiles(base, row, width, u, mask, H, COUNT: tl.constexpr):
    """`COUNT` tiles of float32 that lie side by side, H apart, in rows of [N, width]."""
    tiles = ()
    for k in tl.static_range(COUNT):
        at = base + row[None, :] * width + (k * H + u)[:, None]
        tiles = tiles + (tl.load(at, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def store_tiles(base, row, width, u, mask, H, tiles, COUNT: tl.constexpr):
    for k in tl.static_range(COUNT):
        at = base + row[None, :] * width + (k * H + u)[:, None]
        tl.store(at, tiles[k].to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_states(h, c, at, mask, STATES: tl.constexpr):
    states = (tl.load(h + at, mask=mask, other=0.0).to(tl.float32),)
    if STATES > 1:
        states = states + (tl.load(c + at, mask=mask, other=0.0).to(tl.float32),)
    return states


@triton.jit
def store_states(h, c, at, mask, states, STATES: tl.constexpr):
    tl.store(h + at, states[0], mask=mask)
    if STATES > 1:
        tl.store(c + at, states[1], mask=mask)


@triton.jit
def select(condition, yes, no, COUNT: tl.constexpr):
    tiles = ()
    for k in tl.static_range(COUNT):
        tiles = tiles + (tl.where(condition, yes[k], no[k]),)
    return tiles


@triton.jit
def zeros(H: tl.constexpr, W: tl.constexpr, COUNT: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((H, W), tl.float32),)
    return tiles


@triton.jit
def add_tiles(left, right, COUNT: tl.constexpr):
    tiles = ()
    for k in tl.static_range(COUNT):
        tiles = tiles + (left[k] + right[k],)
    return tiles


@triton.jit
def add_at(tiles, tile, AT: tl.constexpr, COUNT: tl.constexpr):
    """`tiles` with `tile` added to the one at `AT`."""
    sums = ()
    for k in tl.static_range(COUNT):
        sums = sums + (tiles[k] + tile if k == AT else tiles[k],)
    return sums


@triton.jit
def relaid(tile, BU: tl.constexpr, BB: tl.constexpr):
    """The same tile, taken apart and put together. Triton gives whatever is computed with a
    product's sum the layout in which tensor cores leave it, in which the threads of a narrow tile
    do the same work several times over; through here no layout passes."""
    low, high = tl.split(tl.permute(tl.reshape(tile, (BU // 2, 2, BB)), (0, 2, 1)))
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (BU, BB))
