"""The extension that csrc/cuda/bindings.cpp defines.

An address is a tensor's data_ptr(); `tensors` has those that are there by the names of
csrc/cuda/args.h, and `weights` w_hh and b_hh of each group, 0 where there is none.
"""

from collections.abc import Mapping, Sequence

max_groups: int

class Limits:
    def __init__(
        self,
        capability: int,
        multiprocessors: int,
        shared_bytes: int,
        cluster: int,
        at_once: Sequence[int] = ...,
    ) -> None: ...
    @property
    def capability(self) -> int: ...
    @property
    def multiprocessors(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def cluster(self) -> int: ...
    @property
    def at_once(self) -> list[int]: ...

class Plan:
    @property
    def tier(self) -> str: ...
    @property
    def slices(self) -> int: ...
    @property
    def replicas(self) -> int: ...
    @property
    def unit_tiles(self) -> int: ...
    @property
    def batch_tiles(self) -> int: ...
    @property
    def resident_chunks(self) -> int: ...
    @property
    def streamed(self) -> bool: ...
    @property
    def groups(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def rows_a_pass(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def flag_words(self) -> int: ...

def cells() -> dict[str, tuple[int, int, int, int, bool]]: ...
def unavailable() -> str: ...
def device_limits(index: int, /) -> Limits: ...
def plan(
    cell: int,
    precision: int,
    T: int,
    B: int,
    H: int,
    G: int,
    backward: bool,
    limits: Limits,
    /,
) -> Plan: ...
def forward(
    plan: Plan,
    N: int,
    weights: Sequence[int],
    reverse: Sequence[bool],
    tensors: Mapping[str, int],
    poll_limit: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def backward(
    plan: Plan,
    N: int,
    weights: Sequence[int],
    reverse: Sequence[bool],
    tensors: Mapping[str, int],
    poll_limit: int,
    device: int,
    stream: int,
    /,
) -> None: ...
