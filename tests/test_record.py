"""A device's record: how it is read and ignored, and how the choice of a backend goes by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastrnn
from fastrnn import backends, machine, record
from fastrnn.backends import BACKENDS, Problem, choose
from fastrnn.backends.cpu import CPU as CPU_BACKEND
from fastrnn.commands.info import show_record
from fastrnn.record import Kernel, Times
from fastrnn.validation import Case, as_problem, make_inputs

pytest.importorskip("fastrnn._C")

CPU = torch.device("cpu")
LSTM = ("lstm", "float32", False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for records, and none is remembered."""
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path))
    record.forget()
    yield tmp_path
    monkeypatch.undo()
    record.forget()


def problem(
    cell: str = "lstm", H: int = 16, B: int = 4, dtype: torch.dtype = torch.float32
) -> Problem:
    case = Case(3, B, 5, H)
    return as_problem(cell, case, make_inputs(cell, case, dtype))[0]._replace(grad=False)


def own_kernel(cell: str = "lstm", dtype: str = "float32") -> Kernel:
    return Kernel("cpu", machine.instruction_set(), cell, dtype)


def test_without_a_record_the_order_of_preference_holds() -> None:
    assert record.of(CPU) is None
    assert choose(problem()).name == "cpu"


def test_the_fastest_serves() -> None:
    record.write_tuned(CPU, [Times(*LSTM, 16, 4, {"cpu": 3e-3, "aten": 1e-3})])
    assert choose(problem()).name == "aten"
    assert choose(problem("gru")).name == "cpu"
    assert choose(problem(dtype=torch.float64)).name == "cpu"
    assert choose(problem()._replace(grad=True)).name == "cpu"


def test_what_the_fastest_refuses_goes_to_the_next() -> None:
    times = {"cpu": 3e-3, "aten": 1e-3, "reference": 2e-3}
    record.write_tuned(CPU, [Times(*LSTM, 16, 4, times)])
    assert choose(problem()._replace(all_states=True)).name == "reference"


def test_the_nearest_point_in_logarithms_counts() -> None:
    one, other = {"cpu": 1e-3, "aten": 2e-3}, {"cpu": 2e-3, "aten": 1e-3}
    record.write_tuned(
        CPU,
        [
            Times(*LSTM, 16, 1, one),
            Times(*LSTM, 16, 64, other),
            Times(*LSTM, 256, 1, other),
            Times(*LSTM, 256, 64, other),
        ],
    )
    assert choose(problem(H=60, B=7)).name == "cpu"
    assert choose(problem(H=60, B=9)).name == "aten"
    assert choose(problem(H=68, B=7)).name == "aten"


def test_times_of_another_instruction_set_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(machine, "instruction_set", lambda: "another")
        record.write_tuned(CPU, [Times(*LSTM, 16, 4, {"cpu": 3e-3, "aten": 1e-3})])
    record.forget()
    assert choose(problem()).name == "cpu"


def test_explain_tells_the_record() -> None:
    record.write_tuned(CPU, [Times(*LSTM, 256, 16, {"cpu": 1e-3, "aten": 1.8e-3})])
    layer = fastrnn.LSTM(5, 250).requires_grad_(False)
    (told,) = fastrnn.explain(layer, torch.randn(3, 16, 5))
    date = record.of(CPU).tuned  # type: ignore[union-attr]
    expected = f"by the record of {date}: 1.8 times as fast as aten at H=256 B=16"
    assert told.measured == expected
    assert f"cpu: serves, {expected}\n" in str(told)
    with fastrnn.backend("cpu"):
        assert fastrnn.explain(layer, torch.randn(3, 16, 5))[0].measured is None


def test_a_wrong_kernel_serves_no_more() -> None:
    verdicts = {own_kernel(): "y is off", own_kernel("gru"): None}
    record.write_checked(CPU, verdicts)
    assert choose(problem()).name == "aten"
    assert choose(problem("gru")).name == "cpu"
    assert choose(problem(dtype=torch.float64)).name == "cpu"
    (told,) = fastrnn.explain(fastrnn.LSTM(5, 16), torch.randn(3, 4, 5))
    reason = "`python -m fastrnn check` found its lstm float32 kernel wrong on this machine"
    assert told.serves == "aten"
    assert told.refusals["cpu"] == reason
    with fastrnn.backend("cpu"), pytest.raises(RuntimeError, match="kernel wrong on this machine"):
        choose(problem())
    with record.ignored():
        assert choose(problem()).name == "cpu"


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (fastrnn.GRU(5, 16), torch.randn(2, 4, 5)),
        (fastrnn.GRUCell(5, 16), torch.randn(4, 5)),
    ],
    ids=["layer", "cell"],
)
def test_calls_made_before_go_by_a_new_record(
    monkeypatch: pytest.MonkeyPatch, module: torch.nn.Module, x: torch.Tensor
) -> None:
    served: list[str] = []

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            served.append("cpu")
            return run(*arguments)

        return counted

    for name in ("forward", "step"):
        monkeypatch.setattr(CPU_BACKEND, name, counting(getattr(CPU_BACKEND, name)))
    module(x)
    assert len(served) == 1
    record.write_checked(CPU, {own_kernel("gru"): "y is off"})
    module(x)
    assert len(served) == 1
    with record.ignored():
        module(x)
    assert len(served) == 2
    module(x)
    assert len(served) == 2


def test_a_user_without_a_home_has_no_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As containers have users that their system does not know."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTRNN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(Path, "expanduser", lambda _: no_home())
    record.forget()
    assert record.of(CPU) is None
    assert choose(problem()).name == "cpu"
    show_record(CPU)
    assert "set FASTRNN_CACHE to a folder" in capsys.readouterr().out


