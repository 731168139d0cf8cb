"""What the benchmarks take for a right result."""

from __future__ import annotations

import pytest
import torch

from benchmarks.fuzz import Draw, Setup
from fastrnn.validation import WrongResultError

SMALL = Draw("rnn_relu", "bf16", "training", 20, 4, 30, 29)
# With some seed below 8, rounding moves a state of each to the other side of the ReLU's kink.
KINKS = [
    SMALL._replace(hx=True),
    SMALL._replace(bidirectional=True, packed=True),
    SMALL._replace(num_layers=3, bidirectional=True, packed=True, hx=True),
]


@pytest.mark.parametrize("draw", KINKS, ids=str)
def test_either_slope_at_a_kink_is_right(draw: Draw) -> None:
    for seed in range(8):
        Setup(draw, seed).check()


@pytest.mark.parametrize("draw", [SMALL, *KINKS, SMALL._replace(T=0, B=64)], ids=str)
def test_a_wrong_gradient_is_found_at_kinks_too(draw: Draw) -> None:
    setup = Setup(draw, 0)
    weight = next(setup.modules["fastrnn"].parameters())
    weight.register_hook(lambda grad: grad * torch.tensor(1.1, dtype=grad.dtype))
    with pytest.raises(WrongResultError, match="dweight_ih"):
        setup.check()
