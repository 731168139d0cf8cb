"""The extension that csrc/bindings.cpp defines.

Sizes are numbers of elements, `bytes` is of the workspace, and an address is a tensor's data_ptr(),
or 0 where there is no tensor.
"""

from collections.abc import Sequence

unit_pad: int
max_groups: int

def cells() -> dict[str, tuple[int, int, int, int, bool]]: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str, /) -> None: ...
def fma_peak(threads: int, seconds: float, /) -> float: ...

class Layer:
    """One layer and its inputs; it keeps none of their memory alive.

    forward() and backward() return 0 when done, and else, where `bytes` are too few, how many they
    take.
    """

    def __init__(
        self,
        cell: int,
        dtype: int,
        threads: int,
        T: int,
        B: int,
        N: int,
        I: int,
        H: int,
        P: int,
        reverse: Sequence[bool],
        weights: Sequence[int],
        batch_sizes: int,
        x: int,
        x_stride_t: int,
        x_stride_b: int,
        x_stride_g: int,
        h0: int,
        c0: int,
        /,
    ) -> None: ...
    def forward(
        self,
        y: int,
        h_n: int,
        c_n: int,
        c: int,
        gates: int,
        cells: int,
        whole_h: int,
        workspace: int,
        bytes: int,
        /,
    ) -> int: ...
    def backward(
        self,
        y: int,
        gates: int,
        cells: int,
        whole_h: int,
        dy: int,
        dh_n: int,
        dc_n: int,
        dc: int,
        dx: int,
        dh0: int,
        dc0: int,
        dweights: Sequence[int],
        dgates_x: int,
        dgates_h: int,
        dprojection: int,
        workspace: int,
        bytes: int,
        /,
    ) -> int: ...
