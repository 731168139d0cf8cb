"""How a scan is cut into programs: a pure function of shapes, dtypes and the device's limits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch

from ...cells import Cell
from ..base import Problem, SavedShape


class Limits(NamedTuple):
    """What a device offers to a program and to a grid."""

    kind: str  # "cuda" or "hip"
    shared: int  # bytes of shared memory that one program may have
    processors: int  # SMs or compute units


class Scan(NamedTuple):
    """One scan to plan. `exact` products of float32 run on the ordinary units, without tensor
    cores."""

    cell: Cell
    dtype: torch.dtype
    exact: bool
    G: int
    B: int
    H: int


class Plan(NamedTuple):
    """Tiles of `BU` units by `BB` rows; products in `chunks` of `BK` columns of W_hh.

    whole: one tile has all the units, and h stays in it.
    held: a program loads its part of W_hh once.
    resident: all programs run at the same time and hand h over by flags; else, where not whole, a
        launch does one step.
    joined: gates whose products are one; 1, or all of them and then a power of two.
    """

    BU: int
    BB: int
    BK: int
    chunks: int
    warps: int
    whole: bool
    held: bool
    resident: bool
    joined: int
    tiles: int  # of the batch
    slices: int  # of the units


_ROWS = {"cuda": 8, "hip": 16}  # of the narrowest tile that tensor cores take
_LANES = {"cuda": 32, "hip": 64}  # of a warp
# Units and rows of a grid's tiles: the smallest that are all resident spread the work best. From
# the fourth on, LSTM's kernels spill about 100 bytes a thread, which is still the lesser evil.
_TILES = ((16, 16), (32, 16), (16, 32), (64, 16), (32, 32), (16, 64), (64, 32), (64, 64))
_SPARE = 8 << 10  # bytes of shared memory, twice what kernels take beside weights and operands
Regime = Callable[[Scan, Limits], "Plan | str"]


def power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


def whole(scan: Scan, limits: Limits) -> Plan | str:
    """One program a tile of the batch runs the sequence alone, with all of W_hh on chip."""
    units, rows = power_of_two(scan.H, 16), _ROWS[limits.kind]
    weights = units * units * scan.dtype.itemsize  # of one gate
    needed = scan.cell.gates * weights
    # Backward, those of all gates and dh change layout at once.
    tile = (scan.cell.gates + 1) * units * scan.dtype.itemsize
    room = _room(limits, units, rows * tile)
    if needed > room:
        return f"W_hh takes {needed} bytes of the {room} that a program can hold"
    if limits.kind == "hip" and units > 128:
        return f"tiles of {units} units take more shared memory than there is"
    if scan.exact and units > 32:
        return "exact float32 products of more than 32 units leave a program too few registers"
    while rows < 64 and _ceil(scan.B, rows) * scan.G > limits.processors:
        if needed > _room(limits, units, 2 * rows * tile):
            break
        rows *= 2
    warps = 8 if units * rows >= 16 * _LANES[limits.kind] else 4  # two elements a thread
    joined = _all_gates(scan)
    if limits.kind == "hip" or joined * weights > _room(limits, units, rows * tile):
        joined = 1
    tiles = _ceil(scan.B, rows)
    return Plan(units, rows, units, 1, warps, True, True, False, joined, tiles, 1)


def grid(scan: Scan, limits: Limits) -> Plan | str:
    """Programs that own some units each and are all resident hand h over by flags. Those that hold
    their part of W_hh come first, those that read it from L2 at every step second."""
    joins = (_all_gates(scan), 1)
    for held, (units, rows), joined in product((True, False), _TILES, joins):
        plan = _part(scan, units, rows, held, joined)
        if _is_resident(plan, scan, limits) and (not held or _fits(plan, scan, limits)):
            return plan
    return (
        f"{scan.G} groups of {scan.H} units by {scan.B} rows need more programs than the "
        f"{limits.processors} that the device holds at once"
    )


def steps(scan: Scan, limits: Limits) -> Plan | str:
    """A launch a step, for what is too large to be resident."""
    return _part(scan, 32, 16, False, _all_gates(scan))._replace(resident=False)


REGIMES: tuple[Regime, ...] = (whole, grid, steps)


def plan(scan: Scan, limits: Limits) -> Plan:
    """The plan of the first regime that takes the scan.

    Raises:
        RuntimeError: none does; with the reason of each.
    """
    reasons = []
    for regime in REGIMES:
        found = regime(scan, limits)
        if isinstance(found, Plan):
            return found
        reasons.append(f"{regime.__name__}: {found}")
    raise RuntimeError("no regime of the Triton kernels takes this scan: " + "; ".join(reasons))


def _all_gates(scan: Scan) -> int:
    """How many gates one product may have. Ordinary units gain nothing from it."""
    return 1 if scan.exact else power_of_two(scan.cell.gates)


def _part(scan: Scan, units: int, rows: int, held: bool, joined: int) -> Plan:
    columns = _columns(scan, rows, held)
    return Plan(
        BU=units,
        BB=rows,
        BK=columns,
        chunks=_ceil(scan.H, columns),
        warps=4 if units * rows <= 256 else 8,
        whole=False,
        held=held,
        resident=True,
        joined=joined,
        tiles=_ceil(scan.B, rows),
        slices=_ceil(scan.H, units),
    )


def _columns(scan: Scan, rows: int, held: bool) -> int:
    """Tensor cores have time for padding, which costs less than another chunk's barriers do, but a
    single chunk that is held is kept in registers, of which there are too few. Ordinary units get
    tiles that fit theirs."""
    if scan.exact:
        return 16
    widest = (8192 // rows if held else 128) // scan.dtype.itemsize
    return max(16, min(power_of_two(scan.H) // 2, widest))


def _is_resident(plan: Plan, scan: Scan, limits: Limits) -> bool:
    """One program an SM can always be resident."""
    return plan.tiles * plan.slices * scan.G <= limits.processors


def _fits(plan: Plan, scan: Scan, limits: Limits) -> bool:
    if scan.exact:
        return False  # the compiler unrolls ordinary products with tiles that are held, for minutes
    size = scan.dtype.itemsize
    weights = max(scan.cell.gates, plan.joined) * plan.BU * plan.chunks * plan.BK * size
    operands = min(plan.chunks, 2) * plan.joined * plan.BK * plan.BB * size
    return weights <= _room(limits, plan.BU, operands + _SPARE)


def _room(limits: Limits, units: int, tiles: int) -> int:
    """Bytes of W_hh that one program can hold: in shared memory beside the tiles that change layout
    there, on AMD in half of its registers, where narrow tiles lie once in each wave."""
    if limits.kind == "hip":
        return (128 if units > 64 else 64) << 10
    return limits.shared - max(tiles, 24 << 10)


def _ceil(n: int, unit: int) -> int:
    return -(-n // unit)


def saved_shapes(problem: Problem, N: int) -> list[SavedShape]:
    """What a backward scan reads again: values of the gates, and c before every step."""
    G, H, cell = problem.G, problem.H, problem.cell
    gates = ((N, G, cell.saved * H), problem.dtype)
    c_before = ((N, G, H), torch.float32)
    return [gates, c_before] if cell.states > 1 else [gates]
