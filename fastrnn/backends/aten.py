"""torch's own fused layers: cuDNN's, MIOpen's, Metal's, oneDNN's, or whatever a device has.

The functions are those that torch.nn's layers call, one layer at a time, so that what they compute
and what they cost is what torch.nn's layers compute and cost, wherever torch runs.

They have no backward pass that could be called: autograd records one while they run. So a forward
pass that is to be differentiated runs with autograd switched on, on leaves of its own, and saves
its outputs and those leaves, tensors that hold autograd's graph between them. Saved as any others
are, they take it with them when they go. An operator cannot return a graph: what has gone through
operators saves nothing, and its backward pass runs the layer again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch
from ..cells import Cell
from .base import Grads, Inputs, Outputs, Problem, SavedShape, StepInputs, Weights, unpacked
from .segments import packed


class _Functions(NamedTuple):
    """What torch has for a cell: over many steps, and over one."""

    layer: Callable[..., Any]
    step: Callable[..., Any]


FUNCTIONS = {
    "lstm": _Functions(torch.lstm, torch.lstm_cell),
    "gru": _Functions(torch.gru, torch.gru_cell),
    "rnn_tanh": _Functions(torch.rnn_tanh, torch.rnn_tanh_cell),
    "rnn_relu": _Functions(torch.rnn_relu, torch.rnn_relu_cell),
}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DIRECTIONS = ((False,), (True,), (False, True))
_MOST_STEPS = 65535  # of cuDNN


class _Aten:
    """See :class:`fastrnn.backends.Backend`.

    Lengths and resets make a packed sequence of a batch, whose batch sizes torch wants on the CPU:
    where they are on another device, the call waits for that device."""

    name = "aten"
    differentiable = False
    on_request: str | None = None

    def supports(self, problem: Problem) -> str | None:
        if problem.cell.name not in FUNCTIONS:
            return f"torch has no layer for the cell {problem.cell.name}"
        if problem.dtype not in _DTYPES:
            return f"torch's layers take floats of 16, 32 and 64 bits, not {problem.dtype}"
        if problem.all_states:
            return "torch's layers do not return the cell state of every step"
        if problem.reverse not in _DIRECTIONS:
            return (
                f"torch's layers have one direction or two, not {len(problem.reverse)} other groups"
            )
        if problem.grouped:
            return "the directions of torch's layers read the same input"
        if problem.stacked:
            return "torch's layers take the weights of each direction apart"
        device = problem.device.type
        if device == "mps" and problem.P:
            return "torch's layers on Metal have no proj_size"
        if device == "cuda" and problem.T > _MOST_STEPS:
            return f"cuDNN takes at most {_MOST_STEPS} steps"
        return None

    def saved_shapes(self, problem: Problem, N: int) -> list[SavedShape]:
        return []

    def forward(self, problem: Problem, inputs: Inputs, save: bool) -> Outputs:
        given = inputs._replace(weights=_for_cudnn(problem, inputs.weights))
        if not problem.grad:
            with torch.no_grad():
                return _run(problem, given)
        places = _detached((given.x, *given.states, *given.weights))
        leaves = [t for t in places if t is not None]
        ours = given._replace(x=leaves[0], states=places[1:5], weights=places[5:])
        if not save:
            # For the same bits: torch may have other kernels where gradients are not enabled.
            with torch.enable_grad():
                return _run(problem, ours)
        with _recording(leaves):
            y, h_n, c_n, _, _ = _run(problem, ours)
        graph = [y, h_n] if c_n is None else [y, h_n, c_n]
        # As no views, and so that they may be changed while autograd keeps what it has: its graph
        # holds none of the last states, and who changes y is found out where that is saved.
        y, h_n, *ends = (t.data for t in graph)
        return Outputs(y, h_n, ends[0] if ends else None, None, graph + leaves)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        y: Tensor,
        saved: list[Tensor],
        grads: Grads,
        needs: Sequence[bool],
        samples: int,
    ) -> list[Tensor | None]:
        if samples > 1:
            return _backward_apart(problem, inputs, grads, needs, samples)
        if not saved:
            saved = self.forward(problem, inputs, True).saved
        outputs = 1 + problem.cell.states
        given = [t is not None for t in (inputs.x, *inputs.states, *inputs.weights)]
        leaves = list(compress(saved[outputs:], compress(needs, given)))
        found = iter(_gradients(saved[:outputs], grads, leaves))
        each = zip(needs, given, strict=True)
        return [next(found) if needed and is_given else None for needed, is_given in each]


ATEN = _Aten()


def _detached(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach() for t in tensors]


def _gradients(outputs: list[Tensor], grads: Grads, leaves: list[Tensor]) -> list[Tensor]:
    """By autograd, whose graph stays for a second time."""
    pairs = zip(outputs, grads, strict=False)  # no gradient of c of every step
    used = [(o, g) for o, g in pairs if g is not None and o.requires_grad]
    if not used or not leaves:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(
        [o for o, _ in used],
        leaves,
        [g for _, g in used],
        retain_graph=True,
        materialize_grads=True,
    )
    return _apart(found, [g for _, g in used])


def _apart(found: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients in memory of their own: autograd hands the same tensor to several leaves."""
    taken = {g.untyped_storage().data_ptr() for g in grads}
    apart = []
    for tensor in found:
        memory = tensor.untyped_storage().data_ptr()
        own = memory not in taken and tensor.is_contiguous()
        taken.add(memory)
        apart.append(tensor if own else tensor.clone(memory_format=torch.contiguous_format))
    return apart


