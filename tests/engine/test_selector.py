"""The shipped selector in the engine: text as without, drafts as the reference chooses them, and faults that show."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.checkpoints import write_selector
from tests.engine.conftest import Checkpoints, StartEngine
from tests.engine.harness import Engine
from tests.engine.test_config import build, orthrus
from tests.engine.trained import OPTIONS, TINY, chat, questions, tokens_per_cycle, trained_head
from vllm_orthrus.engine.sampler import DraftSampler
from vllm_orthrus.heads import SelectorShape, named_parts, open_head, open_selector, save_head, save_selector
from vllm_orthrus.heads.convert import extract_head, merge_head
from vllm_orthrus.heads.widen import read_config
from vllm_orthrus.kernels import select
from vllm_orthrus.training.reference import Reference
from vllm_orthrus.training.simulator import OnePass

SELECTOR = TINY / "selector"
LENGTH = 40


def selecting(passes: str, **settings: Any) -> dict[str, Any]:
    return trained_head(passes, orthrus_selector=str(SELECTOR), **settings)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.from_pretrained(TINY / "base", TINY / "head", selector=str(SELECTOR))


@pytest.fixture(scope="module")
def drafting(start: StartEngine) -> Engine:
    return start(selecting("two"), TINY / "base", **OPTIONS)


def steps_of(reference: Reference, given: list[list[int]]) -> int:
    return sum(len(generation.cycles) for generation in reference.generate(given, LENGTH, drafting="greedy"))


def drafts_as_the_reference(engine: Engine, reference: Reference) -> bool:
    """Text, and as many steps: every draft is the one that the reference loop accepts or rejects."""
    given = [chat(engine, question) for question in questions()]
    run = engine.run(given, LENGTH)
    expected = reference.generate(given, LENGTH, drafting="greedy")
    assert run.tokens == [generation.tokens for generation in expected], "whatever is drafted, text stays right"
    return run.counts.steps == sum(len(generation.cycles) for generation in expected)


def test_two_passes_draft_as_the_reference(drafting: Engine, reference: Reference) -> None:
    assert drafts_as_the_reference(drafting, reference)
    alone = Reference.from_pretrained(TINY / "base", TINY / "head")
    given = [chat(drafting, question) for question in questions()]
    assert steps_of(reference, given) < 0.95 * steps_of(alone, given), "the selector makes a difference"


def test_one_pass_drafts_as_the_simulator(start: StartEngine, reference: Reference) -> None:
    """Steps and hits, which depend on the confidences that the selector gives."""
    engine = start(selecting("one"), TINY / "base", **OPTIONS)
    simulator, steps, given = OnePass(reference, 4), [], [chat(engine, question) for question in questions()]
    for prompt in given:  # one at a time: what is learnt depends on who comes first
        before = engine.run([prompt], LENGTH)
        (run,) = simulator.generate([prompt], LENGTH)
        assert before.tokens == [run.tokens]
        steps += run.steps
    counted = engine.one_pass
    hits = sum(step.hit for step in steps)
    assert abs(counted["verifications"] - len(steps)) <= len(given)
    assert hits > 0
    assert abs(counted["hits"] - hits) <= len(given)  # an ended request drafts no more


def test_seeds_decide_what_is_drawn(start: StartEngine) -> None:
    engine = start(selecting("two", draft_sample_method="probabilistic"), TINY / "base", **OPTIONS)
    given = [chat(engine, question) for question in questions()]
    first, again = (engine.run(given, LENGTH, temperature=0.7, seed=3) for _ in range(2))
    assert first.tokens == again.tokens
    assert tokens_per_cycle(first) > 2.5


def test_a_spoilt_one_is_told_and_left_out(
    start: StartEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = dict(open_selector(SELECTOR).tensors()) | {"gate": torch.full((64, 320), float("nan"))}
    save_selector(tmp_path / "spoilt", parts, SelectorShape(64, 16), read_config(TINY / "base"))
    settings = trained_head("two", orthrus_selector=str(tmp_path / "spoilt"))
    engine = start(settings, TINY / "base", **OPTIONS)
    said = {record.getMessage() for record in caplog.records if "not finite" in record.getMessage()}
    assert len(said) == 1 and "selector has values that are not finite in 1 of its 3 tensors" in said.pop()
    alone = Reference.from_pretrained(TINY / "base", TINY / "head")
    assert drafts_as_the_reference(engine, alone)


# Planted faults: each is lossless, and must show.


def _a_row_further(patch: pytest.MonkeyPatch) -> None:
    chosen = select.naive

    def faulty(said: Any, *rest: Any) -> Any:
        return chosen(said._replace(tokens=said.tokens.roll(1, 1), probability=said.probability.roll(1, 1)), *rest)

    patch.setattr(select, "naive", faulty)


def _the_draft_before_the_last(patch: pytest.MonkeyPatch) -> None:
    corrected, seen = select.corrections, []

    def faulty(tables: Any, previous: torch.Tensor, gate: Any, tokens: Any) -> torch.Tensor:
        seen.append(previous)
        before = seen[-2] if len(seen) > 1 and len(seen[-2]) == len(previous) else previous
        return corrected(tables, before, gate, tokens)

    patch.setattr(select, "corrections", faulty)


def _gates_of_other_requests(patch: pytest.MonkeyPatch) -> None:
    sampled = DraftSampler.select

    def faulty(self: Any, selector: Any, keys: Any, hidden: torch.Tensor, *rest: Any) -> Any:
        return sampled(self, selector, keys, hidden.roll(keys.shape[1], 0), *rest)

    patch.setattr(DraftSampler, "select", faulty)


@pytest.mark.parametrize("plant", [_a_row_further, _the_draft_before_the_last, _gates_of_other_requests])
def test_faults_show(
    plant: Callable[[pytest.MonkeyPatch], None],
    drafting: Engine,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        plant(patch)
        given = [chat(drafting, question) for question in questions()]
        run = drafting.run(given, LENGTH)
    assert run.counts.steps > 1.03 * steps_of(reference, given), "lossless, and so it shows in acceptance alone"


# Where it lies, and what is refused


def test_it_may_lie_beside_its_head(start: StartEngine, reference: Reference, tmp_path: Path) -> None:
    """The same drafts from a head with the selector in it, alone and merged, by no setting at all."""
    head, selector = open_head(TINY / "head"), open_selector(SELECTOR)
    tensors = dict(head.stored()) | named_parts(dict(selector.tensors()))
    save_head(tmp_path / "whole", tensors, replace(head.config, selector=selector.shape))
    extract_head(open_head(tmp_path / "whole"), tmp_path / "again", "some/base", None)
    assert open_head(tmp_path / "again").config.selector == selector.shape
    merge_head(open_head(tmp_path / "again"), TINY / "base", tmp_path / "merged")
    merged = start(trained_head("two", model=str(tmp_path / "merged")), tmp_path / "merged", **OPTIONS)
    assert drafts_as_the_reference(merged, reference)
    off = build(TINY / "base", orthrus(tmp_path / "whole", orthrus_selector="off"))
    assert not off.speculative_config.has_selector


def test_what_may_be_set(tiny: Checkpoints, tmp_path: Path) -> None:
    assert build(tiny.base, orthrus(tiny.block_head)).speculative_config.orthrus_selector == "off"
    selector = write_selector(tmp_path / "selector")
    given = {"orthrus_selector": str(selector)}
    assert build(tiny.base, orthrus(tiny.block_head, **given)).speculative_config.has_selector
    for settings, says in (
        ({"orthrus_selector": ""}, "names nothing"),
        ({"orthrus_selector": str(tiny.block_head)}, "holds no selector"),
        (given | {"use_local_argmax_reduction": True}, "does not go with use_local_argmax_reduction=True"),
        (given | {"draft_load_config": {"load_format": "dummy"}}, "makes up"),
    ):
        with pytest.raises(ValueError, match=says):
            build(tiny.base, orthrus(tiny.block_head, **settings))
    narrow = write_selector(tmp_path / "narrow", hidden_size=32)
    with pytest.raises(ValueError, match=r"is \(8, 32\), and .* needs \(8, 64\)"):
        build(tiny.base, orthrus(tiny.block_head, orthrus_selector=str(narrow)))
