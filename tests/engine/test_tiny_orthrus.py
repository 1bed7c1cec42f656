"""The shipped trained head: identical greedy text, and as many tokens per cycle as the reference loop gets."""

from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

from tests.engine.conftest import THOROUGH, StartEngine
from vllm_orthrus.training.evaluate import read_prompts
from vllm_orthrus.training.reference import Cycle, Reference, tokens_per_cycle
from vllm_orthrus.training.simulator import OnePass, figures
from vllm_orthrus.training.simulator import Run as SimulatedRun

TINY = Path(__file__).parents[2] / "examples" / "tiny-orthrus"
PROMPTS, LENGTH = 200, 128
# These take up to ten minutes each: one prompt in so many, unless all are asked for.
STEP = dict.fromkeys((16, 1), 1) if THOROUGH else {16: 4, 1: 10}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (TINY / "head").is_dir(), reason="examples/tiny-orthrus/head is not there"),
]


class HeldOut(NamedTuple):
    prompts: list[list[int]]
    kinds: list[str]
    greedy: list[list[int]]  # past the end of the answer, too
    end: int  # the token that ends an answer

    def answer(self, index: int) -> list[int]:
        tokens = self.greedy[index]
        return tokens[: tokens.index(self.end) + 1] if self.end in tokens else tokens


SETTINGS = {"max_model_len": 1024, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 128 << 20}


@pytest.fixture(scope="module")
def held_out(start: StartEngine) -> HeldOut:
    """Held-out prompts and what vLLM without drafts says to them, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    # Five of every six, so that all classes take part.
    chosen = [prompt for index, prompt in enumerate(read_prompts(TINY / "heldout.jsonl", tokenizer)) if index % 6]
    prompts, kinds = [prompt.tokens for prompt in chosen], [prompt.kind for prompt in chosen]
    assert len(prompts) == PROMPTS
    plain = start(None, model=TINY / "base", max_num_seqs=16, **SETTINGS)
    return HeldOut(prompts, kinds, plain.run(prompts, LENGTH).tokens, tokenizer.eos_token_id)


@pytest.mark.parametrize("batch", [16, 1])
def test_identical_text_at_the_reference_rate(batch: int, start: StartEngine, held_out: HeldOut) -> None:
    prompts, greedy = held_out.prompts[:: STEP[batch]], held_out.greedy[:: STEP[batch]]
    two_pass = {"method": "orthrus", "model": str(TINY / "head"), "orthrus_passes": "two"}
    engine = start(two_pass, TINY / "base", max_num_seqs=batch, **SETTINGS)
    run = engine.run(prompts, LENGTH)
    different = [index for index, tokens in enumerate(run.tokens) if tokens != greedy[index]]
    assert not different, f"{len(different)} of {len(prompts)} prompts continue differently"
    mean = 1 + run.counts.accepted / run.counts.steps
    expected = reference_rate(prompts)
    print(f"batch {batch}: {len(prompts)} prompts identical, {mean:.3f} tokens per cycle, reference {expected:.3f}")
    assert mean == pytest.approx(expected, rel=0.01)
    assert mean > 3, "the shipped head drafts worse than it did"


def reference_rate(prompts: list[list[int]]) -> float:
    """Tokens per cycle of the two-pass loop in plain PyTorch."""
    reference = Reference.from_pretrained(TINY / "base", TINY / "head")
    cycles: list[Cycle] = []
    for first in range(0, len(prompts), 25):
        for generation in reference.generate(prompts[first : first + 25], LENGTH, drafting="greedy"):
            cycles += generation.cycles
    return tokens_per_cycle(cycles)


# Tokens per forward relative to two passes, at least: on code, and on text that follows rules.
GAINS = {1: (1.15, 1.3), 8: (1.4, 1.6), 16: (1.5, 1.7)}
AT_ONCE = 16


class Rate(NamedTuple):
    one_pass: float
    simulated: float
    two_pass: float


@pytest.mark.parametrize("hypotheses", GAINS if THOROUGH else [8])
def test_one_pass(hypotheses: int, start: StartEngine, held_out: HeldOut) -> None:
    """Identical text, in as many forwards as the simulator needs, and far fewer than two passes need."""
    one_pass = {"orthrus_passes": "one", "orthrus_hypotheses": hypotheses, "orthrus_rows": 8192}
    settings = SETTINGS | {"max_num_batched_tokens": 8192}
    engine = start(
        {"method": "orthrus", "model": str(TINY / "head")} | one_pass, TINY / "base", max_num_seqs=16, **settings
    )
    reference = Reference.from_pretrained(TINY / "base", TINY / "head")
    simulator = OnePass(reference, hypotheses)
    members: dict[str, list[int]] = {}
    for index, kind in enumerate(held_out.kinds):
        members.setdefault("code" if kind == "code" else "prose" if kind == "prose" else "low-entropy", []).append(
            index
        )
    rates = {}
    for group, indices in members.items():
        drafted = forwards = 0
        simulated: list[SimulatedRun] = []
        cycles: list[Cycle] = []
        few = indices if THOROUGH else indices[:: max(1, len(indices) // AT_ONCE)][:AT_ONCE]
        # As many at a time as run together, so that no draft pass for a newcomer gives the others a block as well.
        for first in range(0, len(few), AT_ONCE):
            chunk = few[first : first + AT_ONCE]
            prompts = [held_out.prompts[index] for index in chunk]
            run = engine.run(prompts, LENGTH, stop_token_ids=[held_out.end], ignore_eos=False)
            assert run.tokens == [held_out.answer(index) for index in chunk], group
            drafted += run.counts.accepted + run.counts.steps
            forwards += run.counts.steps + len(chunk)  # and one draft pass behind each prompt
            simulated += simulator.generate(prompts, LENGTH, [held_out.end])
            for generation in reference.generate(prompts, LENGTH, stop=[held_out.end], drafting="greedy"):
                cycles += generation.cycles
        rates[group] = Rate(drafted / forwards, figures(simulated).tokens_per_forward, tokens_per_cycle(cycles) / 2)
    for group, rate in rates.items():
        print(f"H={hypotheses} {group}: {rate}, {rate.one_pass / rate.two_pass:.3f} times two passes")
        assert rate.one_pass == pytest.approx(rate.simulated, rel=0.02), group
    for group, gain in zip(("code", "low-entropy"), GAINS[hypotheses], strict=True):
        assert rates[group].one_pass / rates[group].two_pass >= gain, group
