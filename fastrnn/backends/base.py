"""What a backend is given and what it must answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..cells import Cell

Weights = Sequence[Tensor | None]
SavedShape = tuple[tuple[int, ...], torch.dtype]

# Why a backend is not chosen by itself, for `Backend.on_request`.
UNVALIDATED = (
    "its kernels serve only when asked for by name, until `python -m fastrnn check` has validated "
    "and `python -m fastrnn tune` has timed them on this very device"
)


class Problem(NamedTuple):
    """What a backend needs to know to accept or refuse one layer call.

    Before torch 2.10 Dynamo follows no property of a NamedTuple: what it traces, `supports` and the
    reference's forward pass, reads fields alone."""

    cell: Cell
    dtype: torch.dtype
    device: torch.device
    T: int
    B: int
    I: int
    H: int
    P: int  # size of the projection, 0 without one
    reverse: tuple[bool, ...]  # of each group
    grouped: bool  # group g reads its own columns [g*I, (g+1)*I) of x, rather than all the same
    packed: bool
    lengths: bool
    reset: bool
    all_states: bool  # c after every step is asked for
    grad: bool
    stacked: bool = False  # one tensor of each weight for all groups, of which there are several

    @property
    def G(self) -> int:  # noqa: N802
        """Groups: directions, or members of an ensemble."""
        return len(self.reverse)

    @property
    def out(self) -> int:
        """Width of one group's output."""
        return self.P or self.H

    @property
    def per_group(self) -> int:
        """Weights that a group has, missing biases included."""
        return 5 if self.P else 4

    @property
    def weights(self) -> int:
        """Entries in the flat list of weights."""
        return self.per_group if self.stacked else self.per_group * self.G


class Inputs(NamedTuple):
    """One layer's inputs. `batch_sizes` comes without `lengths` and `reset`."""

    x: Tensor  # [T, B, I] of any strides, or [N, I] when packed; [.., G*I] when grouped
    batch_sizes: Tensor | None  # CPU int64 [T]: a packed sequence's active rows of each step
    lengths: Tensor | None  # int64 [B] on x's device, in 0..T: row b ends before lengths[b]
    reset: Tensor | None  # bool [T, B] on x's device: a new sequence begins at step t of row b
    states: Sequence[Tensor | None]  # h0, c0, h_reset, c_reset
    weights: Weights
    # per group w_ih [gates*H, I], w_hh [gates*H, out], b_ih and b_hh [gates*H] or None, and w_hr
    # [P, H] when the problem has P; stacked, these once, [G, ...] each

    def unbatched(self) -> bool:
        """Whether x is [T, I], one sequence, and comes with weights alone. Differentiable backends
        take that, and :mod:`fastrnn.transforms`: members of a vmap may be its batch."""
        return self.batch_sizes is None and self.x.dim() == 2

    def with_batch(self) -> Inputs:
        """An unbatched sequence as a batch of one."""
        return self._replace(x=self.x.unsqueeze(1))

    def weights_of(self, problem: Problem, group: int) -> Weights:
        """The flat list's part that is of one group."""
        if problem.stacked:
            return [None if w is None else w[group] for w in self.weights]
        each = 5 if problem.P else 4
        return self.weights[group * each :][:each]

    @property
    def h0(self) -> Tensor | None:
        """[G, B, out], None for zeros."""
        return self.states[0]

    @property
    def c0(self) -> Tensor | None:
        """[G, B, H], None for zeros and for cells without c."""
        return self.states[1]

    @property
    def h_reset(self) -> Tensor | None:
        """As h0: what a row takes at a reset."""
        return self.states[2]

    @property
    def c_reset(self) -> Tensor | None:
        """As c0: what a row takes at a reset."""
        return self.states[3]


class Outputs(NamedTuple):
    """What a layer computes, and what its backward pass wants back."""

    y: Tensor  # [T, B, G*out] or [N, G*out], zero at and past a row's length
    h_n: Tensor  # [G, B, out]
    c_n: Tensor | None  # [G, B, H], None for cells without c
    c: Tensor | None  # [T, B, G*H] or [N, G*H], c after every step, None unless asked for
    saved: list[Tensor]

    def without_batch(self) -> Outputs:
        """Those of :meth:`Inputs.with_batch` as of the unbatched sequence."""
        y, h_n, c_n, c = (None if t is None else t.squeeze(1) for t in self[:4])
        return Outputs(y, h_n, c_n, c, self.saved)  # type: ignore[arg-type]


class Grads(NamedTuple):
    """Gradients of the outputs; None stands for zeros."""

    y: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    c: Tensor | None


def check_lengths(lengths: Tensor, T: int) -> None:
    """Raise ValueError unless every length is one of 0 to T; waits for the tensor's device."""
    if bool(((lengths < 0) | (lengths > T)).any()):
        raise ValueError(f"lengths must be between 0 and {T}, got {lengths.tolist()}")


