"""One pass as one of the modes: the most drafts mean one pass, fewer mean two, none mean plain decoding."""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import pytest

from tests.engine import checkpoints
from tests.engine.conftest import StartEngine
from tests.engine.harness import UNDER_PRESSURE, Engine, Run, prompts, says_the_same_under_pressure
from vllm_orthrus.engine.config import default_modes
from vllm_orthrus.engine.onepass.drafting import OnePassDrafting
from vllm_orthrus.engine.onepass.memory import Memory
from vllm_orthrus.engine.sampler import DraftSampler
from vllm_orthrus.kernels.take_up import COUNTERS

MOST = 15
MODES = default_modes(MOST, one_pass=True)
# Every change from a mode to another, and steps behind one of the same mode.
TURNS = [15, 15, 7, 15, 15, 0, 14, 15, 3, 3, 0, 0, 7, 14, 14, 3, 15, 0, 15, 14, 7, 0, 3, 14, 0, 7, 7, 3, 7]

Plant = Callable[[pytest.MonkeyPatch], None]


class Step(NamedTuple):
    """What a forward verified of each request, whether it had blocks beside it, and what is drafted behind it."""

    drafts: frozenset[int]
    requests: int
    carried: bool
    asked: int


class Watched:
    """Forces the modes of an engine, and sees what its steps are."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch, turns: Sequence[int] = TURNS) -> None:
        self.engine, self.turn = engine, cycle(turns)
        self.steps: list[Step] = []
        scheduler: Any = engine.llm.llm_engine.engine_core.engine_core.scheduler
        patch.setattr(scheduler.dynamic_sd_lookup.policy, "choose", lambda requests, context: next(self.turn))
        speculator = engine.runner.speculator
        self.memory: Memory = speculator.drafting.memory
        propose = speculator.propose

        def propose_and_note(batch: Any, *rest: Any, **named: Any) -> Any:
            drafts = batch.num_draft_tokens_per_req
            verified = frozenset() if drafts is None else frozenset(drafts.tolist())
            carried = speculator.drafting.carried
            self.steps.append(Step(verified, batch.num_reqs, carried, named["num_speculative_tokens"]))
            return propose(batch, *rest, **named)

        patch.setattr(speculator, "propose", propose_and_note)

    def run(self, given: Sequence[Sequence[int]], length: int, **sampling: Any) -> Run:
        self.steps.clear()
        self.memory.counters.zero_()
        return self.engine.run(given, length, **sampling)

    def counts(self) -> dict[str, int]:
        return dict(zip(COUNTERS, self.memory.counters.tolist(), strict=True))

    def carries_where_it_should(self) -> bool:
        """Blocks ride where all of the batch was drafted for in one pass, and what they came to is counted there."""
        assert set(MODES[1:]) <= {drafts for step in self.steps for drafts in step.drafts}
        changes = {(before.asked, step.asked) for before, step in zip(self.steps, self.steps[1:], strict=False)}
        assert len(changes) > 12, "hardly any mode changed"
        behind_one_pass = [step for step in self.steps if step.drafts == {MOST}]
        carried = [step for step in self.steps if step.carried]
        counts = self.counts()
        assert counts["verifications"] == counts["hits"] + counts["accepted_count_missed"] + counts["bonus_missed"]
        # What a plain step follows on is not looked at.
        counted = sum(step.requests for step in carried if step.asked)
        return len(carried) > 5 and carried == behind_one_pass and counts["verifications"] == counted


def settings(head: Any, **more: Any) -> dict[str, Any]:
    few = {"orthrus_passes": "one", "orthrus_modes": MODES, "orthrus_block_size": 16, "orthrus_hypotheses": 3}
    return {"method": "orthrus", "model": str(head), "num_speculative_tokens": MOST, "orthrus_rows": 512} | few | more


@pytest.fixture(scope="module")
def wide_head(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return checkpoints.write_head(tmp_path_factory.mktemp("wide") / "head", block_size=32, noise=0.05)


@pytest.fixture(scope="module")
def changing(start: StartEngine, wide_head: Any) -> Engine:
    return start(settings(wide_head, draft_sample_method="probabilistic"), max_num_batched_tokens=512)


def test_text_stays_the_same_through_all_changes(
    changing: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, given = Watched(changing, monkeypatch), prompts(10)
    run = watched.run(given, 50)
    assert run.tokens == plain.run(given, 50).tokens
    assert 0 < run.counts.accepted < run.counts.drafted
    assert watched.carries_where_it_should()
    assert watched.counts()["hits"] > 0


def _nothing_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Memory, "forget", lambda memory, slots: None)


def _all_is_ready(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Memory, "ready", lambda memory, slots: True)


def _all_are_wanted(patch: pytest.MonkeyPatch) -> None:
    finish = OnePassDrafting.finish
    patch.setattr(OnePassDrafting, "finish", lambda drafting, n, turn: finish(drafting, n, turn._replace(drafts=MOST)))


@pytest.mark.parametrize("plant", [_nothing_is_forgotten, _all_is_ready, _all_are_wanted])
def test_blocks_that_ride_where_they_should_not_are_noticed(
    plant: Plant, changing: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    watched = Watched(changing, monkeypatch)
    watched.run(prompts(3, shortest=12), 40)
    assert not watched.carries_where_it_should()


class Knows:
    """Drafts what plain decoding said: a draft that is rejected was made for another place, or handed over wrongly."""

    def __init__(self, engine: Engine, plain: Engine, given: list[list[int]], length: int) -> None:
        told = plain.run(given, length).tokens
        self.texts = {tuple(prompt): prompt + text for prompt, text in zip(given, told, strict=True)}
        self.states = engine.runner.req_states

    def install(self, patch: pytest.MonkeyPatch) -> None:
        sample = DraftSampler.sample

        def sample_and_correct(sampler: DraftSampler, num_reqs: int, logits: Any, keys: Any) -> None:
            sample(sampler, num_reqs, logits, keys)
            for row in range(num_reqs):
                slot = int(sampler.rows.slots[row, 0])
                if slot >= 0:
                    prompt = self.states.all_token_ids.gpu[slot, : self.states.prompt_len.np[slot]].tolist()
                    behind = int(sampler.rows.positions[row, 0]) + 1
                    known = self.texts[tuple(prompt)][behind : behind + keys.shape[1]]
                    for place, token in enumerate(known):
                        sampler.drafts[row, place] = token

        patch.setattr(DraftSampler, "sample", sample_and_correct)


def keeps_all(engine: Engine, plain: Engine, patch: pytest.MonkeyPatch) -> bool:
    given, length = prompts(3), 180
    Knows(engine, plain, given, length + MOST + 1).install(patch)
    watched = Watched(engine, patch)
    run = watched.run(given, length)
    assert run.counts.drafted > 300
    assert watched.carries_where_it_should()
    return run.counts.accepted == run.counts.drafted


def test_every_right_draft_is_kept(changing: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        assert keeps_all(changing, plain, patch)

    # A planted fault: the last drafts are handed over where the first are wanted.
    speculator = changing.runner.speculator
    propose = speculator.propose

    def last(*given: Any, **named: Any) -> Any:
        drafts, wanted = propose(*given, **named), named["num_speculative_tokens"]
        return drafts.roll(wanted, dims=1) if speculator.drafting.carried and 0 < wanted < MOST else drafts

    monkeypatch.setattr(speculator, "propose", last)
    assert not keeps_all(changing, plain, monkeypatch)


def keys_come_once(engine: Engine, patch: pytest.MonkeyPatch) -> bool:
    """A draw that is repeated for a request depends on text that the first one made."""
    sample, met, twice = DraftSampler.sample, set[tuple[int, int]](), [0]

    def sample_and_note(sampler: DraftSampler, num_reqs: int, logits: Any, keys: Any) -> None:
        sample(sampler, num_reqs, logits, keys)
        slots = sampler.rows.slots[:num_reqs, : keys.shape[1]]
        new = {draw for draw in zip(slots.flatten().tolist(), keys.flatten().tolist(), strict=True) if draw[0] >= 0}
        twice[0] += len(new & met)
        met.update(new)

    patch.setattr(DraftSampler, "sample", sample_and_note)
    watched = Watched(engine, patch)
    watched.run(prompts(3), 60, temperature=0.8, seed=3)
    assert len(met) > 500
    return not twice[0]


def test_no_draw_is_made_twice(changing: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        assert keys_come_once(changing, patch)

    # A planted fault: narrow blocks are keyed by position, as in two passes alone.
    sample_block = DraftSampler.sample_block
    monkeypatch.setattr(
        DraftSampler, "sample_block", lambda sampler, n, hidden, view, keys: sample_block(sampler, n, hidden, view)
    )
    assert not keys_come_once(changing, monkeypatch)


def test_sampled_requests_beside_greedy_ones(changing: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams

    watched, given = Watched(changing, monkeypatch), prompts(6)
    watched.memory.counters.zero_()
    params = [
        SamplingParams(temperature=0.8 * (row % 2), seed=row, max_tokens=40, ignore_eos=True, detokenize=False)
        for row in range(len(given))
    ]
    outputs = changing.llm.generate([{"prompt_token_ids": prompt} for prompt in given], params, use_tqdm=False)
    greedy = plain.run(given, 40).tokens
    for row, output in enumerate(outputs):
        told = list(output.outputs[0].token_ids)
        assert (told == greedy[row]) == (row % 2 == 0)
    assert watched.carries_where_it_should()


@pytest.mark.usefixtures("asynchronous")
def test_chunked_prefill_preemption_and_prefix_hits(
    start: StartEngine, wide_head: Any, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scheduled ahead, prompts join in pieces while others decode, in whatever mode that is."""
    engine = start(settings(wide_head), **UNDER_PRESSURE)
    assert engine.llm.llm_engine.engine_core.engine_core.batch_queue_size == 2
    watched = Watched(engine, monkeypatch)
    watched.memory.counters.zero_()
    says_the_same_under_pressure(engine, plain)
    assert any(step.carried for step in watched.steps)
    assert all(step.drafts == {MOST} for step in watched.steps if step.carried)
    assert watched.counts()["verifications"] > 0
