"""Export to ONNX: every layer becomes the standard operator LSTM, GRU or RNN.

Needs the packages onnx and onnxscript."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .backends import ComputesNothing, only

# For each of ONNX's gates, in its order, the place of the same gate in torch's order.
_GATES = {
    "lstm": (0, 3, 1, 2),  # i o f c from i f g o
    "gru": (1, 0, 2),  # z r h from r z n
    "rnn_tanh": (0,),
    "rnn_relu": (0,),
}
_DIRECTIONS = {(False,): "forward", (True,): "reverse", (False, True): "bidirectional"}


def export(model: nn.Module, args: tuple[Any, ...], f: Any = None, **options: Any) -> Any:
    """Export a model with fastrnn layers, as :func:`torch.onnx.export` does with ``dynamo=True``.

    Every layer becomes one ONNX operator LSTM, GRU (``linear_before_reset=1``) or RNN: both
    directions in one, layout 0, gates in ONNX's order, `lengths` as its ``sequence_lens``. The
    weights are stored as the operator takes them. Nothing is unrolled, so that T and B may be
    dynamic whichever backend serves the model here.

    Args:
        model: exported as it stands, so call ``eval()`` first.
        args: example inputs of the model.
        f: the file to write, or None.
        **options: those of :func:`torch.onnx.export`, such as `dynamic_shapes` and `input_names`.

    Returns:
        A :class:`torch.onnx.ONNXProgram`.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the model uses what ONNX's operators do not have: projections, resets, packed
            sequences, the cell states of every step.
    """
    table = {**translations(), **options.pop("custom_translation_table", {})}
    with torch.no_grad(), only(_Recorder()):
        try:
            program = torch.onnx.export(
                model, args, dynamo=True, custom_translation_table=table, **options
            )
        except Exception as error:
            refused = _cause(error, _RefusedError)
            if refused is None:
                raise
            raise ValueError(f"cannot export to ONNX: {refused}") from error
    assert program is not None
    _fold_weights(program)
    if f is not None:
        program.save(f, external_data=options.get("external_data", True))
    return program


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` with which :func:`torch.onnx.export` translates the operator
    ``fastrnn::forward`` of a program that :func:`torch.export.export` has made.

    Raises:
        ImportError: onnxscript is not installed.
    """
    _import_onnxscript()
    return {torch.ops.fastrnn.forward.default: _translate}


def _import_onnxscript() -> Any:
    try:
        import onnxscript
    except ImportError as error:
        raise ImportError("ONNX export needs: pip install onnx onnxscript") from error
    return onnxscript


def _fold_weights(program: Any) -> None:
    """Let the operators read initializers, rather than reorder them at run time."""
    from onnxscript import optimizer

    most = 1 << 62
    optimizer.fold_constants(program.model, input_size_limit=most, output_size_limit=most)
    optimizer.remove_unused_nodes(program.model)


class _RefusedError(ValueError):
    """ONNX has no operator for a layer."""


def _cause(error: BaseException | None, kind: type[Exception]) -> BaseException | None:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error


class _Recorder(ComputesNothing):
    """A backend whose layers are traced: which of them have no operator, the translation tells."""

    name = "onnx"


def _refusal(
    cell: str, reverse: tuple[bool, ...], grouped: bool, proj: bool, packed: bool, reset: bool,
    all_states: bool,
) -> str | None:  # fmt: skip
    if cell not in _GATES:
        return f"it has no operator for the cell {cell}"
    if reverse not in _DIRECTIONS or grouped:
        return "its operators have one or two directions, and no other groups"
    if proj:
        return "its LSTM has no projection (proj_size)"
    if packed:
        return "its operators take no packed sequence; lengths= does the same"
    if reset:
        return "its operators have no resets inside a sequence"
    if all_states:
        return (
            "its LSTM does not return the cell state of every step (return_states, return_layers)"
        )
    return None


def _translate(
    cell: str,
    backend: str,
    x: Any,
    batch_sizes: Any,
    lengths: Any,
    reset: Any,
    states: Any,
    weights: Any,
    reverse: Any,
    batch: Any,
    save: bool,
    all_states: bool,
) -> list[Any]:
    """``fastrnn::forward`` as an ONNX operator: y, h_n and c_n."""
    op, D, direction = _import_onnxscript().opset18, len(reverse), tuple(reverse)
    each = len(weights) // D
    H = weights[1].shape[1]
    grouped = D > 1 and x.shape[-1] != weights[0].shape[1]
    reason = _refusal(
        cell, direction, grouped, each > 4, batch_sizes is not None, reset is not None, all_states
    )
    if reason is not None:
        raise _RefusedError(reason)

    rows = [gate * H + unit for gate in _GATES[cell] for unit in range(H)]

    def ordered(weight: Any) -> Any:
        return weight if len(_GATES[cell]) == 1 else op.Gather(weight, rows, axis=0)

    def by_direction(tensors: Sequence[Any]) -> Any:
        stacked = [op.Unsqueeze(t, [0]) for t in tensors]
        return stacked[0] if D == 1 else op.Concat(*stacked, axis=0)

    w_ih, w_hh, b_ih, b_hh = ([weights[g * each + k] for g in range(D)] for k in range(4))
    bias = None
    if b_ih[0] is not None:
        pairs = zip(b_ih, b_hh, strict=True)
        bias = by_direction([op.Concat(ordered(i), ordered(h), axis=0) for i, h in pairs])
    inputs = [
        x,
        by_direction([ordered(w) for w in w_ih]),
        by_direction([ordered(w) for w in w_hh]),
        bias,
        None if lengths is None else op.Cast(lengths, to=6),  # INT32
        states[0],
    ]
    attributes: dict[str, Any] = {"hidden_size": H, "direction": _DIRECTIONS[direction]}
    if cell == "lstm":
        y, *ends = op.LSTM(*inputs, states[1], **attributes)
    elif cell == "gru":
        y, *ends = op.GRU(*inputs, linear_before_reset=1, **attributes)
    else:
        activations = [cell.removeprefix("rnn_").title()] * D
        y, *ends = op.RNN(*inputs, activations=activations, **attributes)
    if lengths is not None and states[0] is not None:
        # The operators leave zeros where a row has no steps: it ends in its initial state.
        empty = op.Unsqueeze(op.Equal(lengths, 0), [0, 2])  # [1, B, 1]
        ends = [op.Where(empty, states[k], end) for k, end in enumerate(ends)]
    y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1])  # from [T, D, B, H]
    return [y, *ends]
