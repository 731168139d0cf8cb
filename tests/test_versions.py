"""What stands in for parts of torch that differ between its versions."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from fastrnn import _torch


@pytest.fixture
def tf32() -> Any:
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_of_cudnn(tf32: None, allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    assert _torch.cudnn_allows_tf32() == allowed
    importlib.import_module("torch.backends.cudnn.rnn")  # hides the settings in torch 2.9
    assert _torch.cudnn_allows_tf32() == allowed


NESTINGS: dict[str, Callable[..., Any]] = {
    "none": lambda f, x: f(x),
    "vmap": lambda f, x: vmap(f)(x),
    "grad": lambda f, x: grad(f)(x),
    "grad in vmap": lambda f, x: vmap(grad(f))(x),
    "vmap in grad": lambda f, x: grad(lambda x: vmap(f)(x).sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_values_under_transforms(nesting: str) -> None:
    """Of a tensor that was there before, and of one that transforms have wrapped."""
    outer, read = torch.tensor([3, 1]), []

    def look(x: Tensor) -> Tensor:
        read.extend([_torch.to_list(outer), _torch.to_list(torch.tensor([2, 1]))])
        return x.square().sum()  # whose transforms are the same as before

    x = torch.arange(6.0).view(2, 3)
    found = NESTINGS[nesting](look, x)
    assert read == [[3, 1], [2, 1]]
    torch.testing.assert_close(found, NESTINGS[nesting](lambda x: x.square().sum(), x))


def test_import_leaves_dynamo_alone() -> None:
    """It takes a second, and most programs never compile."""
    program = "import sys, fastrnn; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
