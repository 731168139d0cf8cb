"""The recurrent products: tiles of W_hh with what the programs of the same rows made."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import zeros


@triton.jit
def factor(tile, PRECISION: tl.constexpr):
    """A product's factor, rounded to TF32 where the tensor cores would cut it off to that."""
    if PRECISION == "tf32" and tile.dtype == tl.float32:
        bits = tile.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        tile = tl.where(tile == tile, rounded, tile)
    return tile


@triton.jit
def _weight(w_hh, gate, u, k, H, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """The tile [units u, k] of one gate of W_hh [gates*H, H], or of its transpose."""
    mask = (u < H)[:, None] & (k < H)[None, :]
    if TRANSPOSED:
        at = (gate * H + k).to(tl.int64)[None, :] * H + u[:, None]
    else:
        at = (gate * H + u).to(tl.int64)[:, None] * H + k[None, :]
    return factor(tl.load(w_hh + at, mask=mask, other=0.0), PRECISION)


@triton.jit
def hold(
    w_hh,
    u,
    H,
    BK: tl.constexpr,
    CHUNKS: tl.constexpr,
    GATES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The program's part of W_hh: for every gate its chunks of `BK` columns."""
    tiles = ()
    for gate in tl.static_range(GATES):
        for chunk in tl.static_range(CHUNKS):
            k = chunk * BK + tl.arange(0, BK)
            tiles = tiles + (_weight(w_hh, gate, u, k, H, TRANSPOSED, PRECISION),)
    return tiles


@triton.jit
def _exchanged(at, mask, came, PRECISION: tl.constexpr):
    """A factor that other programs wrote: from L2, as this SM's L1 may have an older one."""
    tile = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    return factor(tl.where(came, tile, float("nan")).to(tile.dtype), PRECISION)


@triton.jit
def product_forward(
    w_hh,
    held,
    exchange,
    b,
    B,
    u,
    H,
    came,
    BU: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HELD: tl.constexpr,
    GATES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_hh h of every gate, h coming from `exchange` [B, H]."""
    sums = zeros(BU, BB, GATES)
    rows = b.to(tl.int64)[None, :] * H
    if HELD:
        for chunk in tl.static_range(CHUNKS):
            k = chunk * BK + tl.arange(0, BK)
            there = (k < H)[:, None] & (b < B)[None, :]
            h = _exchanged(exchange + rows + k[:, None], there, came, PRECISION)
            added = ()
            for gate in tl.static_range(GATES):
                tile = held[gate * CHUNKS + chunk]
                added = added + (tl.dot(tile, h, sums[gate], input_precision=PRECISION),)
            sums = added
    else:
        for chunk in range(CHUNKS):
            k = chunk * BK + tl.arange(0, BK)
            there = (k < H)[:, None] & (b < B)[None, :]
            h = _exchanged(exchange + rows + k[:, None], there, came, PRECISION)
            added = ()
            for gate in tl.static_range(GATES):
                tile = _weight(w_hh, gate, u, k, H, False, PRECISION)
                added = added + (tl.dot(tile, h, sums[gate], input_precision=PRECISION),)
            sums = added
    return sums


@triton.jit
def product_backward(
    w_hh,
    held,
    dgates,
    row,
    width,
    known,
    u,
    H,
    came,
    BU: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HELD: tl.constexpr,
    GATES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_hh^T dgates, summed over the gates; dgates [N, width] is read where `known`."""
    total = tl.zeros((BU, BB), tl.float32)
    if HELD:
        for gate in tl.static_range(GATES):
            for chunk in tl.static_range(CHUNKS):
                k = chunk * BK + tl.arange(0, BK)
                at = dgates + row[None, :] * width + (gate * H + k)[:, None]
                part = _exchanged(at, (k < H)[:, None] & known[None, :], came, PRECISION)
                tile = held[gate * CHUNKS + chunk]
                total = tl.dot(tile, part, total, input_precision=PRECISION)
    else:
        for chunk in range(CHUNKS):
            k = chunk * BK + tl.arange(0, BK)
            for gate in tl.static_range(GATES):
                at = dgates + row[None, :] * width + (gate * H + k)[:, None]
                part = _exchanged(at, (k < H)[:, None] & known[None, :], came, PRECISION)
                tile = _weight(w_hh, gate, u, k, H, True, PRECISION)
                total = tl.dot(tile, part, total, input_precision=PRECISION)
    return total
