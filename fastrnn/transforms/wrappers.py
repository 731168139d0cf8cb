"""What torch.func's transforms wrap tensors in, level by level, without torch's own machinery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _torch
from .members import Dims


def innermost() -> _torch.CInterpreter | None:  # torch does not tell that there may be none
    return _torch.peek_interpreter()


class Below:
    """Run what is inside below the innermost transform. (torch's own way of it takes longer.)"""

    def __enter__(self) -> None:
        self.level = _torch.pop_interpreter()

    def __exit__(self, *exception: object) -> None:
        _torch.push_interpreter(self.level)


class OneLevel:
    """Let Functions of one level be applied, which only they may that know what a level is."""

    def __enter__(self) -> None:
        self.before = _torch.single_level_allowed()
        _torch.allow_single_level(True)

    def __exit__(self, *exception: object) -> None:
        _torch.allow_single_level(self.before)


def unwrap_members(
    tensors: Sequence[Tensor | None], number: int
) -> tuple[tuple[Tensor | None, ...], Dims]:
    """What the vmap of that level's number has wrapped, and the axes that it hides."""
    unwrap = _torch.unwrap_batched
    pairs = [(None, None) if t is None else unwrap(t, number) for t in tensors]
    given, dims = zip(*pairs, strict=True)
    return given, dims


def wrap_members(tensors: Sequence[Tensor | None], axes: Dims, number: int) -> Any:
    """Undo :func:`unwrap_members`."""
    wrap = _torch.wrap_batched
    pairs = zip(tensors, axes, strict=True)
    wrapped = [None if t is None or axis is None else wrap(t, axis, number) for t, axis in pairs]
    return tuple(wrapped)


def unwrap_tracked(tensors: Sequence[Tensor | None], number: int) -> list[Tensor | None]:
    unwrap = _torch.unwrap_tracked
    return [None if t is None else unwrap(t, number) for t in tensors]


def wrap_tracked(tensors: Sequence[Tensor | None], number: int) -> tuple[Tensor | None, ...]:
    wrap = _torch.wrap_tracked
    return tuple([None if t is None else wrap(t, number) for t in tensors])


def is_inside(level: int, tensors: Sequence[Tensor | None]) -> bool:
    """Whether the transform of that number that wrapped these tensors is still the innermost."""
    now = innermost()
    if now is None or now.level() != level:
        return False
    # The number may be another's by now; then the tensors' wrappers are dead.
    get_level = _torch.level_of
    return any(t is not None and get_level(t) == level for t in tensors)


def is_tracked(tensor: Tensor) -> bool:
    """Whether autograd follows it at any level of transforms; a vmap inside does not show it."""
    while _torch.is_wrapped(tensor):
        if tensor.requires_grad:
            return True
        tensor = _torch.unwrapped(tensor)
    return tensor.requires_grad
