"""The recurrent products: tiles of W_hh with what the programs of the same rows made.

A tensor core's product has 16 rows for each warp, of which a grid's low tiles have too few: all
warps would do the same work. And what each gate's product leaves in its own layout would be
converted apart. Therefore `JOINED` gates have one product, three as four of which one is zeros.
Forward the gates have the right factor in common: those of a unit are rows below one another of the
left one, [4 BU, BK]. Backward they have the sum in common: [4, BU, BK] times [4, BK, BB], a gate
for each warp, added up in the end. With `JOINED` 1 every gate has a product of its own."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import relaid


@triton.jit
def factor(tile, PRECISION: tl.constexpr):
    """A product's factor, rounded to TF32 where the tensor cores would cut it off to that."""
    if PRECISION == "tf32" and tile.dtype == tl.float32:
        bits = tile.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        tile = tl.where(tile == tile, rounded, tile)
    return tile


@triton.jit
def _exchanged(at, mask):
    """What other programs wrote: from L2, as this SM's L1 may have an older value."""
    return tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _empty(came, M: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr):
    """Sums to add to: NaN in a program that waited in vain, whose factors are not there."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.where(came, tl.zeros((M, N), tl.float32), float("nan")),)
    return sums


@triton.jit
def _weights(
    w_hh,
    first,
    k,
    H,
    BU: tl.constexpr,
    BK: tl.constexpr,
    GATES: tl.constexpr,
    JOINED: tl.constexpr,
    BEHIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The columns k of W_hh for the units from `first` on, a tile for each product."""
    m = tl.arange(0, JOINED * BU)
    if BEHIND:
        within, u = m // BU, first + m % BU
    else:
        within, u = m % JOINED, first + m // JOINED
    tiles = ()
    for at_gate in tl.static_range(0, GATES, JOINED):
        gate = at_gate + within
        mask = ((u < H) & (gate < GATES))[:, None] & (k < H)[None, :]
        at = (gate * H + u).to(tl.int64)[:, None] * H + k[None, :]
        tile = factor(tl.load(w_hh + at, mask=mask, other=0.0), PRECISION)
        if BEHIND and JOINED > 1:
            tile = tl.reshape(tile, (JOINED, BU, BK))
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def hold(
    w_hh,
    first,
    H,
    BU: tl.constexpr,
    BK: tl.constexpr,
    CHUNKS: tl.constexpr,
    GATES: tl.constexpr,
    JOINED: tl.constexpr,
    BEHIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The program's part of W_hh [GATES*H, H], or, its gates `BEHIND` one another, of the gates'
    transposes: the tiles of all chunks of `BK` columns."""
    held = ()
    for chunk in tl.static_range(CHUNKS):
        k = chunk * BK + tl.arange(0, BK)
        held = held + _weights(w_hh, first, k, H, BU, BK, GATES, JOINED, BEHIND, PRECISION)
    return held


@triton.jit
def add_products(
    sums, tiles, operand, FIRST: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr
):
    """`sums` and the products of `COUNT` tiles, from `FIRST` on, with one right factor."""
    operand = factor(operand, PRECISION)
    added = ()
    for p in tl.static_range(COUNT):
        tile = tiles[FIRST + p]
        added = added + (tl.dot(tile, operand, sums[p], input_precision=PRECISION),)
    return added


@triton.jit
def gates_of(sums, BU: tl.constexpr, BB: tl.constexpr, GATES: tl.constexpr, JOINED: tl.constexpr):
    """Each gate's tile [BU, BB] from the sums of the products forward."""
    if JOINED == 1:
        gates = ()
        for gate in tl.static_range(GATES):
            gates = gates + (relaid(sums[gate], BU, BB),)
        return gates
    else:
        # Rows are u * 4 + gate. The gates leave the product's layout as `relaid` tiles do.
        pairs = tl.permute(tl.reshape(sums[0], (BU, 2, 2, BB)), (0, 3, 2, 1))
        low, high = tl.split(pairs)
        gates = tl.split(low)
        third, fourth = tl.split(high)
        return gates + ((third, fourth) if GATES > 3 else (third,))


@triton.jit
def product_forward(
    w_hh,
    held,
    exchange,
    b,
    B,
    first,
    H,
    came,
    BU: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HELD: tl.constexpr,
    GATES: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_hh h of every gate, h coming from `exchange` [B, H]."""
    COUNT: tl.constexpr = 1 if JOINED > 1 else GATES
    sums = _empty(came, JOINED * BU, BB, COUNT)
    if HELD:
        # A chunk is on its way while the one before multiplies; all at once would spill.
        h = _h(exchange, b, B, 0, H, BK)
        for chunk in tl.static_range(CHUNKS):
            h_next = h
            if chunk + 1 < CHUNKS:
                h_next = _h(exchange, b, B, chunk + 1, H, BK)
            sums = add_products(sums, held, h, chunk * COUNT, COUNT, PRECISION)
            h = h_next
    else:
        for chunk in range(CHUNKS):
            h = _h(exchange, b, B, chunk, H, BK)
            k = chunk * BK + tl.arange(0, BK)
            tiles = _weights(w_hh, first, k, H, BU, BK, GATES, JOINED, False, PRECISION)
            sums = add_products(sums, tiles, h, 0, COUNT, PRECISION)
    return gates_of(sums, BU, BB, GATES, JOINED)


@triton.jit
def _h(exchange, b, B, chunk, H, BK: tl.constexpr):
    """Rows of h [B, H] as the right factor: [BK, BB]."""
    k = chunk * BK + tl.arange(0, BK)
    at = exchange + b.to(tl.int64)[None, :] * H + k[:, None]
    return _exchanged(at, (k < H)[:, None] & (b < B)[None, :])


@triton.jit
def product_backward(
    w_hh,
    held,
    dgates,
    row,
    width,
    known,
    first,
    H,
    came,
    BU: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HELD: tl.constexpr,
    GATES: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_hh^T dgates, summed over the gates; dgates [N, width] is read where `known`."""
    COUNT: tl.constexpr = 1 if JOINED > 1 else GATES
    if JOINED == 1:
        total = tl.zeros((BU, BB), tl.float32)
    else:
        total = tl.zeros((JOINED, BU, BB), tl.float32)
    if HELD:
        part = _dgates(dgates, row, width, known, 0, 0, H, BK, GATES, JOINED)
        for p in tl.static_range(CHUNKS * COUNT):
            part_next = part
            if p + 1 < CHUNKS * COUNT:
                part_next = _dgates(
                    dgates, row, width, known, (p + 1) % COUNT, (p + 1) // COUNT, H,
                    BK, GATES, JOINED,
                )  # fmt: skip
            total = tl.dot(held[p], factor(part, PRECISION), total, input_precision=PRECISION)
            part = part_next
    else:
        for chunk in range(CHUNKS):
            k = chunk * BK + tl.arange(0, BK)
            tiles = _weights(w_hh, first, k, H, BU, BK, GATES, JOINED, True, PRECISION)
            for p in tl.static_range(COUNT):
                part = _dgates(dgates, row, width, known, p, chunk, H, BK, GATES, JOINED)
                total = tl.dot(tiles[p], factor(part, PRECISION), total, input_precision=PRECISION)
    if JOINED > 1:
        total = tl.sum(total, 0)
    return tl.where(came, total, float("nan"))


@triton.jit
def _dgates(
    dgates,
    row,
    width,
    known,
    at_gate,
    chunk,
    H,
    BK: tl.constexpr,
    GATES: tl.constexpr,
    JOINED: tl.constexpr,
):
    """`JOINED` gates' gradients as the right factor: [JOINED, BK, BB], or [BK, BB] of one."""
    k = chunk * BK + tl.arange(0, BK)
    if JOINED == 1:
        at = dgates + row[None, :] * width + (at_gate * H + k)[:, None]
        mask = (k < H)[:, None] & known[None, :]
    else:
        gate = tl.arange(0, JOINED)[:, None, None]
        k = k[None, :, None]
        at = dgates + row[None, None, :] * width + (gate * H + k)
        mask = (gate < GATES) & (k < H) & known[None, None, :]
    return _exchanged(at, mask)
