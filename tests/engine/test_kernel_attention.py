"""The kernel inside the engine: it reads what the target's own attention layers read, and can be captured."""

from typing import Any

import pytest

from tests.engine.conftest import THOROUGH, Checkpoints, StartEngine
from tests.engine.harness import prompts
from vllm_orthrus.engine.attention.write_through import CheckedAttention

# Interpreted, a draft takes about half a second.
DRAFTS = 2000 if THOROUGH else 60


def checked(tiny: Checkpoints, **settings: Any) -> dict[str, Any]:
    both = {"orthrus_attention": "kernel", "orthrus_check_attention": True, "num_speculative_tokens": 5}
    return {"method": "orthrus", "model": str(tiny.block_head)} | both | settings


@pytest.mark.slow
def test_kernel_and_write_through_agree(start: StartEngine, tiny: Checkpoints) -> None:
    """Requests of different lengths, sharing prefixes, coming and going, and preempted for want of blocks."""
    engine = start(
        checked(tiny), enable_prefix_caching=True, num_gpu_blocks_override=12, max_num_batched_tokens=64, max_num_seqs=4
    )
    attention = engine.runner.speculator.draft_pass.attention
    assert isinstance(attention, CheckedAttention)
    shared, preemptions, cached = [(5 * j) % 250 for j in range(70)], 0, 0
    while attention.drafts < DRAFTS:
        given = [shared + extra for extra in prompts(6)]
        run = engine.run(given, 40, temperature=0.8, seed=attention.drafts)
        preemptions, cached = preemptions + run.preemptions, cached + run.cached_tokens
    assert preemptions > 0
    assert cached > 0
    worst = attention.report()
    print(f"{attention.drafts} drafts, {preemptions} preemptions, {cached} cached tokens: worst difference {worst:.2e}")
    assert 0 < worst < 1e-4


def test_the_comparison_notices(start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(checked(tiny), max_num_seqs=2)
    attention = engine.runner.speculator.draft_pass.attention
    begin = type(attention.path).begin

    def one_too_short(self: Any, blocks: Any, capturing: bool = False) -> Any:
        return begin(self, blocks._replace(prefix_lengths=blocks.prefix_lengths - 1), capturing)

    monkeypatch.setattr(type(attention.path), "begin", one_too_short)
    engine.run(prompts(2), 8)
    assert attention.report() > 1e-3
