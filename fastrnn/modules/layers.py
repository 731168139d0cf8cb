"""RNN, LSTM and GRU: whole sequences, any number of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import RNNBase
from torch.nn.functional import dropout as _dropout
from torch.nn.utils.rnn import PackedSequence

from .. import _torch, by_torch, functional
from ..backends import Weights, aten, check_batch_sizes
from ..cells import CELLS, States
from ..plain import OverriddenError, put_aside_default_device, stop_at_overrides
from .identity import AnswersAsTorch
from .tracing import NotScriptable, Proxy, record

Device = torch.device | str | int | None

# What torch.nn's layers lack: off in the class, and an attribute of the instance only when asked
# for, so that convert() and pickles need know nothing of them.
OWN_OPTIONS = ("return_states", "return_layers", "weight_dropout", "recompute")


def _as_it_is(steps: Tensor) -> Tensor:
    return steps


def _batch_first(steps: Tensor) -> Tensor:
    return steps.transpose(0, 1)


def _unbatched(steps: Tensor) -> Tensor:
    return steps.squeeze(1)


class Layers(AnswersAsTorch, NotScriptable, RNNBase):
    """What RNN, LSTM and GRU share. Parameters, their names and their initialisation are
    RNNBase's."""

    _kind: ClassVar[str]
    _twin: ClassVar[Any]  # torch.nn's class of the same name
    _rank_text: ClassVar[str] = "{}: Expected input to be 2D or 3D, got {}D instead"
    return_states: bool = False
    return_layers: bool = False
    weight_dropout: float = 0  # which torch.compile takes for a constant, as it does not 0.0
    recompute: int = 0

    def extra_repr(self) -> str:
        """As torch.nn's, with the options that it does not have where they are in use."""
        own = [f"{name}={getattr(self, name)}" for name in OWN_OPTIONS if getattr(self, name)]
        return ", ".join([super().extra_repr(), *own])

    def _return_more(self, states: bool, layers: bool) -> None:
        if states:
            self.return_states = True
        if layers:
            self.return_layers = True

    def _keep_every(self, recompute: int) -> None:
        if isinstance(recompute, bool) or not isinstance(recompute, int):
            raise TypeError(f"recompute should be of type int, got: {type(recompute).__name__}")
        if recompute < 0:
            raise ValueError(f"recompute should be 0 or a number of steps, got {recompute}")
        if recompute:
            self.recompute = recompute

    def flatten_parameters(self) -> None:
        """Move the parameters of each layer, in place, to where cuDNN reads them without a copy in
        every call. Only on a GPU on which torch has cuDNN; other kernels read parameters where they
        are. It is called where torch.nn's layers call theirs: when a layer is made or moved."""
        for flat in self._flattenable():
            aten.flatten(CELLS[self._cell], flat, 2 if self.bidirectional else 1)

    def _flattenable(self) -> list[list[Tensor]]:
        """The weights of each layer, if all of them are parameters of their own."""
        names = [name for layer in self._all_weights for name in layer]
        if any(type(self._parameters.get(name)) is not torch.nn.Parameter for name in names):
            return []
        layers = [[w for w in flat if w is not None] for flat in self._weights()]
        weights = [w for flat in layers for w in flat]
        if not all(map(aten.is_for_cudnn, weights)):
            return []
        return layers if len({w.data_ptr() for w in weights}) == len(weights) else []

    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        reset: Any = None,
        reset_hx: Any = None,
    ) -> Any:
        """Run the layers over `input`; shapes and errors are those of the class of the same name in
        torch.nn. What torch.nn does not have:

        Args:
            lengths: integers [B], unsorted, zeros allowed, a tensor on any device, a list or a
                NumPy array: row b has lengths[b] steps. What lies past them is never read, the
                output is zero there, and the last states are those after each row's own last step,
                in both directions.
            reset: bool [T, B] ([B, T] if batch_first, [T] unbatched), a tensor, nested lists or a
                NumPy array: a new sequence begins at step t of row b. Nothing crosses the cut
                between t - 1 and t, neither states nor gradients, in either direction.
            reset_hx: the states that rows take at a reset, shaped as hx or with a batch size of 1;
                None for zeros.

        Raises:
            TypeError: an argument is not of a kind that it may be of.
            ValueError: a length is below 0 or above T.
            RuntimeError: `lengths` or `reset` has another shape or dtype, or comes with a
                PackedSequence.
        """
        if not isinstance(self, Layers):  # called by who wrapped this method before revert()
            return type(self).forward(self, input, hx)  # type: ignore[unreachable]
        # Parametrizations, which are modules inside, are code of the user's.
        aside = None if self._modules else put_aside_default_device()
        if aside is None:
            return self._forward(input, hx, lengths, reset, reset_hx)
        try:
            return self._forward(input, hx, lengths, reset, reset_hx)
        finally:
            _torch.push_function_mode(aside)

    def _forward(self, input: Any, hx: Any, lengths: Any, reset: Any, reset_hx: Any) -> Any:
        """See :meth:`forward`."""
        try:
            if type(input) is not Tensor:
                if isinstance(input, PackedSequence):
                    if lengths is not None or reset is not None:
                        raise RuntimeError("a PackedSequence takes neither lengths nor reset")
                    return self._forward_packed(input, hx)
                if isinstance(input, Proxy):
                    return record(self, input, hx, lengths=lengths, reset=reset, reset_hx=reset_hx)
                stop_at_overrides((input,))
            return self._forward_padded(input, hx, lengths, reset, reset_hx)
        except OverriddenError as error:
            given = {"lengths": lengths, "reset": reset, "reset_hx": reset_hx}
            return self._forward_of_torch(input, hx, error, given)

    def _forward_of_torch(
        self, input: Any, hx: Any, reason: OverriddenError, given: dict[str, Any]
    ) -> Any:
        """The forward of torch.nn's class, on the same weights: for what overrides its functions.
        `given` are the arguments that it does not take."""
        options = [name for name in OWN_OPTIONS if name != "recompute" and getattr(self, name)]
        asked = [name for name, value in given.items() if value is not None]
        for name in (*asked, *options):
            raise TypeError(f"{reason}; torch.nn, which serves it, has no {name}") from None
        return self._twin.forward(self, input, hx)

    def _forward_padded(self, input: Any, hx: Any, lengths: Any, reset: Any, reset_hx: Any) -> Any:
        try:
            rank = input.dim()
        except AttributeError:
            raise TypeError(not_a_tensor(self._kind, "input", input)) from None
        if rank not in (2, 3):
            raise ValueError(self._rank_text.format(self._kind, rank))
        states = None if hx is None else self._states(hx, rank)
        resets = None if reset_hx is None else self._states(reset_hx, rank)
        if lengths is not None:
            lengths = functional.as_tensor(lengths, "lengths", torch.int64)
        if reset is not None:
            reset = functional.as_tensor(reset, "reset", torch.bool)
        if rank == 2:
            if lengths is not None:
                raise RuntimeError("lengths needs batched 3-D input")
            return self._forward_unbatched(input, states, reset, resets)
        x = input
        if self.batch_first:
            if reset is not None and reset.shape != input.shape[:2]:
                expected = tuple(input.shape[:2])
                raise RuntimeError(f"Expected reset size {expected}, got {list(reset.shape)}")
            x, reset = x.transpose(0, 1), None if reset is None else reset.t()
        if resets is not None:
            resets = tuple(s.expand(-1, x.shape[1], -1) for s in resets)
        results = self._run(x, states, lengths=lengths, reset=reset, reset_hx=resets)
        return self._results(*results, _batch_first if self.batch_first else _as_it_is)

    def _forward_unbatched(
        self, x: Tensor, states: States | None, reset: Tensor | None, resets: States | None
    ) -> Any:
        alone = states is None and reset is None and resets is None
        if alone and _torch.transforms_active():
            return self._results(*self._run(x, None))  # a vmap's members may be the batch
        y, ends, c, layers = self._run(
            x.unsqueeze(1),
            None if states is None else tuple(s.unsqueeze(1) for s in states),
            reset=None if reset is None else reset.unsqueeze(1),
            reset_hx=None if resets is None else tuple(s.unsqueeze(1) for s in resets),
        )
        return self._results(y, tuple(s.squeeze(1) for s in ends), c, layers, _unbatched)

    def _forward_packed(self, input: PackedSequence, hx: Any) -> Any:
        data, batch_sizes, order, back = input
        states = None if hx is None else self._states(hx, None)
        y, ends, c, layers = self._run(data, states, batch_sizes, order)

        def packed(rows: Tensor) -> PackedSequence:
            return PackedSequence(rows, batch_sizes, order, back)

        return self._results(y, _permute(ends, back), c, layers, packed)

    def _results(
        self,
        y: Any,
        ends: States,
        c: Tensor | None,
        layers: list[States],
        lay: Callable[[Tensor], Any] = _as_it_is,
    ) -> Any:
        """What a call returns; `lay` gives what has a time dimension the layout of the input."""
        y = lay(y)
        if not self.return_states and not self.return_layers:
            return y, self._hidden(ends)
        results = [y, self._hidden(ends)]
        if self.return_states:
            results.append(y if c is None else lay(c))
        if self.return_layers:
            results.append([self._hidden(tuple(map(lay, states))) for states in layers])
        return tuple(results)

    def _run(
        self,
        x: Tensor,
        states: States | None,
        batch_sizes: Tensor | None = None,
        order: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_hx: States | None = None,
    ) -> tuple[Tensor, States, Tensor | None, list[States]]:
        """y, the last states, c of every step or None, and with return_layers all states of every
        layer."""
        weights = self._weights()
        layers: list[States] = []
        check: functional.Check | None = self._check
        if states is not None:
            if self.num_layers > 1:  # of which a layer sees only its own
                stop_at_overrides((x, *states, *weights[0]))
                self._check(x, states, weights[0], batch_sizes)
                check = None
            states = _permute(states, order)
        if lengths is None and reset is None and reset_hx is None:
            results = self._run_by_torch(x, states, weights, batch_sizes)
            if results is not None:
                return *results, None, []
        if self.training and self.weight_dropout:
            weights = [self._drop_recurrent(flat) for flat in weights]
        y, ends, c = functional.stack(
            self._cell,
            x,
            states,
            weights,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            batch_sizes=batch_sizes,
            lengths=lengths,
            reset=reset,
            reset_hx=reset_hx,
            all_states=self.return_states,
            recompute=self.recompute,
            check=check,
            every=layers if self.return_layers else None,
        )
        return y, ends, c, layers

    def _run_by_torch(
        self,
        x: Tensor,
        states: States | None,
        weights: list[list[Any]],
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, States] | None:
        """y and the last states where torch's own functions serve best, else None."""
        if x.dtype is not torch.float16 or self.return_states or self.return_layers:
            return None
        if self.weight_dropout or self.recompute:
            return None
        if self.bias and any(w is None for flat in weights for w in flat):
            return None
        H, directions = self.hidden_size, 2 if self.bidirectional else 1
        sizes = by_torch.Sizes(self._cell, H, self.proj_size or H, self.num_layers, directions)
        if not by_torch.serves_layers(sizes, x, batch_sizes):
            return None
        if batch_sizes is not None:
            check_batch_sizes(batch_sizes, x.shape[0])
        self._check(x, states, weights[0], batch_sizes)
        dropout = self.dropout if self.training else 0.0
        return by_torch.layers(sizes, x, batch_sizes, states, weights, dropout)

    @property
    def _cell(self) -> str:
        return self.mode.lower()

    def _weights(self) -> list[list[Any]]:
        """The weights as they are now, a flat list a layer: parameters, parametrizations, plain
        tensors alike."""
        parameters = self._parameters
        layers: list[list[Any]] = []
        for k, names in enumerate(self._all_weights):
            found: list[Any] = []
            for name in names:
                weight = parameters.get(name)
                found.append(getattr(self, name) if weight is None else weight)
            if not self.bias:
                found[2:2] = (None, None)
            if self.bidirectional and k % 2:
                layers[-1] += found
            else:
                layers.append(found)
        return layers

    def _drop_weights(self, p: float) -> None:
        if isinstance(p, bool) or not 0 <= p <= 1:
            raise ValueError(
                "weight_dropout should be a number in range [0, 1] representing the probability "
                f"of a recurrent weight being zeroed, got {p!r}"
            )
        if p:
            self.weight_dropout = float(p)

    def _drop_recurrent(self, weights: list[Any]) -> list[Any]:
        """A layer's weights, with elements of every weight_hh zeroed and the others scaled up."""
        each = len(weights) // (2 if self.bidirectional else 1)
        return [
            _dropout(w, self.weight_dropout) if k % each == 1 else w for k, w in enumerate(weights)
        ]

    def _check(
        self, x: Tensor, states: States | None, weights: Weights, batch_sizes: Tensor | None
    ) -> None:
        weight = weights[0]
        if weight is None:
            raise RuntimeError("weight_ih is None")
        if x.dtype != weight.dtype and not _torch.autocast_active():
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        rank = 3 if batch_sizes is None else 2
        if x.dim() != rank:
            raise RuntimeError(f"input must have {rank} dimensions, got {x.dim()}")
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {x.shape[-1]}"
            )
        if states is None:
            return
        batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
        groups = self.num_layers * (2 if self.bidirectional else 1)
        for k, state in enumerate(states):
            if state.layout != torch.strided:
                raise RuntimeError(f"hx must be dense tensors, got {state.layout}")
            width = self.hidden_size if k else self.proj_size or self.hidden_size
            if state.shape != (groups, batch, width):
                name = "hidden" if len(states) == 1 else f"hidden[{k}]"
                expected = (groups, batch, width)
                raise functional.wrong_size(name, expected, state)

    def _states(self, hx: Any, rank: int | None) -> States:
        """`hx` as a tuple; `rank` is the input's, None when packed."""
        try:
            dims = hx.dim()
        except AttributeError:
            raise TypeError(not_a_tensor(self._kind, "hx", hx)) from None
        if rank is not None and dims != rank:
            kind = "unbatched 2-D" if rank == 2 else "batched 3-D"
            raise RuntimeError(
                f"For {kind} input, hx should also be {rank}-D but got {dims}-D tensor"
            )
        return (hx,)

    def _hidden(self, states: States) -> Any:
        return states[0]


