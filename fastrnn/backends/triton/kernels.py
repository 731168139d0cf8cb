"""The scans, forward and backward, once for all cells and all regimes.

A program keeps one group's tile of `BU` hidden units and `BB` rows of the batch. Tiles lie
[units, batch], so that the weights are the left operand of the products, which tensor cores want
64 rows high, and the batch is the right one, which may be as narrow as 8.

Where one tile has all the units (`WHOLE`) a program runs its sequence alone. Elsewhere the programs
of the same rows exchange what the recurrent product reads, h going forward and the gates' gradients
going back, through global memory. Each announces its part by a release-add to the counter of its
rows and waits for all parts of the step before; without a counter (`arrived` is None) a launch does
one step, and the launches' order is what makes the parts visible. With `HELD` the program's part of
W_hh is loaded once, before the first step, else it is read from global memory at every step.

States travel in float32 in `h` and `c` [G, B, H], which a launch reads at its first step and writes
after its last. They are always those that the next step starts from: where a reset cuts a row, the
cut is made when the step before is done."""

from __future__ import annotations

import triton
import triton.language as tl

from .handoff import announce, await_parts, counter_of_rows
from .products import add_products, factor, gates_of, hold, product_backward, product_forward
from .tiles import (
    add_at,
    add_tiles,
    goes_backwards,
    is_cut,
    lengths_of,
    load_states,
    load_tiles,
    relaid,
    row_of,
    select,
    store_states,
    store_tiles,
    zeros,
)

# What changes from call to call must not lead to another specialization.
VARYING = ["T", "B", "backwards", "begin", "end"]


@triton.jit
def _cut_back(ds, cuts, cut, BU: tl.constexpr, BB: tl.constexpr, STATES: tl.constexpr):
    """Where a reset cuts the row, its gradients go to `cuts` rather than to the step before."""
    nothing = zeros(BU, BB, STATES)
    cuts = add_tiles(cuts, select(cut, ds, nothing, STATES), STATES)
    return select(cut, nothing, ds, STATES), cuts


