"""Layers and stacks of layers as functions: directions, projection, dropout, packing, autocast.

Everything is checked here before a kernel sees it. Nothing here knows a cell or a backend by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as _dropout

from . import _torch, record, transforms
from .autograd import Route, scan, wants_gradients
from .backends import Inputs, Problem, Weights, asked, check_batch_sizes, check_lengths
from .cells import CELLS, Cell, States
from .ops import describe
from .plain import signature, stop_at_overrides

# A route, and the only vmap's members as one call where they are one.
Way = tuple[Route, transforms.Fold | None]

# The ways of calls that have passed the checks. What has the same dtypes, devices and shapes
# passes too, and goes the same way: finding that out takes longer than a small layer.
_checked: dict[tuple[object, ...], Way] = record.choices()
_MOST_CHECKED = 4096

Check = Callable[[Tensor, States | None, Weights, Tensor | None], None]

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def stack(
    cell: str,
    x: Tensor,
    hx: States | None,
    weights: Sequence[Weights],
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_hx: States | None = None,
    all_states: bool = False,
    recompute: int = 0,
    check: Check | None = None,
    every: list[States] | None = None,
) -> tuple[Tensor, States, Tensor | None]:
    """Layers on top of each other, each reading the output of the one below.

    Args:
        cell: a key of :data:`fastrnn.cells.CELLS`.
        x: [T, B, I] of any strides, or [N, I] with `batch_sizes`.
        hx: the cell's initial states, h [L*D, B, out] and c [L*D, B, H], layer by layer and in a
            layer direction by direction,
            or None for zeros. D is the number of directions; out is H, or P with a projection.
        weights: one flat list a layer, as for :func:`layer`.
        bidirectional: every layer runs in both directions, their outputs side by side.
        dropout: probability of an output between two layers to be zeroed while `training`.
        batch_sizes, lengths, reset: as for :func:`layer`.
        reset_hx: the states that a row takes at a reset, shaped as `hx`, or None for zeros.
        all_states: return c after every step, for cells that have one.
        recompute: as for :func:`layer`.
        check: as for :func:`layer`, of the first layer.
        every: a list to which each layer's states after every step are appended: its output and,
            for cells that have one, its c, shaped as the last layer's are.

    Returns:
        The last layer's output [T, B, D*out] or [N, D*out]; the last states, of the shapes of `hx`;
        and the last layer's c after every step, [T, B, D*H] or [N, D*H], or None.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together, or the sequence is empty.
        ValueError: a length is below 0 or above T.
    """
    reverse = (False, True) if bidirectional else (False,)
    if len(weights) == 1:
        y, end, c = layer(
            cell, x, hx, weights[0], reverse, batch_sizes, lengths=lengths, reset=reset,
            reset_states=reset_hx, all_states=all_states or every is not None,
            recompute=recompute, check=check,
        )  # fmt: skip
        if every is not None:
            every.append((y,) if c is None else (y, c))
        return y, end, c
    groups, layers = len(reverse), len(weights)
    if lengths is not None or reset is not None:  # moved to x's device once for all layers
        _check_input(x, batch_sizes)
        lengths, reset = _check_steps(x, batch_sizes, lengths, reset)
    ends: list[States] = []
    c = None
    for k in range(layers):
        mine = slice(k * groups, (k + 1) * groups)
        x, end, c = layer(
            cell,
            x,
            _of_layer(hx, mine),
            weights[k],
            reverse,
            batch_sizes,
            lengths=lengths,
            reset=reset,
            reset_states=_of_layer(reset_hx, mine),
            all_states=every is not None or (all_states and k == layers - 1),
            recompute=recompute,
            check=None if k else check,
        )
        ends.append(end)
        if every is not None:
            every.append((x,) if c is None else (x, c))
        if training and dropout and k < layers - 1:
            x = _dropout(x, dropout)
    return x, tuple(torch.cat(s) for s in zip(*ends, strict=True)), c


def _of_layer(states: States | None, groups: slice) -> States | None:
    return None if states is None else tuple(s[groups] for s in states)


def layer(
    cell: str,
    x: Tensor,
    states: States | None,
    weights: Weights,
    reverse: Sequence[bool] = (False,),
    batch_sizes: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_states: States | None = None,
    all_states: bool = False,
    recompute: int = 0,
    check: Check | None = None,
) -> tuple[Tensor, States, Tensor | None]:
    """One layer of G groups over one input; group g goes backwards in time where reverse[g].

    Args:
        cell: a key of :data:`fastrnn.cells.CELLS`.
        x: [T, B, I] of any strides, or [N, I] with `batch_sizes`. With G > 1, [T, B, G*I] gives
            each group columns of its own. Under torch.func's transforms also [T, I], one sequence
            and nothing but the weights with it: then no result has a dimension B.
        states: h [G, B, out] and, for cells with one, c [G, B, H]; None for zeros.
        weights: per group w_ih [gates*H, I], w_hh [gates*H, out], b_ih and b_hh [gates*H] or None
            and, with a projection,
            w_hr [P, H]: 4 or 5 entries a group, in torch's gate order.
        reverse: the direction of each group.
        batch_sizes: CPU int64 [T], rows of each step of a packed sequence, longest sequence first.
        lengths: integers [B] from 0 to T, in any order, on any device, instead of `batch_sizes`:
            row b has lengths[b] steps. What lies past them is never read; the output is zero there,
            and the last states are those after the row's own last step.
        reset: bool [T, B], instead of `batch_sizes`: where it is true, a new sequence begins at
            step t of row b. Neither state nor gradient crosses the cut between t - 1 and t, in
            either direction of time: the first step beyond it starts from `reset_states`. A cut at
            t = 0 replaces the initial state (going forward).
        reset_states: as `states`; None for zeros.
        all_states: return c after every step, for cells that have one.
        recompute: k > 0 keeps only every k-th state for the backward pass, which runs each chunk of
            k steps again: less memory for more time. 0 keeps everything. Without gradients, or
            under torch.func's transforms, it changes nothing.
        check: what else raises if shapes or dtypes do not fit; not called where they have passed.

    Returns:
        y [T, B, G*out] or [N, G*out], the last states, and c after every step [T, B, G*H] or
        [N, G*H], or None.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together, or the sequence is empty.
        ValueError: a length is below 0 or above T.
    """
    if _torch.autocast_active() and is_autocast(x.device):
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.get_autocast_dtype(x.device.type)
            states = None if states is None else tuple(cast(s, dtype) for s in states)
            if reset_states is not None:
                reset_states = tuple(cast(s, dtype) for s in reset_states)
            weights = [None if w is None else cast(w, dtype) for w in weights]
            return layer(
                cell, cast(x, dtype), states, weights, reverse, batch_sizes, lengths=lengths,
                reset=reset, reset_states=reset_states, all_states=all_states,
                recompute=recompute, check=check,
            )  # fmt: skip
    batch = None
    if batch_sizes is not None or lengths is not None or reset is not None:
        batch = _check_input(x, batch_sizes)
        lengths, reset = _check_steps(x, batch_sizes, lengths, reset)
    each = (*_pair(states), *_pair(None if reset is None else reset_states))
    inputs = Inputs(x, batch_sizes, lengths, reset, each, weights)
    given = states, reset_states
    options = tuple(reverse), all_states, recompute
    peeled = None
    # Of reset_states without a reset its signature would not tell.
    if _torch.transforms_active() and (reset_states is None or reset is not None):
        peeled = transforms.peel(inputs)
    route, fold = _route(cell, inputs, peeled, batch, given, options, check)
    if peeled is not None and fold is not None:
        y, h_n, c_n, c = transforms.scan_folded(fold, peeled, inputs)
    elif route.is_transformed():
        y, h_n, c_n, c = transforms.scan(route.backend, route.problem, inputs)
    else:
        y, h_n, c_n, c = scan(route, inputs)
    return y, (h_n,) if c_n is None else (h_n, c_n), c


def _route(
    cell: str,
    inputs: Inputs,
    peeled: transforms.Peeled | None,
    batch: int | None,
    given: tuple[States | None, States | None],
    options: tuple[tuple[bool, ...], bool, int],
    check: Check | None,
) -> Way:
    """The way that these inputs go, once they have passed the checks. `batch` is the batch size
    where what depends on values had to be checked before; the states are as they were given; the
    options are the directions, all_states and recompute."""
    x, batch_sizes, lengths, reset, _, weights = inputs
    kind, (states, reset_states), (*_, recompute) = CELLS[cell], given, options
    if peeled is None:
        tensors = (x, batch_sizes, lengths, reset, *(states or ()), *(reset_states or ()), *weights)
        read: object = signature(tensors)
    else:
        read = peeled.signature
    plain = peeled is None and read is not None
    grad = wants_gradients(inputs)
    key = (
        kind, options, check is None, grad, asked(), batch, len(weights),
        None if states is None else len(states),
        None if reset_states is None else len(reset_states),
        read,
    )  # fmt: skip
    known = None if read is None else _checked.get(key)
    if known is None:
        problem = checked_problem(kind, inputs, batch, given, options, check, grad)
    elif known[0].settled:
        return known
    else:
        problem = known[0].problem
    route = Route.find(problem, recompute, plain)
    way = route, None if peeled is None else transforms.fold(route, inputs, peeled)
    if read is not None:
        _remember(key, way)
    return way


def checked_problem(
    cell: Cell,
    inputs: Inputs,
    batch: int | None,
    given: tuple[States | None, States | None],
    options: tuple[tuple[bool, ...], bool, int],
    check: Check | None,
    grad: bool,
) -> Problem:
    """The problem that these inputs pose; it raises if they do not fit. See :func:`_route`."""
    if inputs.unbatched() and _torch.transforms_active():
        inputs = inputs.with_batch()
    x, batch_sizes, _, _, _, weights = inputs
    (states, reset_states), (reverse, all_states, _) = given, options
    if check is not None:
        check(x, states, weights, batch_sizes)
    if batch is None:
        batch = _check_input(x, batch_sizes)
    sizes = _check_weights(cell, x, weights, len(reverse))
    _check_states(cell, x, states, (len(reverse), batch), sizes, "hidden")
    _check_states(cell, x, reset_states, (len(reverse), batch), sizes, "reset")
    return describe(cell.name, inputs, reverse, batch, all_states, grad)


def _remember(key: tuple[object, ...], way: Way) -> None:
    if len(_checked) >= _MOST_CHECKED:
        _checked.clear()
    _checked[key] = way


def _pair(states: States | None) -> tuple[Tensor | None, Tensor | None]:
    """h and c."""
    if not states:
        return None, None
    return states[0], states[1] if len(states) > 1 else None


def is_autocast(device: torch.device) -> bool:
    """Whether an autocast region casts what is on the device: there is none for a meta device."""
    kind = device.type
    return _torch.has_autocast(kind) and torch.is_autocast_enabled(kind)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: double is left alone."""
    stop_at_overrides((tensor,))
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor


def _check_input(x: Tensor, batch_sizes: Tensor | None) -> int:
    """The batch size."""
    if x.layout != torch.strided:
        raise RuntimeError(f"input must be a dense tensor, got {x.layout}")
    expected = 3 if batch_sizes is None else 2
    if x.dim() != expected:
        raise RuntimeError(f"input must have {expected} dimensions, got {x.dim()}")
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if batch_sizes is None:
        return x.shape[1]
    if not torch.compiler.is_compiling():
        if _torch.tracing_state() is not None:
            raise RuntimeError(
                "torch.jit.trace would record the batch sizes of this packed sequence as constants "
                "and give wrong results for others: call the layer with lengths= on the padded "
                "batch, or trace after fastrnn.revert(model)"
            )
        check_batch_sizes(batch_sizes, x.shape[0])
    return int(batch_sizes[0])


def _check_weights(cell: Cell, x: Tensor, weights: Weights, groups: int) -> tuple[int, int]:
    """H and the width of one group's output."""
    if groups == 0 or len(weights) not in (4 * groups, 5 * groups):
        raise RuntimeError(
            f"expected 4 or 5 weights for each of {groups} groups, got {len(weights)}"
        )
    each = len(weights) // groups
    if each == 5 and cell.states == 1:
        raise RuntimeError(f"{cell.name} has no projection: its only state would change its size")
    w_ih, w_hr, columns = weights[0], weights[4] if each == 5 else None, x.shape[-1]
    rows, width = w_ih.shape if w_ih is not None and w_ih.dim() == 2 else (-1, 0)
    H = rows // cell.gates
    out = w_hr.shape[0] if w_hr is not None and w_hr.dim() else H
    if rows < 0 or rows % cell.gates or (w_hr is not None and out == 0):
        shapes = [None if w is None else tuple(w.shape) for w in weights]
        raise RuntimeError(f"weights of shapes {shapes} do not make a {cell.name} layer")
    read = width if groups > 1 and columns == groups * width else columns
    vector = (rows,)
    expected = ((rows, read), (rows, out), vector, vector, (out, H))[:each] * groups
    dtype, device = x.dtype, x.device
    for k, (w, shape) in enumerate(zip(weights, expected, strict=True)):
        if w is None:
            if shape is vector:
                continue
            raise RuntimeError(f"{_NAMES[k % each]} is None")
        if w.shape != shape:
            raise RuntimeError(f"Expected {_NAMES[k % each]} size {shape}, got {list(w.shape)}")
        if w.dtype is not dtype or w.device != device:
            _raise_mismatch(x, w, "parameter")
    return H, out


