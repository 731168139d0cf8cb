"""What recurrent layers and cells remember between the steps of a stream."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .cells import CELLS, States
from .modules import Layers, Step

# Modules are lent memories by one thread at a time.
_turn = threading.RLock()


class Memory:
    """The states of one layer or cell.

    Attributes:
        name: of the module in the model.
        module: whose states they are.
        first: the states that a reset returns to, [L, batch, width] each, L = 1 for a cell.
        carried: the states now, of the same shapes; they are changed in place.
    """

    def __init__(self, name: str, module: Layers | Step, batch: int | None, hx: Any) -> None:
        self.name, self.module = name, module
        rows: tuple[int, ...] = () if batch is None else (batch,)
        L, B, H = 1, batch or 1, module.hidden_size
        widths, lead, steps = [H, H], rows, rows
        if isinstance(module, Layers):
            L, widths = module.num_layers, [module.proj_size or H, H]
            lead, steps = (L, *rows), (1, B)
        widths = widths[: CELLS[module._cell].states]
        shapes = [(L, B, width) for width in widths]
        self._given_shapes = [(*lead, width) for width in widths]
        self._step_shape = (*steps, module.input_size)
        # Lent states are handed to the method that all calls of the module come to: a layer's takes
        # them with all dimensions, a cell's as users give them.
        self._method = "_run" if isinstance(module, Layers) else "_step"
        self._lent_shapes = shapes if isinstance(module, Layers) else self._given_shapes
        zeros = tuple(torch.zeros(shape, device="cpu") for shape in shapes)
        self.first = zeros if hx is None else self._parsed(hx, shapes)
        self.carried = self.first
        self._ends: States | None = None
        self.follow(self.first[0])

    def twin(self) -> Memory:
        """One that goes on from the same states on its own."""
        twin = copy.copy(self)
        twin.follow(self.carried[0])
        return twin

    def follow(self, like: Tensor) -> None:
        """Keep the states in new tensors, of the dtype and on the device of `like`."""
        with torch.inference_mode(False), torch.no_grad():
            self.first = tuple(s.to(like) for s in self.first)
            self.carried = tuple(s.to(like, copy=True) for s in self.carried)

    @property
    def states(self) -> Any:
        """A copy of h, or of (h, c), shaped as the module returns them."""
        states = [
            s.reshape(shape).clone()
            for s, shape in zip(self.carried, self._given_shapes, strict=True)
        ]
        return tuple(states) if len(states) > 1 else states[0]

    @states.setter
    def states(self, hx: Any) -> None:
        self.keep(self._parsed(hx, [s.shape for s in self.carried]))

    def keep(self, states: States) -> None:
        """Go on from these."""
        for mine, state in zip(self.carried, states, strict=True):
            mine.copy_(state.detach().reshape(mine.shape))

    def reset(self, mask: Tensor | None) -> None:
        """Return to the first states in the rows of the mask [batch]; None for all."""
        for mine, first in zip(self.carried, self.first, strict=True):
            rows = None if mask is None else mask.to(mine.device)[:, None]
            mine.copy_(first if rows is None else torch.where(rows, first, mine))

    def reorder(self, rows: Tensor) -> None:
        """Row b goes on from where row ``rows[b]`` is."""
        for mine in self.carried:
            mine.copy_(mine.index_select(1, rows.to(mine.device)))

    def lend(self) -> None:
        """Let the module begin its next call, in this thread, from the carried states, and note
        what it ends with, until :meth:`withdraw`."""
        run, borrower = getattr(self.module, self._method), threading.get_ident()
        carrying = self._run_layer if isinstance(self.module, Layers) else self._run_cell
        self._ends = None

        def lent_to(*args: Any, **options: Any) -> Any:
            own = threading.get_ident() == borrower
            return carrying(run, *args, **options) if own else run(*args, **options)

        self.module.__dict__[self._method] = lent_to

    def withdraw(self) -> None:
        self.module.__dict__.pop(self._method, None)

    def require_call(self) -> None:
        """Raise a RuntimeError unless the module has been called since the states were lent."""
        if self._ends is None:
            raise RuntimeError(
                f"{self._who()} was not called: each recurrent layer of a stream is called once in "
                "a step"
            )

    def keep_ends(self) -> None:
        """Go on from what the module's call has ended with."""
        assert self._ends is not None
        ends, self._ends = self._ends, None
        if ends[0].dtype != self.carried[0].dtype or ends[0].device != self.carried[0].device:
            self.follow(ends[0])
        self.keep(ends)

    def _run_layer(
        self, run: Any, x: Tensor, states: States | None, *args: Any, **options: Any
    ) -> Any:
        self._check(x, states)
        results = run(x, self._lent(x), *args, **options)
        self._ends = results[1]
        return results

    def _run_cell(self, run: Any, x: Tensor, h: Tensor | None, c: Tensor | None) -> States:
        self._check(x, h)
        lent_h, lent_c = (*self._lent(x), None)[:2]
        ends: States = run(x, lent_h, lent_c)
        self._ends = ends
        return ends

    def _check(self, x: Tensor, given: States | Tensor | None) -> None:
        if given is not None:
            raise RuntimeError(
                f"{self._who()} is given hx: in a stream it begins from the states that the stream "
                "carries"
            )
        if self._ends is not None:
            raise RuntimeError(
                f"{self._who()} was called twice: each recurrent layer of a stream is called once "
                "in a step"
            )
        if x.shape != self._step_shape:
            raise ValueError(
                f"{self._who()} got an input of shape {tuple(x.shape)}, time first, where a step "
                f"of the stream is {self._step_shape}; where a model swaps batch and time itself, "
                "say batch_first="
            )

    def _who(self) -> str:
        return f"layer {self.name!r}" if self.name else "the layer"

    def _lent(self, x: Tensor) -> States:
        return tuple(
            s.to(x.device, x.dtype).view(shape)
            for s, shape in zip(self.carried, self._lent_shapes, strict=True)
        )

    def _parsed(self, hx: Any, shapes: Sequence[tuple[int, ...]]) -> States:
        """`hx` of the module's shapes as states of these."""
        given, single = self._given_shapes, len(self._given_shapes) == 1
        if isinstance(self.module, Layers):
            states = self.module._states(hx, len(given[0]))
        elif single or not isinstance(hx, Tensor):
            states = (hx,) if single else tuple(hx)
        else:
            raise ValueError(f"expected states (h, c) of shapes {given}, got one tensor")
        for state, shape in zip(states, given, strict=True):
            if state.shape != shape:
                raise ValueError(f"expected a state of shape {shape}, got {tuple(state.shape)}")
        return tuple(
            s.detach().reshape(shape).clone() for s, shape in zip(states, shapes, strict=True)
        )


@contextmanager
def lent(model: nn.Module, memories: Sequence[Memory]) -> Iterator[None]:
    """While this lasts, the modules of the memories begin from them, and `model`, which has to call
    each once, is in eval mode and computes no gradients. What they end with is kept if nothing is
    raised."""
    with _turn, torch.no_grad():
        training = [module for module in model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            for memory in memories:
                memory.lend()
            yield
        finally:
            for memory in memories:
                memory.withdraw()
            for module in training:
                module.training = True
        for memory in memories:
            memory.require_call()
        for memory in memories:
            memory.keep_ends()
