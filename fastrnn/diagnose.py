"""How far back a trained layer's gradient reaches: vanishing and exploding gradients, measured."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from .layout import time_axis, unwrapped
from .tbptt import detached


@dataclass(frozen=True)
class Diagnosis:
    """Norms of a gradient by time lag; print it, or :meth:`plot` it.

    Attributes:
        lags: [K], 1 to K steps.
        norms: for each kind of state, "h" and for cells with one "c", the norm of the last output's
            gradient to the layers' states that many steps before, [L, K] in float64. States in
            named tuples and dicts go by their names there, deeper ones by a path such as "rnn.0".
    """

    lags: Tensor
    norms: dict[str, Tensor]

    def rate(self, state: str = "h") -> Tensor:
        """The factor that a step costs, [L]: the exponential of the slope of log norm over lag by
        least squares. Well below 1 the gradient vanishes, above 1 it explodes; NaN where fewer than
        two norms are positive."""
        return torch.stack([_slope(self.lags, norms) for norms in self.norms[state]]).exp()

    def reach(self, share: float = 0.01, state: str = "h") -> Tensor:
        """The last lag, [L], at which the norm is at least `share` of that at lag 1."""
        norms = self.norms[state]
        return (self.lags * (norms >= share * norms[:, :1])).amax(1)

    def plot(self, ax: Any = None) -> Any:
        """Norm against lag, a line for each layer and kind of state, on matplotlib axes, which are
        made if not given, and returned."""
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.figure().subplots()
        for state, norms in self.norms.items():
            for k, line in enumerate(norms):
                ax.semilogy(
                    self.lags, line, "-" if state == "h" else "--", label=f"{state}, layer {k}"
                )
        ax.set(xlabel="time lag (steps)", ylabel="gradient norm")
        ax.legend()
        return ax

    def __str__(self) -> str:
        lines = []
        for state, norms in self.norms.items():
            rates, reaches = self.rate(state).tolist(), self.reach(state=state).tolist()
            for k, (rate, reach) in enumerate(zip(rates, reaches, strict=True)):
                first, last = norms[k, 0].item(), norms[k, -1].item()
                lines.append(
                    f"{state}, layer {k}: {first:.2e} at lag 1, {last:.2e} at lag "
                    f"{len(self.lags)}, a factor of {rate:.4f} a step, 1% after {reach} steps"
                )
        return "\n".join(lines)


def diagnose(
    layer: Callable[..., tuple[Tensor, Any]],
    x: Tensor,
    hx: Any = None,
    *,
    lags: int | None = None,
    batch_first: bool | None = None,
) -> Diagnosis:
    r"""The norm of the last output's gradient to the states k steps before, for k = 1, 2, ...

    What BPTT hands back over k steps is a product of k Jacobians, which shrinks or grows like a
    power (Bengio, Simard and Frasconi 1994; Pascanu, Mikolov and Bengio 2013, sec. 2.1):

    .. math::
        g_k = \Bigl\lVert v^T \frac{\partial y_T}{\partial h_{T-k}} \Bigr\rVert_2, \qquad
        \frac{\partial h_T}{\partial h_{T-k}} = \prod_{t=T-k+1}^{T} \frac{\partial h_t}{\partial
        h_{t-1}}, \qquad v \text{ random of norm 1}

    as the root mean square over the batch. The layer is called step by step, so this is for a look
    now and then. Dropout is as the layer's mode has it; v is drawn by torch's generator.

    >>> import torch, fastrnn
    >>> found = fastrnn.diagnose(fastrnn.LSTM(3, 8), torch.randn(50, 4, 3))
    >>> found.norms["c"].shape
    torch.Size([1, 49])

    Args:
        layer: called as ``layer(x, hx)`` it returns the output and the states, [L, B, H] each ([L,
            H] unbatched), in any structure that torch.utils._pytree knows: a recurrent layer in one
            direction, or a module around one.
        x: [T, B, I] or [T, I]; [B, T, I] if the batch comes first.
        hx: the states before x.
        lags: look no further back than so many steps; None for T - 1.
        batch_first: as for :func:`fastrnn.tbptt`.

    Raises:
        ValueError: x has fewer than two steps, `lags` is out of range, the layer is bidirectional,
            and its output has no lag to its states, or it does not tell whether the batch comes
            first.
        TypeError: the states are in an object that cannot be detached.
    """
    axis = time_axis(layer, x, batch_first)
    T = x.shape[axis]
    if T < 2:
        raise ValueError(f"a lag takes at least two steps, got {T}")
    lags = T - 1 if lags is None else lags
    if not 1 <= lags < T:
        raise ValueError(f"lags should be from 1 to {T - 1}, got {lags}")
    if getattr(unwrapped(layer), "bidirectional", False):
        raise ValueError("the output of a bidirectional layer has no lag to its states")
    first = T - lags
    with torch.no_grad():
        _, hx, *_ = layer(x.narrow(axis, 0, first), hx)
    with torch.enable_grad():
        hx = tree_map(_leaf, detached(hx))
        states = [_named(hx)]
        for t in range(first, T):
            y, hx, *_ = layer(x.narrow(axis, t, 1), hx)
            states.append(_named(hx))
        v = torch.randn_like(y)
        total = (y * (v / v.norm(dim=-1, keepdim=True))).sum()
        wanted = [s for at_step in reversed(states[:-1]) for s in at_step.values()]
        grads = torch.autograd.grad(total, wanted, materialize_grads=True)
    kinds = list(states[0])
    norms = {}
    for k, kind in enumerate(kinds):
        by_row = torch.stack([_norm_of_rows(d) for d in grads[k :: len(kinds)]], 1)
        norms[kind] = by_row.cpu()
    return Diagnosis(torch.arange(1, lags + 1, device="cpu"), norms)


def _leaf(state: Any) -> Any:
    return state.clone().requires_grad_() if _has_gradient(state) else state


def _named(hx: Any) -> dict[str, Tensor]:
    """The states that can have a gradient, by name."""
    paths = [(keystr(path), s) for path, s in tree_flatten_with_path(hx)[0] if _has_gradient(s)]
    common = {"": "h", "[0]": "h", "[1]": "c"}  # one tensor, or a pair
    if all(path in common for path, _ in paths):
        return {common[path]: s for path, s in paths}
    return {".".join(re.findall(r"\w+", path)): s for path, s in paths}


def _has_gradient(state: Any) -> bool:
    return isinstance(state, Tensor) and state.is_floating_point()


def _norm_of_rows(gradient: Tensor) -> Tensor:
    """[L, B, H] or [L, H] -> [L], the root mean square over B of the norms over H."""
    norms: Tensor = gradient.double().norm(dim=-1)
    return norms.square().mean(1).sqrt() if norms.dim() > 1 else norms


def _slope(lags: Tensor, norms: Tensor) -> Tensor:
    positive = norms > 0
    if int(positive.sum()) < 2:
        return norms.new_tensor(torch.nan)
    lag, log = lags[positive].double(), norms[positive].log()
    lag = lag - lag.mean()
    return (lag * log).sum() / lag.square().sum()
