"""What torch.jit.script and torch.fx make of a layer."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

# What torch.fx passes for a tensor. Any, for mypy knows that a Tensor is none.
Proxy: Any = torch.fx.Proxy


class NotScriptable:
    """What torch.jit.script cannot compile. It would take a torch.nn layer for it, if it were given
    one here, but also leave that in the model's place."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile fastrnn.{type(self).__name__}: call "
            "torch.jit.script(fastrnn.revert(model)), which shares the Parameters, and "
            "fastrnn.convert(model) after it"
        )


def record(module: nn.Module, input: Any, hx: Any, **options: Any) -> Any:
    """The call of a module as one node of the graph that torch.fx traces, as torch.nn's are."""
    args = (input,) if hx is None else (input, hx)
    given = {name: value for name, value in options.items() if value is not None}
    tracer = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, given)
