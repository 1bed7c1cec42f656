"""Counters on the device, as plain numbers on the host, without ever waiting for the device."""

from collections.abc import Sequence
from typing import Protocol

import torch


class Event(Protocol):
    """What is asked of a CUDA event. It can also be waited for, which is what must not happen here."""

    def record(self) -> None: ...

    def query(self) -> bool: ...


class LateCounts:
    """Keeps one copy on its way to the host. Until it has arrived, the last one that did is what is read."""

    def __init__(self, names: Sequence[str], counters: torch.Tensor, arrived: Event | None = None) -> None:
        self.names, self.counters, self.arrived = names, counters, arrived
        if counters.is_cuda and arrived is None:
            self.arrived = torch.cuda.Event()  # one that was never recorded has arrived
        self.copy = torch.zeros_like(counters, device="cpu", pin_memory=counters.is_cuda)
        self.latest: list[int] = self.copy.tolist()

    @torch.inference_mode()  # the counters may have been made in it, which a copy outside would not forgive
    def read(self) -> dict[str, int]:
        """Call once per step: each call that finds a copy arrived begins the next."""
        if self.arrived is None:
            self.latest = self.counters.tolist()
        elif self.arrived.query():
            self.latest = self.copy.tolist()
            self.copy.copy_(self.counters, non_blocking=True)
            self.arrived.record()
        return dict(zip(self.names, self.latest, strict=True))
