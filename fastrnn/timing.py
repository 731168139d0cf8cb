"""The clock: several callables in turn, in one process, and the best of many samples of each.

The machines that this runs on are shared, so a single time means little. Taking turns gives every
subject the same share of each disturbance, and the best sample is the one with the least of it.
What other processes took from the cores in the meantime is measured as well: subjects that are
disturbed all the time suffer very unequally, and their ratio means nothing.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

Subject = Callable[[], object]
SAMPLE_SECONDS = 3e-4  # a sample repeats a short call until it is this long


class Timing(NamedTuple):
    best: float  # seconds a call
    median: float
    samples: int
    calls: int  # calls a sample
    others: float  # cores that other processes used meanwhile; 0 where the system does not tell

    def merged(self, other: Timing) -> Timing:
        """The two as one measurement; the median becomes that of the one with more samples."""
        more = max(self, other, key=lambda timing: timing.samples)
        best = min(self.best, other.best)
        others = max(self.others, other.others)
        return Timing(best, more.median, self.samples + other.samples, self.calls, others)


BUSY = 0.3  # cores that others use, from which on times tell little


class Others:
    """The cores' time that other processes have used since this was made."""

    STAT = Path("/proc/stat")

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.before = self._used()

    def cores(self) -> float:
        return max(0.0, (self._used() - self.before) / (time.perf_counter() - self.start))

    def complaint(self, what: str) -> str | None:
        """What to tell where they were too many for the times that were taken; `what` is to be done
        again."""
        cores = self.cores()
        if cores <= BUSY:
            return None
        return f"other processes used {cores:.1f} cores: {what} again when they rest"

    def _used(self) -> float:
        """Seconds, of all cores together, that went neither to this process nor to none."""
        if not self.STAT.exists():
            return 0.0
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, self.STAT.read_text().split("\n", 1)[0].split()[1:9]
        )
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


@contextmanager
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def sample(subject: Subject, calls: int) -> float:
    """Seconds a call, over `calls` of them."""
    start = time.perf_counter()
    for _ in range(calls):
        subject()
    return (time.perf_counter() - start) / calls


def calls_a_sample(subject: Subject) -> int:
    subject()  # the first call allocates, packs and starts threads
    once = min(sample(subject, 1), sample(subject, 1))
    return max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))


def alternate(
    subjects: Mapping[str, Subject], seconds: float = 1.0, least: int = 5
) -> dict[str, Timing]:
    """Times the subjects in turn, for about `seconds` each and at least `least` samples each."""
    with no_collection():
        calls = {name: calls_a_sample(subject) for name, subject in subjects.items()}
        samples: dict[str, list[float]] = {name: [] for name in subjects}
        order = list(subjects)
        others = Others()
        end = time.perf_counter() + seconds * len(order)
        while time.perf_counter() < end or len(samples[order[0]]) < least:
            for name in order:
                samples[name].append(sample(subjects[name], calls[name]))
            order.reverse()  # so that none always comes first after another
        cores = others.cores()
    return {
        name: Timing(min(taken), statistics.median(taken), len(taken), calls[name], cores)
        for name, taken in samples.items()
    }