def not_a_tensor(kind: str, name: str, given: object) -> str:
    return f"{kind} expects {name} to be a tensor, got {type(given).__name__}"


def _permute(states: States, order: Tensor | None) -> States:
    return states if order is None else tuple(s.index_select(1, order) for s in states)


class RNN(Layers):
    r"""Elman RNN layers, a drop-in for :class:`torch.nn.RNN` (Elman 1990).

    .. math::
        h_t = \phi(x_t W_{ih}^T + b_{ih} + h_{t-1} W_{hh}^T + b_{hh}),
        \quad \phi = \tanh \text{ or } \mathrm{ReLU}

    Shapes, with D = 2 if bidirectional and L = num_layers: input [T, B, input_size] ([B, T,
    input_size] if batch_first, [T, input_size] unbatched, or a PackedSequence), hx and h_n [D*L, B,
    hidden_size], output [T, B, D*hidden_size]. dtypes: any floating dtype of torch;
    :func:`fastrnn.explain` tells which are fused.

    With ``return_states=True``, which torch.nn does not have, the result is ``(output, h_n, h)``:
    h_t of every step, which is the output once more, where an LSTM has c_t.

    With ``return_layers=True``, which torch.nn does not have, the result ends with a list of the
    states of all layers after every step, the lowest layer first: h of shape [T, B, D*hidden_size],
    laid out as the output is, before any dropout, and differentiable.

    With ``weight_dropout=p``, which torch.nn does not have, every call in training mode zeroes each
    element of every weight_hh with probability p and scales the others by 1 / (1 - p): DropConnect
    (Wan et al. 2013), on recurrent weights as in Merity et al. 2018. One mask serves all timesteps
    of a call, and torch's seed reproduces it; in eval mode there is none.

    Raises:
        ValueError, TypeError, RuntimeError: as torch.nn.RNN does for the same arguments.
    """

    _kind = "RNN"
    _twin = torch.nn.RNN
    _rank_text = "{}: Expected input to be 2D or 3D, got {}D tensor instead"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        return_states: bool = False,
        return_layers: bool = False,
        weight_dropout: float = 0.0,
        recompute: int = 0,
    ) -> None:
        _refuse_projection(proj_size)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self._return_more(return_states, return_layers)
        self._drop_weights(weight_dropout)
        self._keep_every(recompute)


class LSTM(Layers):
    r"""LSTM layers, a drop-in for :class:`torch.nn.LSTM` (Hochreiter and Schmidhuber 1997, Gers et
    al. 2000, projection of Sak et al. 2014).

    .. math::
        i, f, g, o &= \text{the quarters of } x_t W_{ih}^T + b_{ih} + h_{t-1} W_{hh}^T + b_{hh} \\
        c_t &= \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g) \\
        h_t &= \sigma(o) \odot \tanh(c_t), \text{ times } W_{hr}^T \text{ with a projection}

    Shapes, with D = 2 if bidirectional, L = num_layers and out = proj_size or hidden_size: input
    [T, B, input_size] ([B, T, input_size] if batch_first, [T, input_size] unbatched, or a
    PackedSequence), hx and the last states (h [D*L, B, out], c [D*L, B, hidden_size]), output [T,
    B, D*out]. dtypes: any floating dtype of torch; :func:`fastrnn.explain` tells which are fused.

    With ``return_states=True``, which torch.nn does not have, the result is ``(output, (h_n, c_n),
    c)``: c_t of every step of the last layer, [T, B, D*hidden_size], batch-first or packed as the
    output is, and differentiable.

    With ``return_layers=True``, which torch.nn does not have, the result ends with a list of the
    states of all layers after every step, the lowest layer first: (h, c) of shapes [T, B, D*out]
    and [T, B, D*hidden_size], laid out as the output is, before any dropout, and differentiable.

    With ``weight_dropout=p``, which torch.nn does not have, every call in training mode zeroes each
    element of every weight_hh with probability p and scales the others by 1 / (1 - p): DropConnect
    (Wan et al. 2013), on recurrent weights as in Merity et al. 2018. One mask serves all timesteps
    of a call, and torch's seed reproduces it; in eval mode there is none.

    Raises:
        ValueError, TypeError, RuntimeError: as torch.nn.LSTM does for the same arguments.
    """

    _kind = "LSTM"
    _twin = torch.nn.LSTM
    # RNNBase's own know of one state only; subclasses with a forward of their own call these.
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        return_states: bool = False,
        return_layers: bool = False,
        weight_dropout: float = 0.0,
        recompute: int = 0,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self._return_more(return_states, return_layers)
        self._drop_weights(weight_dropout)
        self._keep_every(recompute)

    def _states(self, hx: Any, rank: int | None) -> States:
        if isinstance(hx, Tensor):
            raise TypeError("LSTM expects hx to be a tuple (h_0, c_0), got one tensor")
        try:
            h, c = hx[0], hx[1]
            ranks = h.dim(), c.dim()
        except (AttributeError, IndexError, TypeError):
            raise TypeError(f"LSTM expects hx to be a tuple (h_0, c_0), got {hx!r:.60}") from None
        if rank is not None and ranks != (rank, rank):
            kind = "unbatched 2-D" if rank == 2 else "batched 3-D"
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {rank}-D "
                f"but got ({ranks[0]}-D, {ranks[1]}-D) tensors"
            )
        if len(hx) != 2 and rank != 2:  # of which torch.nn takes the first two
            raise RuntimeError("lstm expects two hidden states")
        return h, c

    def _hidden(self, states: States) -> States:
        return states


