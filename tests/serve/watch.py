"""What a server holds and counts while it serves, and whether that grows."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

from scipy.stats import t as student

from tests.serve.servers import counters, holdings
from vllm_orthrus.demo.server import Server

SEGMENTS = 10
RUNNING_IN = 0.4  # of the time, while allocators and learners find their level


class Sample(NamedTuple):
    seconds: float
    memory: int
    files: int
    threads: int
    resident: Mapping[str, int]
    counted: Mapping[str, float]


def sample(server: Server, started: float) -> Sample:
    held = holdings(server)
    return Sample(time.monotonic() - started, held.memory, held.files, held.threads, held.resident, counters(server))


@contextmanager
def watching(server: Server, every: float) -> Iterator[list[Sample]]:
    """A sample now and again, for the length of the block."""
    found: list[Sample] = []
    enough, started = threading.Event(), time.monotonic()

    def look() -> None:
        while not enough.wait(every):
            found.append(sample(server, started))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        enough.set()
        watcher.join(30)


class Slope(NamedTuple):
    """A straight line's, per minute, with how far it may be off by chance (95 %)."""

    per_minute: float
    noise: float
    mean: float

    @property
    def flat(self) -> bool:
        return abs(self.per_minute) <= self.noise


def slope(seconds: Sequence[float], values: Sequence[float]) -> Slope:
    """Noise by leaving out a tenth of the time at a time: neighbouring samples are too much alike to count each."""
    whole = _line(seconds, values)
    size = len(seconds) / SEGMENTS
    without = []
    for segment in range(SEGMENTS):
        kept = [place for place in range(len(seconds)) if not segment * size <= place < (segment + 1) * size]
        without.append(_line([seconds[place] for place in kept], [values[place] for place in kept]))
    spread = statistics.pvariance(without) * (SEGMENTS - 1)
    return Slope(60 * whole, 60 * float(student.ppf(0.975, SEGMENTS - 1)) * spread**0.5, statistics.fmean(values))


def _line(x: Sequence[float], y: Sequence[float]) -> float:
    return statistics.linear_regression(x, y).slope


def run_in(samples: Sequence[Sample]) -> list[Sample]:
    """Those from which slopes are told."""
    end = samples[-1].seconds
    return [one for one in samples if one.seconds >= RUNNING_IN * end]


def rates(samples: Sequence[Sample], windows: int) -> list[dict[str, Any]]:
    """Of each part of the time, what drafting brought in it."""
    size = len(samples) / windows
    ends = [samples[0], *(samples[min(len(samples), round((place + 1) * size)) - 1] for place in range(windows))]
    found = []
    for before, after in pairwise(ends):
        new = {name: after.counted[name] - before.counted.get(name, 0) for name in after.counted}
        cycles = new.get("spec_decode_num_drafts", 0)
        if not cycles:
            continue
        verified = new.get("orthrus_verifications", 0)
        found.append(
            {
                "seconds": (before.seconds + after.seconds) / 2,
                "tokens_per_cycle": 1 + new["spec_decode_num_accepted_tokens"] / cycles,
                "first_kept": new["spec_decode_num_accepted_tokens_per_pos/0"] / cycles,
                "hit_rate": new["orthrus_hits"] / verified if verified else None,
            }
        )
    return found
