"""The cells' Triton twins: csrc/cells/*.h again, on tiles.

``forward(x, r, states)`` takes the input's and the recurrent gates, one tile each, and returns the
new states and what backward() wants back. ``backward(saved, s_before, ds)`` returns the gradients
of both gate inputs and of the states, the recurrent product's share left out. All of it is float32,
and linear in ds: where ds is zero and the rest finite, all gradients are zero."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Near 0 the odd polynomial of Cephes' tanhf (Moshier): 1 - 2 / (e^2|x| + 1) loses its relative
    accuracy there."""
    square = x * x
    p = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
    small = x + x * square * ((p + 1.33314422036e-1) * square - 3.33332819422e-1)
    large = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def lstm_forward(x, r, states):
    i, f = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    g, o = tanh(x[2] + r[2]), sigmoid(x[3] + r[3])
    c = f * states[1] + i * g
    return (o * tanh(c), c), (i, f, g, o)


@triton.jit
def lstm_backward(saved, s_before, ds):
    i, f, g, o = saved
    tanh_c = tanh(f * s_before[1] + i * g)
    dh = ds[0]
    dc = ds[1] + dh * o * (1 - tanh_c * tanh_c)
    dgates = (
        dc * g * i * (1 - i),
        dc * s_before[1] * f * (1 - f),
        dc * i * (1 - g * g),
        dh * tanh_c * o * (1 - o),
    )
    return dgates, dgates, (tl.zeros_like(dh), dc * f)


@triton.jit
def gru_forward(x, r, states):
    reset, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    n = tanh(x[2] + reset * r[2])
    return (n + z * (states[0] - n),), (reset, z, n, r[2])


@triton.jit
def gru_backward(saved, s_before, ds):
    reset, z, n, r_n = saved
    dh = ds[0]
    dx_n = dh * (1 - z) * (1 - n * n)
    dx_z = dh * (s_before[0] - n) * z * (1 - z)
    dx_r = dx_n * r_n * reset * (1 - reset)
    return (dx_r, dx_z, dx_n), (dx_r, dx_z, dx_n * reset), (dh * z,)


@triton.jit
def rnn_tanh_forward(x, r, states):
    h = tanh(x[0] + r[0])
    return (h,), (h,)


@triton.jit
def rnn_tanh_backward(saved, s_before, ds):
    h = saved[0]
    dgates = (ds[0] * (1 - h * h),)
    return dgates, dgates, (tl.zeros_like(h),)


@triton.jit
def rnn_relu_forward(x, r, states):
    total = x[0] + r[0]
    h = tl.where(total < 0, 0.0, total)
    return (h,), (h,)


@triton.jit
def rnn_relu_backward(saved, s_before, ds):
    h = saved[0]
    dgates = (tl.where(h > 0, ds[0], 0.0),)
    return dgates, dgates, (tl.zeros_like(h),)


class Twin(NamedTuple):
    """The two functions of a cell, and whether its backward reads h before the step."""

    forward: Any
    backward: Any
    reads_h: bool = False


TWINS = {
    "lstm": Twin(lstm_forward, lstm_backward),
    "gru": Twin(gru_forward, gru_backward, reads_h=True),
    "rnn_tanh": Twin(rnn_tanh_forward, rnn_tanh_backward),
    "rnn_relu": Twin(rnn_relu_forward, rnn_relu_backward),
}
