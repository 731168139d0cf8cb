"""The clock: several callables in turn, in one process, and the best of many samples of each.

The machines that this runs on are shared, so a single time means little. Taking turns gives every
subject the same share of each disturbance, and the best sample is the one with the least of it.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

Subject = Callable[[], object]
SAMPLE_SECONDS = 3e-4  # a sample repeats a short call until it is this long


class Timing(NamedTuple):
    best: float  # seconds a call
    median: float
    samples: int
    calls: int  # calls a sample

    def merged(self, other: Timing) -> Timing:
        """The two as one measurement; the median becomes that of the one with more samples."""
        more = max(self, other, key=lambda timing: timing.samples)
        best = min(self.best, other.best)
        return Timing(best, more.median, self.samples + other.samples, self.calls)


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
        end = time.perf_counter() + seconds * len(order)
        while time.perf_counter() < end or len(samples[order[0]]) < least:
            for name in order:
                samples[name].append(sample(subjects[name], calls[name]))
            order.reverse()  # so that none always comes first after another
    return {
        name: Timing(min(taken), statistics.median(taken), len(taken), calls[name])
        for name, taken in samples.items()
    }
