"""When a difference is called one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

Verdict = Literal["faster", "slower", "no difference seen"]
FEWEST = 3  # two rounds agree by chance half of the time


class Call(NamedTuple):
    times: float  # as fast, in the median round
    least: float
    most: float
    spread: float  # a factor: rounds lie within about median / spread and median x spread
    verdict: Verdict


def call(ratios: Sequence[float]) -> Call:
    """|median of log r| > (largest - smallest log r) / 2, and all log r have one sign.

    r is how many times as fast one way was as another in a round.
    """
    logs = [math.log(ratio) for ratio in ratios]
    median, spread = statistics.median(logs), (max(logs) - min(logs)) / 2
    agree = min(logs) > 0 or max(logs) < 0
    verdict: Verdict = "no difference seen"
    if len(logs) >= FEWEST and agree and abs(median) > spread:
        verdict = "faster" if median > 0 else "slower"
    least, most = min(ratios), max(ratios)
    times = min(max(math.exp(median), least), most)  # it is between them, but for how it was rounded
    return Call(times, least, most, math.exp(spread), verdict)
