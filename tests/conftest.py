from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest

# Before torch brings OpenMP: waiting threads spin for milliseconds otherwise, and those of several
# test processes keep each other from working.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Triton decides when its functions are defined, so before anything imports it: without a GPU its
# kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No test goes by what a developer's own machine has on record.
os.environ["FASTRNN_CACHE"] = tempfile.mkdtemp(prefix="fastrnn-tests-")

from fastrnn import _C

_C.use_all_threads(True)  # small calls would do without


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that take a minute come first: at the end, the other processes would wait for them."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same seed and leaves grad mode and thread count as they were."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    assert torch.is_grad_enabled()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _device_survived(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a kernel that faulted, all that its process asks of the device fails. It ends where
    pytest-xdist puts another in its place, so that no test fails for what an earlier one did."""
    yield
    if request.node.get_closest_marker("gpu") is None or "PYTEST_XDIST_WORKER" not in os.environ:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        sys.stderr.write(f"{request.node.nodeid} left the device unusable: {error}\n")
        sys.stderr.flush()
        os._exit(1)