def _check_steps(
    x: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """`lengths` and `reset` as backends take them."""
    if batch_sizes is not None:
        if lengths is not None or reset is not None:
            raise RuntimeError("a packed sequence takes neither lengths nor reset")
        return None, None
    T, B = x.shape[:2]
    for name, given in (("lengths", lengths), ("reset", reset)):
        if given is not None and given.is_meta and not x.is_meta:
            raise RuntimeError(f"{name} is on the meta device, where it has no values to go by")
    if lengths is not None:
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise RuntimeError(f"lengths must be integers, got {lengths.dtype}")
        if lengths.shape != (B,):
            raise RuntimeError(f"Expected lengths size {(B,)}, got {list(lengths.shape)}")
        if lengths.device.type == "cpu" and _has_values(lengths):
            check_lengths(lengths, T)
        lengths = lengths.to(x.device, torch.int64)
    if reset is not None:
        if reset.dtype != torch.bool:
            raise RuntimeError(
                f"reset must be of dtype torch.bool, got {reset.dtype}: give it as reset.bool()"
            )
        if reset.shape != (T, B):
            raise RuntimeError(f"Expected reset size {(T, B)}, got {list(reset.shape)}")
        reset = reset.to(x.device)
    return lengths, reset


def as_tensor(given: Any, name: str, dtype: torch.dtype) -> Tensor:
    """`given` itself where it is a tensor, or as one on the CPU. `dtype` is that of an empty one,
    whose values tell none.

    Raises:
        TypeError: it is neither a tensor nor an array nor a sequence of numbers.
    """
    if isinstance(given, Tensor):
        return given
    # torch takes no array that runs backwards, and warns of one that may not be written to.
    values = given.copy() if hasattr(given, "copy") else given
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} should be a tensor, a NumPy array or a list, got {type(given).__name__}: "
            f"{error}"
        ) from error
    return tensor if tensor.numel() else tensor.to(dtype)


