from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton decides when its functions are defined, so before anything imports it: without a GPU its
# kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same seed and leaves grad mode and thread count as they were."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    assert torch.is_grad_enabled()
    torch.set_num_threads(threads)
