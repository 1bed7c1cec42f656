"""Counters are read without waiting for the device, and what is read was true at one moment."""

import pytest
import torch

from vllm_orthrus.engine.onepass.counters import LateCounts


class Arrival:
    """A CUDA event as far as it may be used: whoever waits for it meets an AttributeError."""

    arrived = True

    def record(self) -> None:
        self.arrived = False

    def query(self) -> bool:
        return self.arrived


def test_a_copy_is_looked_at_once_it_has_arrived() -> None:
    counters, arrival = torch.tensor([1, 2]), Arrival()
    counts = LateCounts(("hits", "rows"), counters, arrival)
    assert counts.read() == {"hits": 0, "rows": 0}
    counters += 10
    assert counts.read() == {"hits": 0, "rows": 0}, "the copy is on its way"
    arrival.arrived = True
    assert counts.read() == {"hits": 1, "rows": 2}, "as it was when the copy began"
    arrival.arrived = True
    assert counts.read() == {"hits": 11, "rows": 12}


def test_where_host_and_device_are_one_nothing_is_late() -> None:
    counters = torch.tensor([1])
    counts = LateCounts(("hits",), counters)
    assert counts.read() == {"hits": 1}
    counters += 1
    assert counts.read() == {"hits": 2}


def test_counters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        counters = torch.tensor([1])
        counts = LateCounts(("hits",), counters, Arrival())
    counts.read()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_busy_gpu() -> None:
    counters = torch.tensor([3], device="cuda")
    counts = LateCounts(("hits",), counters)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    counters += 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert [counts.read() for _ in range(3)] == [{"hits": 0}] * 3
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert counts.read() == {"hits": 4}
