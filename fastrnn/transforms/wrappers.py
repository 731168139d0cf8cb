"""What torch.func's transforms wrap tensors in, level by level, without torch's own machinery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    CInterpreter,
    get_single_level_autograd_function_allowed,
    peek_interpreter_stack,
    pop_dynamic_layer_stack,
    push_dynamic_layer_stack,
    set_single_level_autograd_function_allowed,
)

from .members import Dims


def innermost() -> CInterpreter | None:  # torch does not tell that there may be none
    return peek_interpreter_stack()


class Below:
    """Run what is inside below the innermost transform. (torch's own way of it takes longer.)"""

    def __enter__(self) -> None:
        self.level = pop_dynamic_layer_stack()

    def __exit__(self, *exception: object) -> None:
        push_dynamic_layer_stack(self.level)


class OneLevel:
    """Let Functions of one level be applied, which only they may that know what a level is."""

    def __enter__(self) -> None:
        self.before = get_single_level_autograd_function_allowed()
        set_single_level_autograd_function_allowed(True)

    def __exit__(self, *exception: object) -> None:
        set_single_level_autograd_function_allowed(self.before)


def unwrap_members(
    tensors: Sequence[Tensor | None], number: int
) -> tuple[tuple[Tensor | None, ...], Dims]:
    """What the vmap of that level's number has wrapped, and the axes that it hides."""
    unwrap = torch._C._functorch._unwrap_batched
    pairs = [(None, None) if t is None else unwrap(t, number) for t in tensors]
    given, dims = zip(*pairs, strict=True)
    return given, dims


def wrap_members(tensors: Sequence[Tensor | None], axes: Dims, number: int) -> Any:
    """Undo :func:`unwrap_members`."""
    wrap = torch._C._functorch._add_batch_dim
    pairs = zip(tensors, axes, strict=True)
    wrapped = [None if t is None or axis is None else wrap(t, axis, number) for t, axis in pairs]
    return tuple(wrapped)


def unwrap_tracked(tensors: Sequence[Tensor | None], number: int) -> list[Tensor | None]:
    unwrap = torch._C._functorch._unwrap_for_grad
    return [None if t is None else unwrap(t, number) for t in tensors]


def wrap_tracked(tensors: Sequence[Tensor | None], number: int) -> tuple[Tensor | None, ...]:
    wrap = torch._C._functorch._wrap_for_grad
    return tuple([None if t is None else wrap(t, number) for t in tensors])


def is_inside(level: int, tensors: Sequence[Tensor | None]) -> bool:
    """Whether the transform of that number that wrapped these tensors is still the innermost."""
    now = innermost()
    if now is None or now.level() != level:
        return False
    # The number may be another's by now; then the tensors' wrappers are dead.
    get_level = torch._C._functorch.maybe_get_level
    return any(t is not None and get_level(t) == level for t in tensors)


def is_tracked(tensor: Tensor) -> bool:
    """Whether autograd follows it at any level of transforms; a vmap inside does not show it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad:
            return True
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad
