"""A case made concrete: layers with equal weights, inputs, and the calls to check and to time."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from benchmarks.shapes import DTYPES, SHORTEST, Case
from fastrnn.cells import CELLS
from fastrnn.timing import Subject

SEED = 2
LIBRARIES: dict[str, ModuleType] = {"fastrnn": fastrnn, "torch": nn}


def build_layer(library: ModuleType, case: Case) -> nn.RNNBase:
    """The layer of `library` for a case's cell: "rnn_tanh" is RNN(nonlinearity="tanh")."""
    name, _, nonlinearity = case.cell.partition("_")
    options: dict[str, Any] = {"nonlinearity": nonlinearity} if nonlinearity else {}
    options["bidirectional"] = case.kind == "bidirectional"
    layer: nn.RNNBase = getattr(library, name.upper())(case.shape.I, case.shape.H, **options)
    return layer.to(DTYPES[case.dtype])


def rows_of_steps(case: Case) -> int:
    """T·B, or the sum of the lengths where they differ."""
    if case.kind == "packed":
        return int(lengths(case).sum())
    return case.shape.T * case.shape.B


def lengths(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(SHORTEST, case.shape.T + 1, (case.shape.B,), generator=generator)
    return drawn.sort(descending=True).values


def flops(case: Case) -> float:
    """Multiplications and additions of the matrix products; backward has twice forward's."""
    directions = 2 if case.kind == "bidirectional" else 1
    width = CELLS[case.cell].gates * case.shape.H * (case.shape.I + case.shape.H)
    forward = 2.0 * rows_of_steps(case) * width * directions
    return forward * (3 if case.mode == "training" else 1)


class Results(NamedTuple):
    """Everything that a call gives: outputs, final states and, in training, gradients."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    def by_name(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.tensors, strict=True))


class Setup:
    """Layers of every library with the same weights, on the same input."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(SEED)
        self.layers = {name: build_layer(library, case) for name, library in LIBRARIES.items()}
        state = self.layers["torch"].state_dict()
        for layer in self.layers.values():
            layer.load_state_dict(state)
        T, B, I, H = case.shape
        dtype = DTYPES[case.dtype]
        x = torch.randn(T, B, I).to(dtype)
        directions = 2 if case.kind == "bidirectional" else 1
        self.batch_sizes: Tensor | None = None
        if case.kind == "packed":
            packed = pack_padded_sequence(x, lengths(case))
            x, self.batch_sizes = packed.data, packed.batch_sizes
        self.x = x  # [T, B, I] or [N, I]
        self.dy = torch.randn(*x.shape[:-1], directions * H).to(dtype)

    def reference(self) -> Results:
        """torch.nn in double precision, on the very values that the other layers see."""
        layer = build_layer(nn, self.case).double()
        layer.load_state_dict(self.layers["torch"].state_dict())
        return self._results(layer, self.x.double(), self.dy.double())

    def results(self, library: str) -> Results:
        return self._results(self.layers[library], self.x, self.dy)

    def subject(self, library: str) -> Subject:
        """The call to time: forward, or forward and the gradients to x and all weights."""
        layer = self.layers[library]
        if self.case.mode == "inference":
            data = self._input(self.x)

            def infer() -> object:
                with torch.inference_mode():
                    return layer(data)

            return infer
        x = self.x.clone().requires_grad_()
        inputs, wanted = self._input(x), [x, *layer.parameters()]

        def train() -> object:
            return torch.autograd.grad(output(layer(inputs)), wanted, self.dy)

        return train

    def _input(self, x: Tensor) -> Tensor | PackedSequence:
        return x if self.batch_sizes is None else PackedSequence(x, self.batch_sizes)

    def _results(self, layer: nn.RNNBase, x: Tensor, dy: Tensor) -> Results:
        states = ("h_n", "c_n")[: CELLS[self.case.cell].states]
        if self.case.mode == "inference":
            with torch.inference_mode():
                result = layer(self._input(x))
            return Results(("y", *states), (output(result), *final_states(result)))
        x = x.clone().requires_grad_()
        result = layer(self._input(x))
        parameters = dict(layer.named_parameters())
        gradients = torch.autograd.grad(output(result), [x, *parameters.values()], dy)
        names = ("y", *states, "dx", *(f"d{name}" for name in parameters))
        outputs = (output(result), *final_states(result))
        return Results(names, tuple(t.detach() for t in (*outputs, *gradients)))


def output(result: Any) -> Tensor:
    y = result[0]
    return y.data if isinstance(y, PackedSequence) else y


def final_states(result: Any) -> tuple[Tensor, ...]:
    states = result[1]
    return states if isinstance(states, tuple) else (states,)