def _has_values(tensor: Tensor) -> bool:
    """Whether they may be looked at: there are none while a call is traced or transformed."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and _torch.dispatch_modes() == 0
        and not _torch.is_wrapped(tensor)
    )


def _check_states(
    cell: Cell,
    x: Tensor,
    states: States | None,
    lead: tuple[int, int],
    sizes: tuple[int, int],
    name: str,
) -> None:
    """`sizes` are H and the width of one group's output."""
    if states is None:
        return
    if len(states) != cell.states:
        raise RuntimeError(f"{cell.name} expects {cell.states} {name} states, got {len(states)}")
    for k, state in enumerate(states):
        shape = (*lead, sizes[0] if k else sizes[1])
        if state.shape != shape:
            raise wrong_size(f"{name}[{k}]", shape, state)
        if state.dtype != x.dtype or state.device != x.device:
            _raise_mismatch(x, state, name)


def wrong_size(name: str, expected: tuple[int, ...], state: Tensor) -> RuntimeError:
    """torch.nn's error for a state of another size."""
    hint = hint_to_expand(expected, state)
    return RuntimeError(f"Expected {name} size {expected}, got {list(state.shape)}{hint}")


def hint_to_expand(expected: tuple[int, ...], state: Tensor) -> str:
    """The end of an error's text: what to do with a state of one row, where a batch is expected.
    Its batch is the last dimension but one."""
    *lead, B, width = expected
    if tuple(state.shape) != (*lead, 1, width):
        return ""
    sizes = ", ".join(map(str, [*[-1] * len(lead), B, -1]))
    return f"; to begin every row from one state, give it as .expand({sizes})"


def _raise_mismatch(x: Tensor, other: Tensor, what: str) -> None:
    if x.device != other.device:
        raise RuntimeError(
            f"Input and {what} tensors are not at the same device, "
            f"found input tensor at {x.device} and {what} tensor at {other.device}"
        )
    raise RuntimeError(
        f"Input and {what} tensors are not the same dtype, "
        f"found input tensor with {x.dtype} and {what} tensor with {other.dtype}"
    )