@contextmanager
def _recording(leaves: list[Tensor]) -> Iterator[None]:
    """Autograd records what is done with them, and follows what is done to views, also within an
    operator: the dispatcher may call that with both out of the way."""
    for leaf in leaves:
        leaf.requires_grad_()
    with (
        torch.enable_grad(),
        _torch.set_excluded_key(_torch.DispatchKey.AutogradFunctionality, False),
        _torch.set_excluded_key(_torch.DispatchKey.ADInplaceOrView, False),
    ):
        yield


def flatten(cell: Cell, weights: Sequence[Tensor], directions: int) -> None:
    """Move a layer's weights, in place, to where cuDNN reads them without a copy: into one piece of
    memory, in an order of its own. It calls what torch.nn's ``flatten_parameters`` calls, for one
    layer."""
    each = len(weights) // directions
    w_ih, w_hh = weights[:2]
    H = w_ih.shape[0] // cell.gates
    P = w_hh.shape[1] if each % 2 else 0
    mode = _torch.cudnn_mode(cell.name.upper())
    with torch.no_grad(), torch.cuda.device_of(w_ih):  # type: ignore[no-untyped-call]
        torch._cudnn_rnn_flatten_weight(
            list(weights), each, w_ih.shape[1], mode, H, P, 1, False, directions == 2
        )


def is_for_cudnn(weight: Tensor) -> bool:
    """Whether cuDNN would read it, in the memory to which :func:`flatten` moves it."""
    return weight.is_cuda and torch.cudnn_is_acceptable(weight)


def is_flat(weights: Sequence[Tensor]) -> bool:
    """Whether they lie as :func:`flatten` leaves them: from the beginning of memory that has no
    room for another layer's, as there is when torch.nn has flattened several layers together."""
    first, w_hh = weights[0].untyped_storage(), weights[1]
    if any(w.untyped_storage().data_ptr() != first.data_ptr() for w in weights):
        return False
    room = first.nbytes() - sum(w.nbytes for w in weights)
    return weights[0].data_ptr() == first.data_ptr() and room < w_hh.nbytes


def _for_cudnn(problem: Problem, weights: Weights) -> Weights:
    """The weights, or a copy that lies as cuDNN reads them: otherwise it would copy them itself,
    and warn in every call."""
    present = [w for w in weights if w is not None]
    if not is_for_cudnn(present[0]) or is_flat(present):
        return weights
    with torch.no_grad():  # tensors that can be moved while the weights stay
        moved = [None if w is None else _alias(w) for w in weights]
    flatten(problem.cell, [w for w in moved if w is not None], problem.G)
    return moved


