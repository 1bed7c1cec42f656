"""A line in the log, now and then, on how one-pass drafting fares."""

import time
from collections.abc import Callable, Sequence

import torch
from vllm.logger import init_logger

logger = init_logger("vllm.orthrus")


class OnePassReport:
    """Reads counters without waiting for the device: a line is about a copy that was begun an interval ago."""

    def __init__(
        self,
        names: Sequence[str],
        counters: torch.Tensor,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.names, self.counters, self.interval, self.clock = names, counters, interval, clock
        self.due = clock() + interval
        self.copy: torch.Tensor | None = None
        self.told = dict.fromkeys(names, 0)

    def tick(self) -> None:
        """Call once per step."""
        if self.clock() < self.due:
            return
        self.due = self.clock() + self.interval
        if self.copy is not None:
            counts = dict(zip(self.names, self.copy.tolist(), strict=True))
            self._tell({name: counts[name] - self.told[name] for name in self.names})
            self.told = counts
        self.copy = torch.empty_like(self.counters, device="cpu", pin_memory=self.counters.is_cuda)
        self.copy.copy_(self.counters, non_blocking=True)

    def _tell(self, new: dict[str, int]) -> None:
        steps = new["verifications"]
        if not steps:
            return
        logger.info(
            "Orthrus in one pass: %.2f tokens per forward; %.0f%% of outcomes foreseen, %.0f%% missed for their "
            "accepted count, %.0f%% for their bonus; %.1f rows per request and forward.",
            new["tokens"] / steps,
            100 * new["hits"] / steps,
            100 * new["accepted_count_missed"] / steps,
            100 * new["bonus_missed"] / steps,
            new["rows"] / steps,
        )
