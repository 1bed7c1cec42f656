"""One-pass drafting's counts, from the device to `/metrics` and the log: all of them, once, and nobody waits."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.conftest import Checkpoints, StartEngine, one_pass
from tests.engine.harness import Engine, listen, prompts
from tests.engine.test_lossless import HostReads
from vllm_orthrus.engine.onepass.counters import LateCounts
from vllm_orthrus.kernels.take_up import COUNTERS
from vllm_orthrus.patches import metrics

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def drafting(start: StartEngine, tiny: Checkpoints) -> Engine:
    return start(one_pass(tiny.block_head), max_num_batched_tokens=512)


def counted(engine: Engine) -> dict[str, int]:
    """What the device and the host say themselves."""
    speculator = engine.runner.speculator
    state = speculator.drafting.memory
    counts = dict(zip(COUNTERS, state.counters.tolist(), strict=True))
    return counts | {"draft_passes": speculator.drafting.draft_passes}


def exposed(engine: Engine) -> dict[str, int]:
    """What `/metrics` would say, by the names under which one-pass drafting counts."""
    found = {
        (metric.name, metric.labels.get("cause")): metric.value
        for metric in engine.llm.get_metrics()
        if metric.name.startswith("vllm:orthrus")
    }
    assert len(found) in (0, len(metrics.METRICS))
    return {name: int(found[metric.name, metric.cause]) for name, metric in metrics.METRICS.items() if found}


def test_every_count_arrives_once(drafting: Engine) -> None:
    """Through one batch that shrinks, requests that come one by one, and prompts in between."""
    for count, tokens in ((5, 20), (1, 9), (1, 30), (8, 12)):
        drafting.run(prompts(count), tokens)
        assert exposed(drafting) == drafting.one_pass == counted(drafting)
    assert all(exposed(drafting).values()), "something was never counted"


def test_they_agree_with_each_other_and_with_vllm(drafting: Engine) -> None:
    before = counted(drafting)
    run = drafting.run(prompts(1), 40)
    new = metrics.new_since(before, exposed(drafting))
    assert new["hits"] + new["accepted_count_missed"] + new["bonus_missed"] == new["verifications"]
    # A request alone: after its first block every step carries hypotheses.
    assert new["draft_passes"] == 1
    assert new["verifications"] == run.counts.steps
    assert new["tokens"] == run.counts.steps + run.counts.accepted
    speculator = drafting.runner.speculator
    verified, carried = speculator.shape.verified, speculator.shape.num_hypotheses(1) * speculator.shape.block
    assert new["rows"] == run.counts.steps * (verified + carried)


def _told_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(metrics, "new_since", lambda told, counts: counts)


def _some_lost(patch: pytest.MonkeyPatch) -> None:
    new_since, calls = metrics.new_since, [0]

    def faulty(told: metrics.Counts, counts: metrics.Counts) -> metrics.Counts:
        calls[0] += 1
        return new_since(told if calls[0] % 5 else counts, counts)

    patch.setattr(metrics, "new_since", faulty)


@pytest.mark.parametrize("plant", [_told_twice, _some_lost])
def test_faults_are_noticed(
    plant: Plant, start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(one_pass(tiny.block_head), max_num_batched_tokens=512)
    with monkeypatch.context() as patch:
        plant(patch)
        engine.run(prompts(2), 20)
        assert engine.one_pass != counted(engine)


class Arrival:
    """A CUDA event as far as drafting may use it: anything else, waiting above all, is an error."""

    def __init__(self) -> None:
        self.asked, self.recorded = 0, 0

    def record(self) -> None:
        self.recorded += 1

    def query(self) -> bool:
        self.asked += 1
        return self.asked % 4 == 1


def test_nobody_waits_for_the_device(drafting: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    speculator, arrival, read = drafting.runner.speculator, Arrival(), LateCounts.read
    state = speculator.drafting.memory

    def watched(self: LateCounts) -> Any:
        address = self.copy.data_ptr()
        with HostReads():
            counts = read(self)
        assert self.copy.data_ptr() == address
        return counts

    # What was told of earlier runs must not be told again as a difference below zero.
    late = LateCounts(COUNTERS, state.counters, arrival)
    late.copy.copy_(state.counters)
    monkeypatch.setattr(LateCounts, "read", watched)
    monkeypatch.setattr(speculator.drafting, "counted", late)
    drafting.run(prompts(3), 24)
    assert 1 < arrival.recorded < arrival.asked
    told, true = drafting.one_pass, counted(drafting)
    assert told["hits"] + told["accepted_count_missed"] + told["bonus_missed"] == told["verifications"]
    assert 0 < told["verifications"] < true["verifications"], "the newest copy has not been looked at yet"
    monkeypatch.undo()
    drafting.run(prompts(1), 4)
    assert drafting.one_pass == counted(drafting), "what came late came all the same"


@pytest.mark.usefixtures("asynchronous")
def test_asynchronous_scheduling(start: StartEngine, tiny: Checkpoints) -> None:
    engine = start(one_pass(tiny.block_head), max_num_batched_tokens=512)
    for _ in range(2):
        engine.run(prompts(4), 24)
        told = exposed(engine)
        assert told == engine.one_pass
        assert told["hits"] + told["accepted_count_missed"] + told["bonus_missed"] == told["verifications"]
        # Steps that were under way when the last request ended are told with the next.
        assert 0 <= counted(engine)["verifications"] - told["verifications"] <= 8


def test_a_line_in_the_log(drafting: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, said = listen(drafting, monkeypatch)
    drafting.run(prompts(2), 16)
    logger.log()
    lines = [line for line in said if "Orthrus" in line]
    assert len(lines) == 1
    assert "tokens per forward" in lines[0] and "2 drafts in a pass of their own" in lines[0]
    said.clear()
    logger.log()
    assert not [line for line in said if "Orthrus" in line], "each interval tells of its own steps"


def test_other_ways_to_decode_have_none(start: StartEngine, tiny: Checkpoints) -> None:
    two_passes = {"method": "orthrus", "model": str(tiny.block_head), "orthrus_passes": "two"}
    for speculative in (two_passes, None):
        engine = start(speculative)
        engine.run(prompts(2), 8)
        assert not exposed(engine)
        assert not engine.one_pass


def test_rays_metrics_have_them_too(drafting: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve hands vLLM a logger whose counters are Ray's: other names, labels in order, nothing below zero."""
    ray_metrics = pytest.importorskip("ray.util.metrics")
    from vllm.v1.metrics import ray_wrappers
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

    added: dict[tuple[str, str, str | None], float] = {}

    def inc(self: Any, value: float, tags: dict[str, str]) -> None:
        added[self.info["name"], tags["engine"], tags.get("cause")] = value

    monkeypatch.setattr(ray_metrics.Counter, "inc", inc)
    monkeypatch.setattr(ray_wrappers, "ray_metrics", ray_metrics)  # which it does not take where Ray Serve is missing
    config = drafting.llm.llm_engine.vllm_config.speculative_config
    prom = ray_wrappers.RaySpecDecodingProm(config, ["model_name", "engine"], {0: ["tiny", "0"], 1: ["tiny", "1"]})
    stats = SpecDecodingStats.new(config.num_speculative_tokens)
    stats.orthrus = {name: 10 + index for index, name in enumerate(metrics.METRICS)}
    prom.observe(stats, 1)
    ours = {key: value for key, value in added.items() if "orthrus" in key[0]}
    assert ours == {
        (metric.name.replace(":", "_"), "1", metric.cause): stats.orthrus[name]
        for name, metric in metrics.METRICS.items()
    }