def _alias(tensor: Tensor) -> Tensor:
    memory = tensor.untyped_storage()
    return tensor.new_empty(0).set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def _run(problem: Problem, inputs: Inputs) -> Outputs:
    """In operations that autograd can record."""
    if problem.lengths or problem.reset:
        return _run_cut(problem, inputs)
    if problem.T == 0:
        return _without_steps(problem, inputs)
    if problem.reverse == (True,):
        return _run_backwards(problem, inputs)
    if _is_step(problem):
        return _run_step(problem, inputs)
    return _layer(problem, inputs)


def _layer(problem: Problem, inputs: Inputs) -> Outputs:
    x, batch_sizes = inputs.x, inputs.batch_sizes
    run = FUNCTIONS[problem.cell.name].layer
    states, params = _initial(problem, inputs), _params(problem, x, inputs.weights)
    # Whether a layer is in training mode does not matter, as there is no dropout inside; but cuDNN
    # has no backward pass where it is not.
    options = (params, len(params) == problem.weights, 1, 0.0, problem.grad, problem.G == 2)
    if batch_sizes is None:
        y, *ends = run(x, _as_hx(states), *options, False)
        return Outputs(y, ends[0], ends[1] if len(ends) > 1 else None, None, [])
    # Rows of the batch without a step are the last, and keep their states.
    rows = int(batch_sizes[0])
    y, *ends = run(x, batch_sizes, _as_hx([s[:, :rows] for s in states]), *options)
    if rows < problem.B:
        ends = [torch.cat([e, s[:, rows:]], 1) for e, s in zip(ends, states, strict=True)]
    return Outputs(y, ends[0], ends[1] if len(ends) > 1 else None, None, [])


def _is_step(problem: Problem) -> bool:
    """Whether it is one that torch.nn has a cell for."""
    return problem.T == problem.G == 1 and not problem.packed and not problem.P


def _run_step(problem: Problem, inputs: Inputs) -> Outputs:
    x, states = inputs.x[0], [None if s is None else s[0] for s in inputs.states]
    h, *c = _step(problem, StepInputs(x, states[0], states[1], inputs.weights))
    y, h_n, *c_n = (torch.stack([t]) for t in (h, h, *c))  # in memory of their own
    return Outputs(y, h_n, c_n[0] if c_n else None, None, [])


def _step(problem: Problem, step: StepInputs) -> list[Tensor]:
    """The new states of one step, as torch.nn's cells compute them."""
    x, h0, c0, weights = step
    states = [
        x.new_zeros(problem.B, problem.H) if s is None else s
        for s in (h0, c0)[: problem.cell.states]
    ]
    params = _params(problem, x, weights)
    found = FUNCTIONS[problem.cell.name].step(x, _as_hx(states), *params)
    return [found] if problem.cell.states == 1 else list(found)


def _without_steps(problem: Problem, inputs: Inputs) -> Outputs:
    y = inputs.x.new_zeros((*inputs.x.shape[:-1], problem.G * problem.out))
    h_n, *c_n = (s.clone() for s in _initial(problem, inputs))
    return Outputs(y, h_n, c_n[0] if c_n else None, None, [])


def _run_backwards(problem: Problem, inputs: Inputs) -> Outputs:
    """One direction, the other one: forwards over every row's steps in their opposite order."""
    forwards = problem._replace(reverse=(False,))
    sizes = inputs.batch_sizes
    if sizes is None:
        found = _run(forwards, inputs._replace(x=inputs.x.flip(0)))
        return found._replace(y=found.y.flip(0))
    mirror = _mirror(sizes).to(problem.device)
    found = _run(forwards, inputs._replace(x=inputs.x.index_select(0, mirror)))
    return found._replace(y=found.y.index_select(0, mirror))


def _mirror(batch_sizes: Tensor) -> Tensor:
    """For each row of a packed sequence, [N], that of the same step counted from its end."""
    T, B = len(batch_sizes), int(batch_sizes[0])
    lengths, offsets = unpacked(batch_sizes, B, batch_sizes.device)
    step = torch.repeat_interleave(torch.arange(T, device="cpu"), batch_sizes)
    column = torch.arange(len(step), device="cpu") - offsets[step]
    return offsets[lengths[column] - 1 - step] + column


