"""What torch.jit.script makes of a layer."""

from __future__ import annotations

from typing import NoReturn


class NotScriptable:
    """What torch.jit.script cannot compile. It would take a torch.nn layer for it, if it were given
    one here, but also leave that in the model's place."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile fastrnn.{type(self).__name__}: call "
            "torch.jit.script(fastrnn.revert(model)), which shares the Parameters, and "
            "fastrnn.convert(model) after it"
        )