@triton.jit(do_not_specialize=VARYING)
def forward_scan(
    gates_x,  # [N, G, GATES*H], without the bias
    w_hh,  # [G, GATES*H, H]
    bias,  # [G, 2, GATES*H], of the input's gates and of the recurrent ones, or None
    h,
    c,
    h_reset,  # [G, B, H] as c_reset, or None for zeros
    c_reset,
    lengths,  # [B], or None for T everywhere
    offsets,  # [T], first row of each step when packed, or None
    reset,  # uint8 [T, B], or None
    exchange,  # [2, G, B, H]: h that step s reads is in exchange[s % 2]; None when WHOLE
    arrived,  # [G, tiles, APART], zero before the first step, or None
    y,  # [N, G*H]
    c_all,  # [N, G*H] or None
    saved,  # [N, G, SAVED*H] or None
    c_before,  # float32 [N, G, H] or None
    T,
    B,
    backwards,  # bit g is set where group g goes backwards
    begin,  # steps of this launch, counted in the group's own direction
    end,
    FORWARD: tl.constexpr,
    GATES: tl.constexpr,
    STATES: tl.constexpr,
    SAVED: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BU: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HELD: tl.constexpr,
    WHOLE: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    g = tl.program_id(2).to(tl.int64)
    backward = goes_backwards(backwards)
    first = tl.program_id(1) * BU
    u = first + tl.arange(0, BU)
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    inside = (u < H)[:, None] & (b < B)[None, :]
    length = lengths_of(b, T, B, lengths)
    state_at = (g * B + b)[None, :] * H + u[:, None]
    COUNT: tl.constexpr = 1 if JOINED > 1 else GATES

    w_hh += g * GATES * H * H
    gates_x += g * GATES * H
    y += g * H
    if arrived is not None:
        arrived = counter_of_rows(arrived)
    held = ()
    if HELD:
        held = hold(w_hh, first, H, BU, BK, CHUNKS, GATES, JOINED, False, PRECISION)
    bias_x = ()
    bias_h = ()
    if bias is not None:
        for gate in tl.static_range(GATES):
            at = bias + g * 2 * GATES * H + gate * H + u
            bias_x = bias_x + (tl.load(at, mask=u < H, other=0.0).to(tl.float32)[:, None],)
            at += GATES * H
            bias_h = bias_h + (tl.load(at, mask=u < H, other=0.0).to(tl.float32)[:, None],)

    states = load_states(h, c, state_at, inside, STATES)
    t = begin + backward * (T - 1 - 2 * begin)
    row = row_of(t, b, B, offsets)
    active = t < length
    x = load_tiles(gates_x, row, G * GATES * H, u, inside & active[None, :], H, GATES)
    t_next = tl.where(begin + 1 < T, t + 1 - 2 * backward, T)
    row_next = row_of(tl.minimum(t_next, T - 1), b, B, offsets)
    came = tl.full((), True, tl.int1)
    for s in range(begin, end):
        # Rows are two steps ahead, as the loads one step ahead need them.
        t_after = tl.where(s + 2 < T, t_next + 1 - 2 * backward, T)
        row_after = row_of(tl.minimum(t_after, T - 1), b, B, offsets)
        active_next = t_next < length
        # The next step's gates, if it is this launch's, are on their way while this one computes.
        ahead = inside & (tl.where(s + 1 < end, t_next, T) < length)[None, :]
        x_next = load_tiles(gates_x, row_next, G * GATES * H, u, ahead, H, GATES)
        if reset is not None:
            cut = is_cut(t_next, b, B, backward, length, reset)

        if WHOLE:
            # Zeros in the weights' padding would make NaN of an infinite one.
            operand = tl.where(inside, states[0], 0.0).to(w_hh.dtype.element_ty)
            sums = zeros(JOINED * BU, BB, COUNT)
            sums = add_products(sums, held, operand, 0, COUNT, PRECISION)
            r = gates_of(sums, BU, BB, GATES, JOINED)
        else:
            came = await_parts(arrived, s * tl.num_programs(1), came)
            slot = exchange + ((s % 2) * G + g) * B * H
            r = product_forward(
                w_hh, held, slot, b, B, first, H, came,
                BU, BB, BK, CHUNKS, HELD, GATES, JOINED, PRECISION,
            )  # fmt: skip
        if bias is not None:
            with_x = ()
            with_h = ()
            for gate in tl.static_range(GATES):
                with_x = with_x + (x[gate] + bias_x[gate],)
                with_h = with_h + (r[gate] + bias_h[gate],)
            x = with_x
            r = with_h
        c_old = states[STATES - 1]
        new, kept = FORWARD(x, r, states)

        states = select(active[None, :], new, states, STATES)
        shown = states
        if reset is not None:
            fresh = zeros(BU, BB, STATES)
            if h_reset is not None:
                fresh = load_states(h_reset, c_reset, state_at, inside & cut[None, :], STATES)
            states = select(cut[None, :], fresh, states, STATES)
        if not WHOLE:
            slot = exchange + ((s + 1) % 2 * G + g) * B * H
            part = slot + b.to(tl.int64)[None, :] * H + u[:, None]
            tl.store(part, states[0].to(slot.dtype.element_ty), mask=inside)
            announce(arrived)

        # What nobody waits for comes last.
        running = inside & active[None, :]
        if saved is not None:
            store_tiles(saved + g * SAVED * H, row, G * SAVED * H, u, running, H, kept, SAVED)
            if STATES > 1:
                store_tiles(c_before + g * H, row, G * H, u, running, H, (c_old,), 1)
        written = running
        if offsets is None:  # a padded row gets zeros past its length
            written = inside
        shown = select(active[None, :], shown, zeros(BU, BB, STATES), STATES)
        store_tiles(y, row, G * H, u, written, H, shown, 1)
        if c_all is not None:
            store_tiles(c_all + g * H, row, G * H, u, written, H, (shown[STATES - 1],), 1)
        t, t_next, row, row_next = t_next, t_after, row_next, row_after
        active, x = active_next, x_next
    store_states(h, c, state_at, inside, states, STATES)


@triton.jit
def _time_from_end(k, T, backward):
    """t of step k counted from the last; T where there is no such step."""
    s = T - 1 - k
    return tl.where((s >= 0) & (s < T), s + backward * (T - 1 - 2 * s), T)


@triton.jit
def _load_step(
    saved,
    h_before,
    c_before,
    dy,
    dc_all,
    row,
    u,
    mask,
    G: tl.constexpr,
    H: tl.constexpr,
    STATES: tl.constexpr,
    SAVED: tl.constexpr,
    BU: tl.constexpr,
    BB: tl.constexpr,
):
    """What a step back reads: what forward kept, the states before, and y's and c's gradients."""
    kept = load_tiles(saved, row, G * SAVED * H, u, mask, H, SAVED)
    before = zeros(BU, BB, 1)
    if h_before is not None:
        before = load_tiles(h_before, row, G * H, u, mask, H, 1)
    if STATES > 1:
        before = before + load_tiles(c_before, row, G * H, u, mask, H, 1)
    dy_here = ()
    if dy is not None:
        dy_here = load_tiles(dy, row, G * H, u, mask, H, 1)
    dc_here = ()
    if dc_all is not None:
        dc_here = load_tiles(dc_all, row, G * H, u, mask, H, 1)
    return kept, before, dy_here, dc_here


@triton.jit(do_not_specialize=VARYING)
def backward_scan(
    dy,  # [N, G*H] or None
    dc_all,  # [N, G*H] or None
    saved,  # [N, G, SAVED*H]
    c_before,  # float32 [N, G, H] or None
    h_before,  # [N, G, H], None where the cell does not read it
    w_hh,  # [G, GATES*H, H], each gate's transposed
    h,  # dh and dc: float32 [G, B, H]
    c,
    dh_reset,  # float32 [G, B, H], added to at every reset, or None
    dc_reset,
    lengths,
    offsets,
    reset,
    arrived,
    dgates_h,  # [N, G, GATES*H]
    dgates_x,  # None for cells with shared gradients
    T,
    B,
    backwards,
    begin,  # counted from the last step; T is the product that the first step leaves to do
    end,
    BACKWARD: tl.constexpr,
    GATES: tl.constexpr,
    STATES: tl.constexpr,
    SAVED: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BU: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HELD: tl.constexpr,
    WHOLE: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    g = tl.program_id(2).to(tl.int64)
    backward = goes_backwards(backwards)
    first = tl.program_id(1) * BU
    u = first + tl.arange(0, BU)
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    inside = (u < H)[:, None] & (b < B)[None, :]
    length = lengths_of(b, T, B, lengths)
    state_at = (g * B + b)[None, :] * H + u[:, None]
    width = G * GATES * H
    # Tiles of 64 units have rows for all warps.
    BEHIND: tl.constexpr = 1 if WHOLE or BU >= 64 else JOINED

    w_hh += g * GATES * H * H
    dgates_h += g * GATES * H
    saved += g * SAVED * H
    if h_before is not None:
        h_before += g * H
    if STATES > 1:
        c_before += g * H
    if dy is not None:
        dy += g * H
    if dc_all is not None:
        dc_all += g * H
    if arrived is not None:
        arrived = counter_of_rows(arrived)
    held = ()
    if HELD:
        held = hold(w_hh, first, H, BU, BK, CHUNKS, GATES, BEHIND, True, PRECISION)

    ds = load_states(h, c, state_at, inside, STATES)
    cuts = zeros(BU, BB, STATES)
    came = tl.full((), True, tl.int1)
    t_done = _time_from_end(begin - 1, T, backward)
    row_done = row_of(tl.minimum(t_done, T - 1), b, B, offsets)
    t = _time_from_end(begin, T, backward)
    row = row_of(tl.minimum(t, T - 1), b, B, offsets)
    t_next = _time_from_end(begin + 1, T, backward)
    row_next = row_of(tl.minimum(t_next, T - 1), b, B, offsets)
    running = inside & (t < length)[None, :]
    kept, before, dy_here, dc_here = _load_step(
        saved, h_before, c_before, dy, dc_all, row, u, running, G, H, STATES, SAVED, BU, BB
    )
    for k in range(begin, end):
        t_after = _time_from_end(k + 2, T, backward)
        row_after = row_of(tl.minimum(t_after, T - 1), b, B, offsets)
        # As going forward, what the next step reads is on its way while this one computes.
        ahead = inside & (tl.where(k + 1 < end, t_next, T) < length)[None, :]
        kept_next, before_next, dy_next, dc_next = _load_step(
            saved, h_before, c_before, dy, dc_all, row_next, u, ahead,
            G, H, STATES, SAVED, BU, BB,
        )  # fmt: skip

        if reset is not None:
            cut = is_cut(t if WHOLE else t_done, b, B, backward, length, reset)
        if not WHOLE:
            known = t_done < length
            came = await_parts(arrived, k * tl.num_programs(1), came)
            product = product_backward(
                w_hh, held, dgates_h, row_done, width, known, first, H, came,
                BU, BB, BK, CHUNKS, HELD, GATES, BEHIND, PRECISION,
            )  # fmt: skip
            ds = add_at(ds, relaid(product, BU, BB), 0, STATES)
            if reset is not None:
                ds, cuts = _cut_back(ds, cuts, cut[None, :], BU, BB, STATES)

        active = t < length
        running = inside & active[None, :]
        # Nothing comes in where a row does not run, so that nothing goes out.
        incoming = select(active[None, :], ds, zeros(BU, BB, STATES), STATES)
        if dy is not None:
            incoming = add_at(incoming, dy_here[0], 0, STATES)
        if dc_all is not None:
            incoming = add_at(incoming, dc_here[0], STATES - 1, STATES)
        dx, dr, outgoing = BACKWARD(kept, before, incoming)
        ds = select(active[None, :], outgoing, ds, STATES)
        written = running
        if offsets is None:  # a padded row gets zeros past its length
            written = inside & (t < tl.where(b < B, T, 0))[None, :]
        store_tiles(dgates_h, row, width, u, written, H, dr, GATES)
        if dgates_x is not None:
            store_tiles(dgates_x + g * GATES * H, row, width, u, written, H, dx, GATES)

        if WHOLE:
            product = tl.zeros((BU, BB), tl.float32)
            for gate in tl.static_range(GATES):
                operand = tl.where(inside, dr[gate], 0.0).to(w_hh.dtype.element_ty)
                operand = factor(operand, PRECISION)
                product = tl.dot(held[gate], operand, product, input_precision=PRECISION)
            ds = add_at(ds, relaid(product, BU, BB), 0, STATES)
            if reset is not None:
                ds, cuts = _cut_back(ds, cuts, cut[None, :], BU, BB, STATES)
        else:
            announce(arrived)
        t_done, t, t_next = t, t_next, t_after
        row_done, row, row_next = row, row_next, row_after
        kept, before, dy_here, dc_here = kept_next, before_next, dy_next, dc_next
    store_states(h, c, state_at, inside, ds, STATES)
    if dh_reset is not None:
        added = load_states(dh_reset, dc_reset, state_at, inside, STATES)
        total = add_tiles(added, cuts, STATES)
        store_states(dh_reset, dc_reset, state_at, inside, total, STATES)


@triton.jit(do_not_specialize=["T", "B", "backwards"])
def gather_before(
    y,  # [N, G*H]
    h0,  # [G, B, H] or None for zeros
    h_reset,
    lengths,
    offsets,
    reset,
    h_before,  # [N, G, H]: h that every step started from
    T,
    B,
    backwards,
    G: tl.constexpr,
    H: tl.constexpr,
    BU: tl.constexpr,
    BB: tl.constexpr,
):
    tiles = tl.cdiv(B, BB)
    t = tl.program_id(0) // tiles
    b = tl.program_id(0) % tiles * BB + tl.arange(0, BB)
    u = tl.program_id(1) * BU + tl.arange(0, BU)
    g = tl.program_id(2).to(tl.int64)
    backward = goes_backwards(backwards)
    length = lengths_of(b, T, B, lengths)
    active = t < length
    t_before = t - 1 + 2 * backward
    t_before = tl.where(t_before < 0, T, t_before)
    follows = t_before < length
    row = row_of(t, b, B, offsets)
    row_before = row_of(tl.minimum(t_before, T - 1), b, B, offsets)

    units = (u < H)[None, :]
    at = y + row_before[:, None] * G * H + g * H + u[None, :]
    h = tl.load(at, mask=(active & follows)[:, None] & units, other=0.0)
    state_at = (g * B + b)[:, None] * H + u[None, :]
    if h0 is not None:
        starts = active & (t_before >= length)
        initial = tl.load(h0 + state_at, mask=starts[:, None] & units, other=0.0)
        h = tl.where(starts[:, None], initial, h)
    if reset is not None:
        cut = is_cut(t, b, B, backward, length, reset) & active
        fresh = tl.zeros_like(h)
        if h_reset is not None:
            fresh = tl.load(h_reset + state_at, mask=cut[:, None] & units, other=0.0)
        h = tl.where(cut[:, None], fresh, h)
    written = active
    if offsets is None:
        written = b < B
    tl.store(h_before + (row[:, None] * G + g) * H + u[None, :], h, mask=written[:, None] & units)
