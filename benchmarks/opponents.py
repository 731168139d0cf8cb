"""ONNX Runtime and OpenVINO, each in a process of its own, on the same weights and input.

A process of its own, because thread pools that share one get in each other's way. The parent
pickles requests to the child's standard input and reads the answers from its standard output, and
asks one child at a time, so that the processes take turns as the subjects of one process do.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrnn.timing import Timing, alternate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Run = Callable[[], NDArray[np.float32]]
    Loader = Callable[[bytes, NDArray[np.float32], int], Run]

ROOT = Path(__file__).resolve().parents[1]


def load_onnxruntime(model: bytes, x: NDArray[np.float32], threads: int) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {"x": x}
    return lambda: session.run(None, inputs)[0]


def load_openvino(model: bytes, x: NDArray[np.float32], threads: int) -> Run:
    import openvino as ov

    config = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Without this it computes in bf16 where the machine can, and is no float32 opponent.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = ov.Core()
    request = core.compile_model(core.read_model(model, b""), "CPU", config).create_infer_request()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)[0]


OPPONENTS: dict[str, Loader] = {"onnxruntime": load_onnxruntime, "openvino": load_openvino}


def missing() -> dict[str, str]:
    """Why an opponent cannot take part, by name; empty when all can."""
    reasons = {}
    for name in OPPONENTS:
        absent = [package for package in (name, "onnx") if find_spec(package) is None]
        if absent:
            reasons[name] = f"not installed: {', '.join(absent)}"
    return reasons


class OpponentError(Exception):
    """The opponent's process raised an error; its text is the message."""


class Opponent:
    """The parent's end of one opponent's process."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.opponents", name, "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def load(self, model: bytes, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Builds the model, keeps its input, and returns y [T, 1, B, H]."""
        answer: NDArray[np.float32] = self._ask("load", model, x)
        return answer

    def time(self, seconds: float) -> Timing:
        answer: Timing = self._ask("time", seconds)
        return answer

    def _ask(self, *request: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()
        try:
            answer, failure = pickle.load(self._process.stdout)
        except EOFError:
            raise OpponentError(f"{self.name}'s process ended: {self._process.wait()}") from None
        if failure is not None:
            raise OpponentError(f"{self.name}: {failure}")
        return answer

    def __enter__(self) -> Opponent:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Worker:
    """The child's end: one model at a time."""

    def __init__(self, loader: Loader, threads: int) -> None:
        self.loader = loader
        self.threads = threads
        self.run: Run | None = None

    def load(self, model: bytes, x: NDArray[np.float32]) -> NDArray[np.float32]:
        self.run = self.loader(model, x, self.threads)
        return np.array(self.run())

    def time(self, seconds: float) -> Timing:
        if self.run is None:
            raise RuntimeError("time was asked for before load")
        return alternate({"": self.run}, seconds)[""]


def serve(worker: Worker) -> None:
    # What a runtime prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            method, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer, failure = None, None
        try:
            answer = getattr(worker, method)(*arguments)
        except Exception as error:  # anything at all: the parent reports it
            failure = f"{type(error).__name__}: {error}"
        pickle.dump((answer, failure), answers)
        answers.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="The process of one opponent; run starts it.")
    parser.add_argument("name", choices=OPPONENTS)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    serve(Worker(OPPONENTS[options.name], options.threads))


if __name__ == "__main__":
    main()
