"""The shipped trained head: identical greedy text, and as many tokens per cycle as the reference loop gets."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

from tests.engine.conftest import StartEngine
from vllm_orthrus.training.evaluate import read_prompts
from vllm_orthrus.training.reference import Cycle, Reference, tokens_per_cycle

TINY = Path(__file__).parents[2] / "examples" / "tiny-orthrus"
PROMPTS, LENGTH = 200, 128
# One at a time takes ten minutes: a fifth of the prompts, unless all are asked for.
STEP = {16: 1, 1: 1 if os.environ.get("ORTHRUS_TEST_ALL_PROMPTS") else 5}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (TINY / "head").is_dir(), reason="examples/tiny-orthrus/head is not there"),
]


class HeldOut(NamedTuple):
    prompts: list[list[int]]
    greedy: list[list[int]]


SETTINGS = {"max_model_len": 1024, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 128 << 20}


@pytest.fixture(scope="module")
def held_out(start: StartEngine) -> HeldOut:
    """Held-out prompts and what vLLM without drafts says to them, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    prompts = [prompt.tokens for prompt in read_prompts(TINY / "heldout.jsonl", tokenizer)][:PROMPTS]
    assert len(prompts) == PROMPTS
    plain = start(None, model=TINY / "base", max_num_seqs=16, **SETTINGS)
    return HeldOut(prompts, plain.run(prompts, LENGTH).tokens)


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