class Backend(Protocol):
    """One implementation of a layer: `G` groups run over a sequence.

    Row b of `lengths` has steps 0 to lengths[b] - 1: what lies past them in x is never read, y and
    c are zero there, and the last states are those after its own last step (its initial states
    where it has none). A group that goes backwards starts at each row's last step.

    ``reset[t, b]`` cuts row b between t - 1 and t: nothing crosses the cut, in either direction of
    time. Going forward the step t starts from h_reset and c_reset, going backwards the step t - 1
    does; at t = 0 the initial state itself is replaced for a group that goes forward, and a group
    that goes backwards has nothing to cut there."""

    name: str
    differentiable: bool  # forward() is plain torch, seen through by autograd: no backward()
    # Why it serves only when asked for by name, or by the device's record; None for others.
    on_request: str | None

    def supports(self, problem: Problem) -> str | None:
        """None, or the reason why this backend does not serve the problem."""

    def forward(self, problem: Problem, inputs: Inputs, save: bool) -> Outputs:
        """Run the layer; `saved` is [] unless `save`."""

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        y: Tensor,
        saved: list[Tensor],
        grads: Grads,
        needs: Sequence[bool],
        samples: int,
    ) -> Sequence[Tensor | None]:
        """The gradients of x, h0, c0, h_reset, c_reset, *weights, None of those not needed.

        With `samples` > 1 the batch is that many blocks of B / samples rows, and the gradient of a
        weight comes for each block apart: [samples, *weight.shape]."""

    def saved_shapes(self, problem: Problem, N: int) -> list[SavedShape]:
        """Shapes and dtypes of what forward() saves, for tracing; N is the number of rows of x.

        [] also where that is no memory that an operator could return, but autograd's graph: then
        backward() takes [] too, and runs the layer again."""


class ComputesNothing:
    """What is left of a :class:`Backend` for calls that are looked at and not run: it takes every
    layer in every dtype, and has the name that a subclass gives it."""

    differentiable = False
    on_request: str | None = None

    def supports(self, problem: Problem) -> str | None:
        return None

    def forward(self, *args: Any) -> Outputs:
        raise NotImplementedError("the layer is not to be run")

    def backward(self, *args: Any) -> NoReturn:
        raise NotImplementedError("the layer is not to be run")

    def saved_shapes(self, problem: Problem, N: int) -> list[SavedShape]:
        return []


@runtime_checkable
class Prepares(Protocol):
    """A backend that can do beforehand all but the arithmetic of a forward pass."""

    def prepare(self, problem: Problem, inputs: Inputs, outputs: Outputs) -> Callable[[], None]:
        """A forward pass without gradients over these very tensors, all contiguous, to be called
        any number of times: it reads what they hold then. The last states may be the initial ones,
        which it overwrites."""


class StepInputs(NamedTuple):
    """A cell's step: its tensors without the dimensions T and G that a layer's have."""

    x: Tensor  # [B, I] of any strides
    h0: Tensor | None  # [B, H], None for zeros
    c0: Tensor | None  # likewise, and for cells without c
    weights: Weights

    def of_layer(self) -> Inputs:
        """Those of a layer of one timestep."""
        h0, c0 = (None if s is None else s.unsqueeze(0) for s in (self.h0, self.c0))
        return Inputs(self.x.unsqueeze(0), None, None, None, (h0, c0, None, None), self.weights)


@runtime_checkable
class TakesSteps(Protocol):
    """A backend that takes a cell's step as it is. One that cannot is given a layer of one
    timestep, which costs a small cell half its time. The problem is the same either way."""

    def step(
        self, problem: Problem, inputs: StepInputs, save: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The new h and c [B, H], c None for cells without, and what the backward pass wants, []
        unless `save`."""

    def step_backward(
        self,
        problem: Problem,
        inputs: StepInputs,
        saved: list[Tensor],
        grads: tuple[Tensor | None, Tensor | None],
        needs: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """The gradients of x, h0, c0 and the weights, None of those not needed, from those of h and
        c, None standing for zeros."""


def unpacked(batch_sizes: Tensor, B: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each batch row's length, and each step's first row, from the rows that a step has; on the
    device, which nobody waits for."""
    sizes = batch_sizes.to(device, non_blocking=True)
    lengths = torch.searchsorted(-sizes, -torch.arange(B, device=device))  # sizes never increase
    return lengths, sizes.cumsum(0) - sizes


def bias_gradients(
    cell: Cell,
    total: Callable[[Tensor], Tensor],
    dgates: tuple[Tensor, Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of b_ih and b_hh, each the `total` of its own dgates; where both share them it is
    taken once."""
    db_ih = total(dgates[0]) if needs[0] else None
    if not needs[1]:
        return db_ih, None
    if db_ih is not None and cell.shared_dgates:
        return db_ih, db_ih.clone()
    return db_ih, total(dgates[1])
