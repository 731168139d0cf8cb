"""Random configurations against torch.nn."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers import (
    BACKEND_NAMES,
    Case,
    Truth,
    check_module,
    make_inputs,
    run,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from fastrnn.backends import Problem, by_name
from fastrnn.cells import CELLS
from fastrnn.validation import TORCH_LAYERS

patient = settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
LAYOUTS = ["dense", "batch_first", "feature_first", "padded", "every_other"]
sizes = st.integers(1, 40)
# A single unit may be saturated, where 1 - y^2 amplifies its rounding error without bound; among
# several some are not. Fewer than these are in test_kernels, on inputs that are known.
units = st.integers(4, 40)


@st.composite
def cases(draw: st.DrawFn, cell: str) -> Case:
    H = draw(units)
    lengths = draw(st.lists(st.integers(1, 9), max_size=9).map(lambda n: sorted(n, reverse=True)))
    T = lengths[0] if lengths else draw(st.integers(1, 9))
    P = draw(st.integers(0, H - 1)) if CELLS[cell].states > 1 else 0
    return Case(
        T,
        len(lengths) or draw(st.integers(1, 20)),
        draw(sizes),
        H,
        draw(st.sampled_from([(False,), (False, True)])),
        tuple(lengths),
        "dense" if lengths else draw(st.sampled_from(LAYOUTS)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([0, P])),
    )


def serves(backend: str, cell: str, case: Case, dtype: torch.dtype) -> bool:
    device, packed = torch.device("cpu"), bool(case.lengths)
    sizes = (case.T, case.B, case.I, case.H, case.P, case.reverse)
    flags = (case.grouped, packed, bool(case.ends), bool(case.cuts), case.every)
    problem = Problem(CELLS[cell], dtype, device, *sizes, *flags, grad=True)
    return by_name(backend).supports(problem) is None


@patient
@given(data=st.data())
def test_one_layer(data: st.DataObject) -> None:
    cell = data.draw(st.sampled_from(list(CELLS)))
    case = data.draw(cases(cell))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    truth = Truth(cell, case, dtype)
    for backend in BACKEND_NAMES:
        if serves(backend, cell, case, dtype):
            truth.check(run(cell, case, make_inputs(cell, case, dtype), backend))


@patient
@given(data=st.data())
def test_stacks(data: st.DataObject) -> None:
    torch.manual_seed(0)
    cell = data.draw(st.sampled_from([c for c in CELLS if c in TORCH_LAYERS]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    I, H, layers = data.draw(sizes), data.draw(units), data.draw(st.integers(1, 3))
    options: dict[str, Any] = {
        "num_layers": layers,
        "bias": data.draw(st.booleans()),
        "bidirectional": data.draw(st.booleans()),
        "batch_first": data.draw(st.booleans()),
    }
    if CELLS[cell].states > 1 and H > 1 and data.draw(st.booleans()):
        options["proj_size"] = data.draw(st.integers(1, H - 1))
    theirs = TORCH_LAYERS[cell](I, H, **options)
    ours = fastrnn.convert(copy.deepcopy(theirs))
    lengths = data.draw(st.lists(st.integers(1, 7), max_size=6))
    x: Any = torch.randn(*data.draw(st.tuples(*[st.integers(1, 7)] * 2)), I)
    if lengths:
        x = pack_sequence([torch.randn(n, I) for n in lengths], enforce_sorted=False)
    elif data.draw(st.booleans()):
        x = x[0]
    hx = states_for(theirs, x) if data.draw(st.booleans()) else None
    for backend in BACKEND_NAMES:
        if all(backend not in one.refusals for one in fastrnn.explain(ours, x)):
            check_module(theirs, ours, x, hx, backend=backend, dtype=dtype)


def states_for(module: nn.RNNBase, x: Any) -> Any:
    lead = [module.num_layers * (1 + module.bidirectional)]
    if isinstance(x, PackedSequence):
        lead.append(int(x.batch_sizes[0]))
    elif x.dim() == 3:
        lead.append(x.shape[0 if module.batch_first else 1])
    h = torch.randn(*lead, module.proj_size or module.hidden_size)
    return (h, torch.randn(*lead, module.hidden_size)) if module.mode == "LSTM" else h
