"""A torch.nn layer as an ONNX graph of one node, written out with onnx.helper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

if TYPE_CHECKING:
    from numpy.typing import NDArray

# For each of ONNX's gates, in its order, the place of the same gate in torch's order.
GATES = {
    "lstm": (0, 3, 1, 2),  # i o f c from i f g o
    "gru": (1, 0, 2),  # z r h from r z n
    "rnn_tanh": (0,),
    "rnn_relu": (0,),
}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "lstm": {},
    "gru": {"linear_before_reset": 1},  # reset after the product, as torch has it
    "rnn_tanh": {"activations": ["Tanh"]},
    "rnn_relu": {"activations": ["Relu"]},
}
OPSET = 14
IR_VERSION = 8


def reordered(parameter: nn.Parameter, cell: str) -> NDArray[np.float32]:
    """A weight or bias with its gates in ONNX's order."""
    gates = np.split(parameter.detach().numpy(), len(GATES[cell]))
    return np.concatenate([gates[place] for place in GATES[cell]])


def model(layer: nn.RNNBase, cell: str, T: int, B: int) -> bytes:
    """The serialized graph x [T, B, I] -> y [T, 1, B, H], h_n and, for LSTM, c_n."""
    from onnx import TensorProto, checker, helper, numpy_helper

    H = layer.hidden_size
    w_ih, w_hh, b_ih, b_hh = (reordered(weight, cell) for weight in layer.parameters())
    constants = {"W": w_ih[None], "R": w_hh[None], "B": np.concatenate([b_ih, b_hh])[None]}
    states = ["h_n", "c_n"] if cell == "lstm" else ["h_n"]
    operator = cell.partition("_")[0].upper()
    node = helper.make_node(
        operator, ["x", *constants], ["y", *states], hidden_size=H, **ATTRIBUTES[cell]
    )

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [node],
        operator.lower(),
        [value("x", T, B, layer.input_size)],
        [value("y", T, 1, B, H), *(value(name, 1, B, H) for name in states)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    onnx_model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    checker.check_model(onnx_model)
    return bytes(onnx_model.SerializeToString())
