"""What vLLM decides late, or differently from the tests' usual engine: the context limit, and the cache's format."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.conftest import Checkpoints, StartEngine, one_pass
from tests.engine.harness import prompts
from vllm_orthrus.engine.onepass.drafting import OnePassDrafting

# A cache of this size holds fewer positions than the model has, so that `auto` finds a lower limit.
SMALL: dict[str, Any] = {"max_model_len": -1, "kv_cache_memory_bytes": 340 << 10, "max_num_batched_tokens": 1024}


@pytest.mark.parametrize("way", ["kernel", "gather", "write_through"])
def test_limit_that_vllm_finds_itself(
    way: str, start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--max-model-len auto` lowers the limit once the cache is known, after drafters are made."""
    engine = start(one_pass(tiny.block_head, orthrus_attention=way, orthrus_passes="auto"), **SMALL, max_num_seqs=2)
    limit = engine.llm.llm_engine.vllm_config.model_config.max_model_len
    assert 64 <= limit < 1024
    speculator = engine.runner.speculator
    if isinstance(speculator.drafting, OnePassDrafting):
        assert _furthest_of_hypotheses(engine, limit) < limit
        with monkeypatch.context() as patch:  # a planted fault: the limit as it was when the drafter was made
            patch.setattr(speculator.drafting.buffers, "model_config", SimpleNamespace(max_model_len=1024))
            assert _furthest_of_hypotheses(engine, limit) >= limit
    given = [[(5 * j) % 250 for j in range(limit - 12)]]
    plain = start(None, **SMALL, max_num_seqs=2)
    assert engine.run(given, 12).tokens == plain.run(given, 12).tokens
    assert 0 < int(speculator.rows.positions.max()) < limit, "block tables are no longer than that"


def _furthest_of_hypotheses(engine: Any, limit: int) -> int:
    """The furthest position that the rows of hypotheses had while a request ran into the limit."""
    one, furthest = engine.runner.speculator.drafting.one_pass, 0
    forward = one.forward_with_rows

    def watched(ids: Any, positions: Any, embedded: Any, rows: Any) -> Any:
        nonlocal furthest
        furthest = max(furthest, int(rows.positions.max()))
        return forward(ids, positions, embedded, rows)

    one.forward_with_rows = watched
    try:
        engine.run([[(3 * j) % 250 for j in range(limit - 12)]], 12)
    finally:
        del one.forward_with_rows
    assert furthest, "no hypotheses were carried"
    return furthest


@pytest.mark.feature("fp8 KV cache")
@pytest.mark.parametrize("passes", ["auto", "two"])
def test_quantized_cache(passes: str, start: StartEngine, tiny: Checkpoints) -> None:
    """An engine over one starts, and drafts as its own target would say it."""
    if not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("vLLM reads no cache in fp8 on this CPU, which lacks AVX-512")
    head = {"method": "orthrus", "model": str(tiny.copy_head), "num_speculative_tokens": 1, "orthrus_passes": passes}
    head["orthrus_modes"] = []  # one draft never pays, and here some must be made
    engine = start(head, kv_cache_dtype="fp8", dtype="bfloat16")
    run = engine.run(prompts(4), 24)
    assert run.counts.drafted > 0
    # The verification of two tokens rounds otherwise than a draft of one: near-ties may fall either way.
    assert run.counts.accepted >= 0.9 * run.counts.drafted
