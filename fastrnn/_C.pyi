"""The extension that csrc/bindings.cpp defines.

The kernels read and write the very tensors given. `forward`, `backward` and a `Prepared` return 0
when done, and else, where the workspace (uint8) is too small, how many bytes it takes. A matrix x
without `batch_sizes` is one step, of which `h_n` may be `y`, and `backward` needs no `y`.
"""

from collections.abc import Sequence

from torch import Tensor

unit_pad: int
max_groups: int

def cells() -> dict[str, tuple[int, int, int, int, bool]]: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str, /) -> None: ...
def use_all_threads(always: bool, /) -> None: ...
def available_cores() -> int: ...
def limit_cores(most: int, /) -> None: ...
def fma_peak(threads: int, seconds: float, /) -> float: ...
def reads_by_table() -> bool: ...
def read_by_table(wanted: bool, /) -> None: ...
def signature(tensors: tuple[Tensor | None, ...], /) -> bytes | None: ...
def forward(
    workspace: Tensor,
    cell: int,
    threads: int,
    reverse: Sequence[bool],
    batch: int,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor | None,
    c: Tensor | None,
    saved: Sequence[Tensor],
    /,
) -> int: ...
def backward(
    workspace: Tensor,
    cell: int,
    threads: int,
    reverse: Sequence[bool],
    batch: int,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    y: Tensor | None,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    dstates: Sequence[Tensor | None],
    dweights: Sequence[Tensor | None],
    samples: int,
    sample_of_row: Tensor | None,
    /,
) -> int: ...

class Prepared:
    """A forward pass over tensors that it keeps alive."""

    def __init__(
        self,
        cell: int,
        threads: int,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Sequence[Tensor | None],
        y: Tensor,
        h_n: Tensor,
        c_n: Tensor | None,
        /,
    ) -> None: ...
    def __call__(self, workspace: Tensor, /) -> int: ...
