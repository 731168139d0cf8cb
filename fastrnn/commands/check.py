"""Check every kernel of this machine against float64.

Each cell, dtype, backend and, on the CPU, instruction set that can run here computes layers of
awkward shapes, forward and backward: packed, with lengths, resets and projections, and in two
directions. An error may be at most twice that of plain torch in the same dtype, plus a floor.

The kernels run in a process of their own, and what crashes or hangs there is reported as wrong. The
verdicts go into the device's record: a wrong kernel serves no more, another backend does instead.
The exit status is 1 if any kernel is wrong.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

from .. import machine, record
from ..backends import BACKENDS, Backend, backend, by_name
from ..cells import CELLS
from ..validation import (
    OUTPUTS,
    Case,
    Truth,
    WrongResultError,
    as_function,
    as_problem,
    float32_products,
    make_inputs,
)
from ..validation import run as run_case
from .options import DTYPES, add_selection

BOTH = (False, True)
CASES = [
    Case(7, 3, 5, 13),
    Case(1, 1, 17, 33),
    Case(9, 1, 40, 31, hx=False),
    Case(5, 37, 19, 48, hx=False, bias=False),
    Case(18, 12, 40, 256),
    Case(8, 32, 320, 320),
    Case(3, 300, 60, 70, reverse=BOTH),
    Case(60, 24, 40, 100, lengths=(60,) * 3 + tuple(range(42, 0, -2)), reverse=BOTH),
    Case(9, 6, 7, 19, ends=(3, 9, 0, 1, 9, 4), cuts=0.2, to=True, every=True, reverse=BOTH),
    Case(6, 20, 32, 33, P=12, lengths=(6,) * 13 + (4,) * 7, reverse=BOTH),
    Case(5, 4, 6, 17, grouped=True, reverse=(False, True, False)),
    Case(6, 4, 10, 15, layout="batch_first"),
]
LARGE_CASES = [Case(20, 64, 40, 512, hx=False), Case(10, 32, 40, 1024)]  # on a GPU too
START_SECONDS = 120.0  # in which a process that imports torch must be there


Work = Callable[[Sequence["Kernel"], Connection], None]


class Kernel(NamedTuple):
    """One row of the table, and what the process of its own is told."""

    device: str
    name: record.Kernel

    def __str__(self) -> str:
        backend, isa, cell, dtype = self.name
        return f"{self.device:<8}{backend:<10}{isa or '-':<13}{cell:<10}{dtype:<10}"


class Verdict(NamedTuple):
    cases: int  # that were computed
    share: float  # the largest part of its budget that an error took
    wrong: str | None
    seconds: float

    def __str__(self) -> str:
        if self.wrong is not None:
            return f"{'':>6}{'':>8}{self.seconds:>7.1f}  WRONG: {self.wrong}"
        return f"{self.cases:>6}{self.share:>8.2f}{self.seconds:>7.1f}  right"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    parser.add_argument(
        "--backend", nargs="+", choices=_kernel_backends(), default=_kernel_backends()
    )
    parser.add_argument("--cases", type=int, default=None, help="only the first so many cases")
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds that a kernel has for all its cases"
    )


def run(options: argparse.Namespace) -> int:
    wrong, work = 0, functools.partial(judge_all, cases=options.cases)
    print(f"{'device':<8}{'backend':<10}{'instructions':<13}{'cell':<10}{'dtype':<10}", end="")
    print(f"{'cases':>6}{'budget':>8}{'s':>7}")
    for device in options.device:
        kernels = kernels_of(device, options.backend, options.cell, options.dtype)
        verdicts = {}
        for kernel, verdict in judged(kernels, work, options.limit):
            print(kernel, verdict, sep="", flush=True)
            verdicts[kernel.name] = verdict.wrong
        wrong += sum(text is not None for text in verdicts.values())
        if verdicts:
            print(f"{len(verdicts)} kernels; written: {record.write_checked(device, verdicts)}")
        else:
            print(f"{device}: none of these kernels can run")
    print(f"{wrong} WRONG" if wrong else "all right")
    return 1 if wrong else 0


def _kernel_backends() -> list[str]:
    """Those that plain torch does not see through: they alone have kernels to check."""
    return [b.name for b in BACKENDS if not b.differentiable]


def kernels_of(
    device: torch.device, backends: Sequence[str], cells: Sequence[str], dtypes: Sequence[str]
) -> list[Kernel]:
    """What can run on the device, and those next to each other that share a truth."""
    found = []
    for cell, dtype, name in product(cells, dtypes, backends):
        if _refuses(by_name(name), cell, Case(2, 2, 8, 8), DTYPES[dtype], device):
            continue
        isas = machine.instruction_sets() if record.isa_of(name) else [""]
        found += [Kernel(str(device), record.Kernel(name, isa, cell, dtype)) for isa in isas]
    return found


def _refuses(
    candidate: Backend, cell: str, case: Case, dtype: torch.dtype, device: torch.device
) -> bool:
    problem, _ = as_problem(cell, case, make_inputs(cell, case, dtype))
    return candidate.supports(problem._replace(device=device)) is not None


def judged(kernels: Sequence[Kernel], work: Work, limit: float) -> Iterator[tuple[Kernel, Verdict]]:
    """The verdict of each kernel as it comes, from a process that does the work. After one that is
    wrong another process goes on with the next, as memory or the device may be in any state.

    `work` sends a first message when it is there, and then the verdicts, each within `limit`
    seconds."""
    context = multiprocessing.get_context("spawn")  # a fork would share threads and GPU contexts
    done = 0
    while done < len(kernels):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(kernels[done:], theirs), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        try:
            _wait_for(ours)
            while done < len(kernels):
                verdict = _verdict(ours, process, limit)
                yield kernels[done], verdict
                done += 1
                if verdict.wrong is not None:
                    break
        finally:
            process.kill()
            process.join()
            ours.close()


def _wait_for(connection: Connection) -> None:
    try:
        _receive(connection, START_SECONDS)
    except (EOFError, TimeoutError) as error:
        raise RuntimeError("the process that the kernels were to run in did not start") from error


def _verdict(connection: Connection, process: BaseProcess, limit: float) -> Verdict:
    """What the process says of its next kernel, or how it failed to."""
    start = time.perf_counter()
    try:
        verdict: Verdict = _receive(connection, limit)
        return verdict
    except TimeoutError:
        wrong = f"it had not ended after {limit:.0f} s"
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "ended"
        wrong = f"its process {how}"
    return Verdict(0, 0.0, wrong, time.perf_counter() - start)


def _receive(connection: Connection, seconds: float) -> Any:
    """What the other process sends; EOFError where it has ended instead."""
    if not connection.poll(seconds):
        raise TimeoutError
    return connection.recv()


def judge_all(kernels: Sequence[Kernel], connection: Connection, cases: int | None = None) -> None:
    """The work of a process that judges the kernels one after the other: see :func:`judged`."""
    warnings.simplefilter("ignore")  # torch's about its own layers
    with record.ignored():
        connection.send(None)
        for kernel in kernels:
            connection.send(judge(kernel, cases))


def judge(kernel: Kernel, cases: int | None = None) -> Verdict:
    """Compute all cases, or only the first so many, here and now."""
    start = time.perf_counter()
    name, isa, cell, dtype = kernel.name
    device = torch.device(kernel.device)
    if isa:
        machine.use_instruction_set(isa)
    on_gpu = device.type != "cpu"
    both = (False, True) if on_gpu and dtype == "float32" else (False,)
    chosen = [*CASES, *LARGE_CASES][:cases] if on_gpu else CASES[:cases]
    if CELLS[cell].states == 1:  # whose only state a projection would change the size of
        chosen = [case for case in chosen if not case.P]
    shares: list[float] = []
    for case, tf32 in product(chosen, both):
        if _refuses(by_name(name), cell, case, DTYPES[dtype], device):
            continue
        try:
            shares += _shares(truth(cell, case, DTYPES[dtype], device, tf32), name)
        except Exception as error:  # whatever it is, the kernel does not do what it should
            kind = "" if isinstance(error, WrongResultError) else f"{type(error).__name__}: "
            wrong = f"{case}{' with TF32' if tf32 else ''}: {kind}{error}".splitlines()[0]
            return Verdict(len(shares), 0.0, wrong, time.perf_counter() - start)
    return Verdict(len(shares), max(shares, default=0.0), None, time.perf_counter() - start)


@functools.lru_cache(maxsize=2 * len([*CASES, *LARGE_CASES]))
def truth(cell: str, case: Case, dtype: torch.dtype, device: torch.device, tf32: bool) -> Truth:
    """Which the instruction sets and backends have in common. Its many small operations are done
    sooner by one thread than by several that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Truth(cell, case, dtype, device=device, tf32=tf32)
    finally:
        torch.set_num_threads(threads)


def _shares(expected: Truth, name: str) -> Iterator[float]:
    """The largest shares of the budget that errors take in a training step and in inference."""
    cell, case = expected.cell, expected.case
    with float32_products(expected.precision):
        yield max(expected.check(run_case(cell, case, expected.inputs(), name)).values())
        leaves, layer = as_function(cell, case, expected.inputs())
        with backend(name), torch.inference_mode():
            outputs = layer(*leaves)
        named = dict(zip(OUTPUTS, outputs, strict=False))
        yield max(expected.check_outputs(named).values())
