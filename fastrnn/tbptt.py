"""Truncated backpropagation through time over a stream of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .backends import check_lengths
from .functional import as_tensor
from .layout import time_axis, unwrapped


class Window(NamedTuple):
    """One part of the stream: ``y, steps, hx``."""

    y: Tensor  # the layer's output at the new steps, with its graph
    steps: slice  # of the stream, which the new steps are: the targets' as well
    hx: Any  # the states after them, detached


def tbptt(
    layer: Callable[..., tuple[Tensor, Any]],
    x: Tensor,
    hx: Any = None,
    *,
    window: int,
    stride: int | None = None,
    reset: Tensor | None = None,
    lengths: Any = None,
    batch_first: bool | None = None,
) -> Iterator[Window]:
    r"""Run `layer` along `x`, part by part, so that each part's loss can be differentiated alone.

    Every `stride` steps, the loss :math:`E` of these steps is differentiated through the last
    `window` steps: the sum over the states' past that a gradient is (Pascanu, Mikolov and Bengio
    2013, "On the difficulty of training recurrent neural networks", eqs. 3-5) loses its terms from
    further back,

    .. math::
        \frac{\partial E_t}{\partial \theta} \approx \sum_{k = s}^{t} \frac{\partial E_t}{\partial
        h_t} \frac{\partial h_t}{\partial h_k} \frac{\partial^+ h_k}{\partial \theta},
        \quad s = \text{the first step of the window}

    This is BPTT(h; h') of Williams and Peng 1990 ("An efficient gradient-based algorithm for
    on-line training of recurrent network trajectories") with h = window and h' = stride. The states
    are carried from part to part, detached. Where windows overlap (stride < window) the steps that
    they share are run again, with the weights as they then are.

    >>> import torch, fastrnn
    >>> layer, x = fastrnn.GRU(3, 4), torch.randn(100, 2, 3)
    >>> for y, steps, hx in fastrnn.tbptt(layer, x, window=20):
    ...     y.square().mean().backward()  # then clip, let an optimizer step, and set to zero

    Args:
        layer: called as ``layer(x, hx)`` it returns the output and the states: any recurrent layer
            in one direction, or a module around one.
        x: the stream, [T, B, ..] or [T, ..]; [B, T, ..] if the batch comes first. It may be longer
            than memory if it is mapped from a file.
        hx: the states to begin with, as `layer` takes them: a tensor, or tensors in tuples, named
            tuples, lists, dicts and whatever else torch.utils._pytree knows.
        window: steps that a gradient reaches back, the newest included.
        stride: new steps of each part, at most `window`, which is the default.
        reset: bool, shaped as the first two dimensions of x, handed to `layer` part by part.
        lengths: integers [B] from 0 to T: row b ends after lengths[b] steps of the stream. The
            layer is called with ``lengths=``, those of each part; a row that has ended keeps its
            states, and its output is what the layer gives past a row's end: zeros.
        batch_first: whether x is [B, T, ..]. None to learn it from the layer's attribute of this
            name or, of a module around layers, from theirs, through wrappers such as
            DistributedDataParallel. A module that swaps the two dimensions itself has to be told.

    Yields:
        A :class:`Window` for each part; the last one may have fewer steps.

    Raises:
        ValueError: `window`, `stride` or one of `lengths` is out of range, the layer is
            bidirectional, or it does not tell whether the batch comes first.
        TypeError: `lengths` are no integers, or the states are in an object that cannot be
            detached.
    """
    stride = window if stride is None else stride
    if window < 1:
        raise ValueError(f"window should be at least 1, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride should be from 1 to window = {window}, got {stride}")
    if getattr(unwrapped(layer), "bidirectional", False):
        raise ValueError("a bidirectional layer needs the end of the stream at its beginning")
    axis = time_axis(layer, x, batch_first)
    lengths = None if lengths is None else _checked_lengths(lengths, x.shape[axis])
    return _windows(layer, x, detached(hx), (window, stride), reset, lengths, axis)


def _checked_lengths(given: Any, T: int) -> Tensor:
    lengths = as_tensor(given, "lengths", torch.int64)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool:
        raise TypeError(f"lengths should be integers, got {lengths.dtype}")
    check_lengths(lengths, T)
    return lengths


def _windows(
    layer: Callable[..., tuple[Tensor, Any]],
    x: Tensor,
    hx: Any,
    sizes: tuple[int, int],
    reset: Tensor | None,
    lengths: Tensor | None,
    axis: int,
) -> Iterator[Window]:
    (window, stride), T = sizes, x.shape[axis]

    def run(begin: int, end: int, states: Any) -> tuple[Tensor, Any]:
        options = {}
        if reset is not None:
            options["reset"] = reset.narrow(axis, begin, end - begin)
        if lengths is not None:
            options["lengths"] = (lengths - begin).clamp(0, end - begin)
        y, states, *_ = layer(x.narrow(axis, begin, end - begin), states, **options)
        return y, states

    first, states = 0, hx  # where the window begins, and the states before it
    for begin in range(0, T, stride):
        end = min(begin + stride, T)
        following = max(first, min(end + stride, T) - window)  # where the next window begins
        parts, ahead = [], states
        if first < following:
            y, ahead = run(first, following, states)
            parts.append(y)
        last = ahead
        if following < end:
            y, last = run(following, end, ahead)
            parts.append(y)
        y = parts[0] if len(parts) == 1 else torch.cat(parts, axis)
        new = y.narrow(axis, begin - first, end - begin)
        yield Window(new, slice(begin, end), detached(last))
        first, states = following, detached(ahead)


def detached(states: Any) -> Any:
    """The same structure with every tensor detached.

    Raises:
        TypeError: it contains an object that may hide tensors.
    """
    return tree_map(_detached, states)


def _detached(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return leaf
    if callable(getattr(leaf, "detach", None)):
        return leaf.detach()
    raise TypeError(
        f"states in a {type(leaf).__name__} cannot be detached: give it a method detach(), or make "
        "it known by torch.utils._pytree.register_pytree_node"
    )
