"""fastrnn: torch.nn's LSTM, GRU and RNN, layers and cells, on fused kernels.

>>> import torch, fastrnn
>>> lstm = fastrnn.LSTM(8, 16)  # or fastrnn.convert(model) for a model of torch.nn layers
>>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 8))
>>> output.shape
torch.Size([5, 3, 16])
"""

from __future__ import annotations

import warnings

from .backends import backend
from .backends.cpu import _MISSING as _REASON
from .convert import convert, converted, revert
from .diagnose import diagnose
from .explain import explain
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .streaming import stream
from .tbptt import tbptt

__version__ = "0.1.0.dev0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "backend",
    "convert",
    "converted",
    "diagnose",
    "explain",
    "revert",
    "stream",
    "tbptt",
]

if _REASON is not None:
    warnings.warn(f"{_REASON}; torch's own layers serve, by the aten backend", stacklevel=2)