class GRU(Layers):
    r"""GRU layers, a drop-in for :class:`torch.nn.GRU` (Cho et al. 2014, the reset after the
    product).

    .. math::
        r &= \sigma(x_t W_{ir}^T + b_{ir} + h_{t-1} W_{hr}^T + b_{hr}) \\
        z &= \sigma(x_t W_{iz}^T + b_{iz} + h_{t-1} W_{hz}^T + b_{hz}) \\
        n &= \tanh(x_t W_{in}^T + b_{in} + r \odot (h_{t-1} W_{hn}^T + b_{hn})) \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}

    Shapes, with D = 2 if bidirectional and L = num_layers: input [T, B, input_size] ([B, T,
    input_size] if batch_first, [T, input_size] unbatched, or a PackedSequence), hx and h_n [D*L, B,
    hidden_size], output [T, B, D*hidden_size]. dtypes: any floating dtype of torch;
    :func:`fastrnn.explain` tells which are fused.

    With ``return_states=True``, which torch.nn does not have, the result is ``(output, h_n, h)``:
    h_t of every step, which is the output once more, where an LSTM has c_t.

    With ``return_layers=True``, which torch.nn does not have, the result ends with a list of the
    states of all layers after every step, the lowest layer first: h of shape [T, B, D*hidden_size],
    laid out as the output is, before any dropout, and differentiable.

    With ``weight_dropout=p``, which torch.nn does not have, every call in training mode zeroes each
    element of every weight_hh with probability p and scales the others by 1 / (1 - p): DropConnect
    (Wan et al. 2013), on recurrent weights as in Merity et al. 2018. One mask serves all timesteps
    of a call, and torch's seed reproduces it; in eval mode there is none.

    Raises:
        ValueError, TypeError, RuntimeError: as torch.nn.GRU does for the same arguments.
    """

    _kind = "GRU"
    _twin = torch.nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        return_states: bool = False,
        return_layers: bool = False,
        weight_dropout: float = 0.0,
        recompute: int = 0,
    ) -> None:
        _refuse_projection(proj_size)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self._return_more(return_states, return_layers)
        self._drop_weights(weight_dropout)
        self._keep_every(recompute)


def _refuse_projection(proj_size: int | None) -> None:
    # torch.nn takes a 0 by position only, which a signature that skip_init can read cannot tell.
    if proj_size:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
