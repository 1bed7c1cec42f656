"""What a head keeps is counted once, and what keeps more is told."""

from pathlib import Path

import pytest
from torch import nn

from benchmarks.head_memory import ALONE, MERGED, PLAIN, SERVED, Found, by_shapes, weights, wrong


def test_shared_memory_counts_once() -> None:
    base, head = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)
    tied = nn.Linear(8, 8, bias=False)
    tied.weight = base.weight
    window = nn.Linear(8, 4, bias=False)
    window.weight = nn.Parameter(base.weight.detach()[4:])
    assert weights(base) == weights(base, tied, window) == 256
    assert weights(base, head) == 384


def test_planted_fault_a_second_base_or_a_cache() -> None:
    plain, right = ({"weights": size, "layers_with_a_cache": 2} for size in (400, 500))
    found = Found(Path(), {}, 100, {PLAIN: plain, ALONE: right, MERGED: right, SERVED: right})
    assert wrong(found) == []
    found.engines[MERGED] = right | {"weights": 900}
    found.engines[SERVED] = right | {"layers_with_a_cache": 4}
    assert [fault.partition(":")[0] for fault in wrong(found)] == [MERGED, SERVED]


@pytest.mark.parametrize(("name", "base", "head"), [("Qwen3-1.7B", 1.72, 0.7), ("Qwen3-8B", 8.19, 3.0)])
def test_shapes_are_those_of_the_models(name: str, base: float, head: float) -> None:
    """Billions of parameters as published, and the head's gigabytes in docs/memory.md."""
    found = by_shapes(name)
    assert found["base"] / 2e9 == pytest.approx(base, abs=0.005)
    assert found["head"] / 1e9 == pytest.approx(head, abs=0.05)