def test_a_kernel_of_another_instruction_set_may_be_wrong() -> None:
    record.write_checked(CPU, {own_kernel()._replace(isa="another"): "y is off"})
    assert choose(problem()).name == "cpu"


def test_a_later_check_adds_to_an_earlier_one() -> None:
    record.write_checked(CPU, {own_kernel("lstm"): "off", own_kernel("gru"): None})
    record.write_tuned(CPU, [Times(*LSTM, 16, 4, {"cpu": 1e-3, "aten": 3e-3})])
    record.write_checked(CPU, {own_kernel("gru"): "off", own_kernel("rnn_tanh"): None})
    found = record.of(CPU)
    assert found is not None
    assert found.wrong == {own_kernel("lstm"): "off", own_kernel("gru"): "off"}
    assert found.right == {own_kernel("rnn_tanh")}
    assert found.times == [Times(*LSTM, 16, 4, {"cpu": 1e-3, "aten": 3e-3})]


class OnRequest:
    """A backend that serves only by name, as those of GPUs do, on the CPU."""

    name = "shy"
    on_request = "it serves only by name"

    def __getattr__(self, name: str) -> Any:
        return getattr(CPU_BACKEND, name)


@pytest.mark.parametrize("checked", [None, "right", "wrong"])
@pytest.mark.parametrize("time", [None, 1e-3, 3e-3])
def test_a_backend_on_request_serves_where_it_is_right_and_faster(
    checked: str | None, time: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "BACKENDS", [OnRequest(), *BACKENDS])
    times = {"cpu": 2e-3, "aten": 4e-3} | ({} if time is None else {"shy": time})
    record.write_tuned(CPU, [Times(*LSTM, 16, 4, times)])
    if checked is not None:
        kernel = Kernel("shy", "", "lstm", "float32")
        record.write_checked(CPU, {kernel: "off" if checked == "wrong" else None})
    serves = checked == "right" and time == 1e-3
    assert choose(problem()).name == ("shy" if serves else "cpu")
    with fastrnn.backend("shy"):
        if checked == "wrong":
            with pytest.raises(RuntimeError, match="found its lstm float32 kernel wrong"):
                choose(problem())
        else:
            assert choose(problem()).name == "shy"


def test_a_compiled_layer_goes_by_all_batch_sizes() -> None:
    """One operator, without a graph break, though the batch size is not known."""
    fast, slow = {"cpu": 1e-3, "aten": 2e-3}, {"cpu": 9e-3, "aten": 1e-3}
    record.write_tuned(CPU, [Times(*LSTM, 16, 1, fast), Times(*LSTM, 16, 64, slow)])
    layer = fastrnn.LSTM(5, 16).requires_grad_(False)
    names: list[str] = []

    def look(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        nodes = [n for n in graph.graph.nodes if n.target is torch.ops.fastrnn.forward.default]
        names.extend(n.args[1] for n in nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=look, fullgraph=True, dynamic=True)
    for B in (1, 3):
        x = torch.randn(4, B, 5)
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])
    assert set(names) == {"aten"}


def test_read_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    record.write_checked(CPU, {own_kernel(): None})
    read, reads = record.read, []
    monkeypatch.setattr(record, "read", lambda device: (reads.append(device), read(device))[1])
    for _ in range(3):
        choose(problem())
        choose(problem("gru"))
    assert reads == [CPU]


def broken(content: dict[str, Any]) -> str:
    return "{"


def listed(content: dict[str, Any]) -> str:
    return "[]"


def of_the_future(content: dict[str, Any]) -> str:
    return json.dumps(content | {"format": record.FORMAT + 1})


def of_another_torch(content: dict[str, Any]) -> str:
    return json.dumps(content | {"software": content["software"] | {"torch": "1.0"}})


def of_another_build(content: dict[str, Any]) -> str:
    return json.dumps(content | {"software": content["software"] | {"fastrnn build": "0"}})


def of_another_machine(content: dict[str, Any]) -> str:
    return json.dumps(content | {"hardware": content["hardware"] | {"cpu": "6502"}})


def without_verdicts(content: dict[str, Any]) -> str:
    return json.dumps(content | {"checked": {"date": "2026-01-01"}})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (broken, "Expecting property name"),
        (listed, "no record of fastrnn"),
        (of_the_future, "format"),
        (of_another_torch, "torch 1.0 instead of"),
        (of_another_build, "fastrnn build 0 instead of"),
        (of_another_machine, "cpu 6502 instead of"),
        (without_verdicts, "no record of fastrnn"),
    ],
)
def test_an_unfit_record_is_ignored_with_one_warning(
    spoil: Callable[[dict[str, Any]], str], reason: str
) -> None:
    path = record.write_checked(CPU, {own_kernel(): "y is off"})
    assert choose(problem()).name == "aten"
    path.write_text(spoil(json.loads(path.read_text())))
    record.forget()
    with pytest.warns(UserWarning, match=reason) as caught:
        names = [choose(problem(cell)).name for cell in ("lstm", "gru")]
    assert names == ["cpu", "cpu"]
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    record.write_checked(CPU, {own_kernel("gru"): "y is off"})
    assert choose(problem("gru")).name == "aten"


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert record.folder() == tmp_path
    monkeypatch.delenv("FASTRNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert record.folder() == Path("/cache/fastrnn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert record.folder() == Path("/home/somebody/.cache/fastrnn")
