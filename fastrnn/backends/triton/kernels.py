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

# About a second of polling an L2 counter: a grid that is resident needs microseconds.
SPINS = tl.constexpr(1 << 20)
# What changes from call to call must not lead to another specialization.
VARYING = ["T", "B", "backwards", "begin", "end"]


@triton.jit
def _row(t, b, B, offsets):
    """Row of step t of batch row b in tensors of [N, ...]."""
    if offsets is None:
        return t.to(tl.int64) * B + b
    else:
        return tl.load(offsets + t) + b


@triton.jit
def _lengths(b, T, B, lengths):
    if lengths is None:
        return tl.where(b < B, T, 0)
    else:
        return tl.load(lengths + b, mask=b < B, other=0)


@triton.jit
def _is_cut(t, b, B, backward, length, reset):
    """Whether a reset cuts the row before the step t, in the group's own direction: going forward
    reset[t] does, going backwards reset[t + 1]. There is no step T, and no cut before it."""
    at = t + backward
    return tl.load(reset + at.to(tl.int64) * B + b, mask=at < length, other=0) != 0


@triton.jit
def _load_tiles(base, row, width, u, mask, H, COUNT: tl.constexpr):
    """`COUNT` tiles of float32 that lie side by side, H apart, in rows of [N, width]."""
    tiles = ()
    for k in tl.static_range(COUNT):
        at = base + row[None, :] * width + (k * H + u)[:, None]
        tiles = tiles + (tl.load(at, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _store_tiles(base, row, width, u, mask, H, tiles, COUNT: tl.constexpr):
    for k in tl.static_range(COUNT):
        at = base + row[None, :] * width + (k * H + u)[:, None]
        tl.store(at, tiles[k].to(base.dtype.element_ty), mask=mask)


@triton.jit
def _load_states(h, c, at, mask, STATES: tl.constexpr):
    states = (tl.load(h + at, mask=mask, other=0.0).to(tl.float32),)
    if STATES > 1:
        states = states + (tl.load(c + at, mask=mask, other=0.0).to(tl.float32),)
    return states


@triton.jit
def _store_states(h, c, at, mask, states, STATES: tl.constexpr):
    tl.store(h + at, states[0], mask=mask)
    if STATES > 1:
        tl.store(c + at, states[1], mask=mask)


@triton.jit
def _select(condition, yes, no, COUNT: tl.constexpr):
    tiles = ()
    for k in tl.static_range(COUNT):
        tiles = tiles + (tl.where(condition, yes[k], no[k]),)
    return tiles


@triton.jit
def _zeros(H: tl.constexpr, W: tl.constexpr, COUNT: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((H, W), tl.float32),)
    return tiles


@triton.jit
def _sum(left, right, COUNT: tl.constexpr):
    tiles = ()
    for k in tl.static_range(COUNT):
        tiles = tiles + (left[k] + right[k],)
    return tiles


@triton.jit
def _add(tiles, tile, AT: tl.constexpr, COUNT: tl.constexpr):
    """`tiles` with `tile` added to the one at `AT`."""
    sums = ()
    for k in tl.static_range(COUNT):
        sums = sums + (tiles[k] + tile if k == AT else tiles[k],)
    return sums


@triton.jit
def _cut_back(ds, cuts, cut, BU: tl.constexpr, BB: tl.constexpr, STATES: tl.constexpr):
    """Where a reset cuts the row, its gradients go to `cuts` rather than to the step before."""
    nothing = _zeros(BU, BB, STATES)
    cuts = _sum(cuts, _select(cut, ds, nothing, STATES), STATES)
    return _select(cut, nothing, ds, STATES), cuts


@triton.jit
def _goes_backwards(backwards):
    """Bit g of `backwards` for this program's group g; past the last bit there is but its sign."""
    return ((backwards.to(tl.int64) >> tl.minimum(tl.program_id(2), 63)) & 1).to(tl.int32)


@triton.jit
def _factor(tile, PRECISION: tl.constexpr):
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
    return _factor(tl.load(w_hh + at, mask=mask, other=0.0), PRECISION)


@triton.jit
def _hold(
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
def _announce(arrived):
    """Tell the programs of the same rows that this one's part is in global memory."""
    if arrived is not None:
        tl.debug_barrier()  # all threads have stored when one of them releases
        tl.atomic_add(arrived, 1, sem="release", scope="gpu")


@triton.jit
def _await(arrived, parts, came):
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


@triton.jit
def _exchanged(at, mask, came, PRECISION: tl.constexpr):
    """A factor that other programs wrote: from L2, as this SM's L1 may have an older one."""
    tile = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    return _factor(tl.where(came, tile, float("nan")).to(tile.dtype), PRECISION)


@triton.jit
def _product_forward(
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
    sums = _zeros(BU, BB, GATES)
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
def _product_backward(
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
    arrived,  # [G, tiles], zero before the first step, or None
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
    PRECISION: tl.constexpr,
):
    g = tl.program_id(2).to(tl.int64)
    backward = _goes_backwards(backwards)
    u = tl.program_id(1) * BU + tl.arange(0, BU)
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    inside = (u < H)[:, None] & (b < B)[None, :]
    length = _lengths(b, T, B, lengths)
    state_at = (g * B + b)[None, :] * H + u[:, None]

    w_hh += g * GATES * H * H
    gates_x += g * GATES * H
    y += g * H
    if arrived is not None:
        arrived += g * tl.num_programs(0) + tl.program_id(0)
    held = ()
    if HELD:
        held = _hold(w_hh, u, H, BK, CHUNKS, GATES, False, PRECISION)
    bias_x = ()
    bias_h = ()
    if bias is not None:
        for gate in tl.static_range(GATES):
            at = bias + g * 2 * GATES * H + gate * H + u
            bias_x = bias_x + (tl.load(at, mask=u < H, other=0.0).to(tl.float32)[:, None],)
            at += GATES * H
            bias_h = bias_h + (tl.load(at, mask=u < H, other=0.0).to(tl.float32)[:, None],)

    states = _load_states(h, c, state_at, inside, STATES)
    t = begin + backward * (T - 1 - 2 * begin)
    row = _row(t, b, B, offsets)
    active = t < length
    x = _load_tiles(gates_x, row, G * GATES * H, u, inside & active[None, :], H, GATES)
    came = tl.full((), True, tl.int1)
    for s in range(begin, end):
        t_next = tl.where(s + 1 < T, t + 1 - 2 * backward, T)
        row_next = _row(tl.minimum(t_next, T - 1), b, B, offsets)
        active_next = t_next < length
        # The next step's gates, if it is this launch's, are on their way while this one computes.
        ahead = inside & (tl.where(s + 1 < end, t_next, T) < length)[None, :]
        x_next = _load_tiles(gates_x, row_next, G * GATES * H, u, ahead, H, GATES)

        if WHOLE:
            r = ()
            operand = _factor(states[0].to(w_hh.dtype.element_ty), PRECISION)
            for gate in tl.static_range(GATES):
                r = r + (tl.dot(held[gate], operand, input_precision=PRECISION),)
        else:
            came = _await(arrived, s * tl.num_programs(1), came)
            slot = exchange + ((s % 2) * G + g) * B * H
            r = _product_forward(
                w_hh, held, slot, b, B, u, H, came, BU, BB, BK, CHUNKS, HELD, GATES, PRECISION
            )
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

        states = _select(active[None, :], new, states, STATES)
        shown = states
        if reset is not None:
            cut = _is_cut(t_next, b, B, backward, length, reset)
            fresh = _zeros(BU, BB, STATES)
            if h_reset is not None:
                fresh = _load_states(h_reset, c_reset, state_at, inside & cut[None, :], STATES)
            states = _select(cut[None, :], fresh, states, STATES)
        if not WHOLE:
            slot = exchange + ((s + 1) % 2 * G + g) * B * H
            part = slot + b.to(tl.int64)[None, :] * H + u[:, None]
            tl.store(part, states[0].to(slot.dtype.element_ty), mask=inside)
            _announce(arrived)

        # What nobody waits for comes last.
        running = inside & active[None, :]
        if saved is not None:
            _store_tiles(saved + g * SAVED * H, row, G * SAVED * H, u, running, H, kept, SAVED)
            if STATES > 1:
                _store_tiles(c_before + g * H, row, G * H, u, running, H, (c_old,), 1)
        written = running
        if offsets is None:  # a padded row gets zeros past its length
            written = inside
        shown = _select(active[None, :], shown, _zeros(BU, BB, STATES), STATES)
        _store_tiles(y, row, G * H, u, written, H, shown, 1)
        if c_all is not None:
            _store_tiles(c_all + g * H, row, G * H, u, written, H, (shown[STATES - 1],), 1)
        t, row, active, x = t_next, row_next, active_next, x_next
    _store_states(h, c, state_at, inside, states, STATES)


@triton.jit(do_not_specialize=VARYING)
def backward_scan(
    dy,  # [N, G*H] or None
    dc_all,  # [N, G*H] or None
    saved,  # [N, G, SAVED*H]
    c_before,  # float32 [N, G, H] or None
    h_before,  # [N, G, H], None where the cell does not read it
    w_hh,  # [G, GATES*H, H]
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
    PRECISION: tl.constexpr,
):
    g = tl.program_id(2).to(tl.int64)
    backward = _goes_backwards(backwards)
    u = tl.program_id(1) * BU + tl.arange(0, BU)
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    inside = (u < H)[:, None] & (b < B)[None, :]
    length = _lengths(b, T, B, lengths)
    state_at = (g * B + b)[None, :] * H + u[:, None]
    width = G * GATES * H

    w_hh += g * GATES * H * H
    dgates_h += g * GATES * H
    saved += g * SAVED * H
    if arrived is not None:
        arrived += g * tl.num_programs(0) + tl.program_id(0)
    held = ()
    if HELD:
        held = _hold(w_hh, u, H, BK, CHUNKS, GATES, True, PRECISION)

    ds = _load_states(h, c, state_at, inside, STATES)
    cuts = _zeros(BU, BB, STATES)
    came = tl.full((), True, tl.int1)
    for k in range(begin, end):
        s = T - 1 - k
        t = s + backward * (T - 1 - 2 * s)
        if not WHOLE:
            t_done = tl.where(k > 0, t + 1 - 2 * backward, T)
            known = t_done < length
            row_done = _row(tl.minimum(t_done, T - 1), b, B, offsets)
            came = _await(arrived, k * tl.num_programs(1), came)
            product = _product_backward(
                w_hh, held, dgates_h, row_done, width, known, u, H, came,
                BU, BB, BK, CHUNKS, HELD, GATES, PRECISION,
            )  # fmt: skip
            ds = _add(ds, product, 0, STATES)
            if reset is not None:
                cut = _is_cut(t_done, b, B, backward, length, reset)
                ds, cuts = _cut_back(ds, cuts, cut[None, :], BU, BB, STATES)

        t = tl.where(k < T, t, T)
        active = t < length
        row = _row(tl.minimum(t, T - 1), b, B, offsets)
        running = inside & active[None, :]
        kept = _load_tiles(saved, row, G * SAVED * H, u, running, H, SAVED)
        before = _zeros(BU, BB, 1)
        if h_before is not None:
            before = _load_tiles(h_before + g * H, row, G * H, u, running, H, 1)
        if STATES > 1:
            before = before + _load_tiles(c_before + g * H, row, G * H, u, running, H, 1)
        # Nothing comes in where a row does not run, so that nothing goes out.
        incoming = _select(active[None, :], ds, _zeros(BU, BB, STATES), STATES)
        if dy is not None:
            part = _load_tiles(dy + g * H, row, G * H, u, running, H, 1)
            incoming = _add(incoming, part[0], 0, STATES)
        if dc_all is not None:
            part = _load_tiles(dc_all + g * H, row, G * H, u, running, H, 1)
            incoming = _add(incoming, part[0], STATES - 1, STATES)
        dx, dr, outgoing = BACKWARD(kept, before, incoming)
        ds = _select(active[None, :], outgoing, ds, STATES)
        written = running
        if offsets is None:  # a padded row gets zeros past its length
            written = inside & (t < tl.where(b < B, T, 0))[None, :]
        _store_tiles(dgates_h, row, width, u, written, H, dr, GATES)
        if dgates_x is not None:
            _store_tiles(dgates_x + g * GATES * H, row, width, u, written, H, dx, GATES)

        if WHOLE:
            product = tl.zeros((BU, BB), tl.float32)
            for gate in tl.static_range(GATES):
                operand = _factor(dr[gate].to(w_hh.dtype.element_ty), PRECISION)
                product = tl.dot(held[gate], operand, product, input_precision=PRECISION)
            ds = _add(ds, product, 0, STATES)
            if reset is not None:
                cut = _is_cut(t, b, B, backward, length, reset)
                ds, cuts = _cut_back(ds, cuts, cut[None, :], BU, BB, STATES)
        else:
            _announce(arrived)
    _store_states(h, c, state_at, inside, ds, STATES)
    if dh_reset is not None:
        added = _load_states(dh_reset, dc_reset, state_at, inside, STATES)
        total = _sum(added, cuts, STATES)
        _store_states(dh_reset, dc_reset, state_at, inside, total, STATES)


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
    backward = _goes_backwards(backwards)
    length = _lengths(b, T, B, lengths)
    active = t < length
    t_before = t - 1 + 2 * backward
    t_before = tl.where(t_before < 0, T, t_before)
    follows = t_before < length
    row = _row(t, b, B, offsets)
    row_before = _row(tl.minimum(t_before, T - 1), b, B, offsets)

    units = (u < H)[None, :]
    at = y + row_before[:, None] * G * H + g * H + u[None, :]
    h = tl.load(at, mask=(active & follows)[:, None] & units, other=0.0)
    state_at = (g * B + b)[:, None] * H + u[None, :]
    if h0 is not None:
        starts = active & (t_before >= length)
        initial = tl.load(h0 + state_at, mask=starts[:, None] & units, other=0.0)
        h = tl.where(starts[:, None], initial, h)
    if reset is not None:
        cut = _is_cut(t, b, B, backward, length, reset) & active
        fresh = tl.zeros_like(h)
        if h_reset is not None:
            fresh = tl.load(h_reset + state_at, mask=cut[:, None] & units, other=0.0)
        h = tl.where(cut[:, None], fresh, h)
    written = active
    if offsets is None:
        written = b < B
    tl.store(h_before + (row[:, None] * G + g) * H + u[None, :], h, mask=written[:, None] & units)