def _run_cut(problem: Problem, inputs: Inputs) -> Outputs:
    """Of a batch with lengths or resets: that of the packed batch of its segments."""
    ours, given, cuts = packed(problem, inputs)
    y, h_n, c_n, _, _ = _run(ours, given)
    return Outputs(
        cuts.scatter(y, problem.T, problem.B),
        cuts.final(problem, h_n, inputs.h0),
        None if c_n is None else cuts.final(problem, c_n, inputs.c0),
        None,
        [],
    )


def _initial(problem: Problem, inputs: Inputs) -> list[Tensor]:
    """h [G, B, out], and c [G, B, H] of cells with one."""
    widths = (problem.out, problem.H)[: problem.cell.states]
    return [
        inputs.x.new_zeros(problem.G, problem.B, width) if s is None else s
        for s, width in zip(inputs.states, widths, strict=False)
    ]


def _params(problem: Problem, x: Tensor, weights: Weights) -> list[Tensor]:
    """The weights as torch takes them: with both biases, or with neither."""
    present = [w for w in weights if w is not None]
    if len(present) in (len(weights), len(weights) - 2 * problem.G):
        return present
    zeros = x.new_zeros(problem.cell.gates * problem.H)
    return [zeros if w is None else w for w in weights]


def _as_hx(states: list[Tensor]) -> Tensor | list[Tensor]:
    return states if len(states) > 1 else states[0]


def _backward_apart(
    problem: Problem, inputs: Inputs, grads: Grads, needs: Sequence[bool], samples: int
) -> list[Tensor | None]:
    """The gradients of weights for each of `samples` blocks of rows apart: block after block."""
    x, size = inputs.x, problem.B // samples
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    by_block: list[list[Tensor | None]] = []
    for first in range(0, problem.B, size):
        block = slice(first, first + size)
        steps = _steps_of(inputs, block)
        ours, given = _narrowed(problem, inputs, block, steps)
        arriving = Grads(
            None if grads.y is None else grads.y[steps],
            None if grads.h_n is None else grads.h_n[:, block],
            None if grads.c_n is None else grads.c_n[:, block],
            None,
        )
        dx_block, *others = ATEN.backward(ours, given, given.x, [], arriving, needs, 1)
        if dx is not None and dx_block is not None:
            dx[steps] = dx_block
        by_block.append(others)
    dstates, dweights = by_block[0][:4], by_block[0][4:]
    joined = [_join(k, by_block, torch.cat, 1) for k in range(len(dstates))]
    stacked = [_join(4 + k, by_block, torch.stack, 0) for k in range(len(dweights))]
    return [dx, *joined, *stacked]


def _join(
    place: int, by_block: list[list[Tensor | None]], join: Callable[..., Tensor], axis: int
) -> Tensor | None:
    found = [d for block in by_block if (d := block[place]) is not None]
    return join(found, axis) if found else None


def _steps_of(inputs: Inputs, block: slice) -> Any:
    """Indexes what has a row for each step of each of these rows of the batch."""
    sizes = inputs.batch_sizes
    if sizes is None:
        return slice(None), block
    step = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), sizes)
    column = torch.arange(len(step), device="cpu") - (sizes.cumsum(0) - sizes)[step]
    return ((column >= block.start) & (column < block.stop)).nonzero().squeeze(1)


def _narrowed(problem: Problem, inputs: Inputs, block: slice, steps: Any) -> tuple[Problem, Inputs]:
    """The layer over these rows of the batch alone."""
    x, sizes, lengths, reset, states, weights = inputs
    if sizes is not None:
        sizes = (sizes - block.start).clamp(0, block.stop - block.start)
        sizes = sizes[sizes > 0]
        problem = problem._replace(T=len(sizes))
    given = Inputs(
        x[steps],
        sizes,
        None if lengths is None else lengths[block],
        None if reset is None else reset[:, block],
        [None if s is None else s[:, block] for s in states],
        weights,
    )
    return problem._replace(B=block.stop - block.start), given
