"""Numbers of a run: agreement by block row while training, and `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowAgreement:
    """How often row i of a block names the target's most probable token, given the true prefix of the block."""

    agreed: Tensor  # [B] counts
    seen: Tensor  # [B]

    @classmethod
    def empty(cls, width: int) -> RowAgreement:
        return cls(torch.zeros(width), torch.zeros(width))

    @classmethod
    def count(cls, place: Tensor, agreed: Tensor, width: int) -> RowAgreement:
        """From each taught row's place in its block, and whether it agreed."""
        place = place.cpu()
        return cls(
            torch.bincount(place, agreed.cpu().float(), width).float(), torch.bincount(place, None, width).float()
        )

    def __add__(self, other: RowAgreement) -> RowAgreement:
        return RowAgreement(self.agreed + other.agreed, self.seen + other.seen)

    def summed(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> RowAgreement:
        """The counts of all processes together."""
        return RowAgreement(*(reduce(part.to(device)).cpu() for part in (self.agreed, self.seen)))

    def rates(self) -> list[float]:
        return [round(float(a / s), 4) for a, s in zip(self.agreed, self.seen, strict=True) if s > 0]

    def tokens_per_cycle(self) -> float:
        """1 + sum of running products: what these rates would give if rows agreed independently of each other."""
        expected, running = 1.0, 1.0
        for rate in self.rates():
            running *= rate
            expected += running
        return expected


class MetricsLog:
    """One JSON object per line. A resumed run drops lines beyond its checkpoint, so no step appears twice."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step and path.is_file() else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a run that was cut off in the middle of a line
    return lines
