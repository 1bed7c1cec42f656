"""Oracle 1: with a one-row block and a head that copies the base, every draft is accepted, whatever the batch does."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine import checkpoints
from tests.engine.conftest import StartEngine
from tests.engine.harness import Engine, Run, prompts


def all_accepted(run: Run) -> bool:
    return 0 < run.counts.drafted == run.counts.accepted


def test_plain_decoding(oracle: Engine, plain: Engine) -> None:
    drafted, expected = oracle.run(prompts(6), 40), plain.run(prompts(6), 40)
    assert all_accepted(drafted)
    assert drafted.tokens == expected.tokens
    assert all(len(set(tokens)) > 8 for tokens in expected.tokens), "output too monotonous to prove anything"


@pytest.mark.usefixtures("compiled")
def test_single_request(oracle: Engine, plain: Engine) -> None:
    drafted = oracle.run(prompts(1), 40)
    assert all_accepted(drafted)
    assert drafted.tokens == plain.run(prompts(1), 40).tokens


@pytest.mark.usefixtures("compiled")
def test_more_requests_than_run_at_once(oracle: Engine, plain: Engine) -> None:
    """Prompts are read while other requests decode, with different lengths of output."""
    drafted = oracle.run(prompts(20), 24)
    assert all_accepted(drafted)
    assert drafted.tokens == plain.run(prompts(20), 24).tokens


@pytest.mark.usefixtures("compiled")
def test_context_limit(oracle: Engine, plain: Engine) -> None:
    """Generation stops at max_model_len, where the last blocks reach past it."""
    long = [[(5 * j) % 250 for j in range(240)], [(3 * j) % 250 for j in range(247)]]
    drafted = oracle.run(long, 64)
    assert all_accepted(drafted)
    assert [len(tokens) for tokens in drafted.tokens] == [256 - 240, 256 - 247]
    assert drafted.tokens == plain.run(long, 64).tokens


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_far_positions(
    start: StartEngine, oracle_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across position 32,768, where 16-bit counters and default context lengths end."""
    monkeypatch.setitem(checkpoints.CONFIG, "max_position_embeddings", 1 << 16)
    base = checkpoints.write_base(tmp_path / "base")
    options = {"max_model_len": 33_000, "max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 96 << 20}
    long = [[(5 * j + j // 97) % 250 for j in range((1 << 15) - 12)]]
    drafted = start(oracle_config, base, **options).run(long, 32)
    assert all_accepted(drafted)
    assert drafted.tokens == start(None, base, **options).run(long, 32).tokens


@pytest.mark.feature("chunked prefill")
def test_chunked_prefill(start: StartEngine, oracle_config: dict[str, Any], plain: Engine) -> None:
    engine = start(oracle_config, max_num_batched_tokens=16)
    mixed = prompts(6, shortest=30)
    drafted = engine.run(mixed, 24)
    assert all_accepted(drafted)
    assert drafted.tokens == plain.run(mixed, 24).tokens


@pytest.mark.feature("prefix caching")
@pytest.mark.feature("preemption")
def test_prefix_hits_and_preemption(
    path: str, start: StartEngine, oracle_config: dict[str, Any], plain: Engine
) -> None:
    length, blocks = (24, 12) if path == "kernel" else (60, 18)  # few steps where each is interpreted
    engine = start(oracle_config, enable_prefix_caching=True, num_gpu_blocks_override=blocks)
    shared = [[(5 * j) % 250 for j in range(70)] + extra for extra in prompts(6)]
    expected = plain.run(shared, length).tokens
    first, again = engine.run(shared, length), engine.run(shared, length)
    assert all_accepted(first)
    assert all_accepted(again)
    assert first.preemptions + again.preemptions > 0, "the cache was large enough after all"
    assert again.cached_tokens > 0, "nothing was served from the prefix cache"
    assert first.tokens == again.tokens == expected


@pytest.mark.usefixtures("compiled")
def test_probabilistic_drafts(start: StartEngine, oracle_config: dict[str, Any]) -> None:
    """With the draft distribution equal to the target's, every acceptance ratio is one."""
    engine = start(oracle_config | {"draft_sample_method": "probabilistic"})
    drafted = engine.run(prompts(6), 40, temperature=0.9, seed=3)
    assert all_accepted(drafted)
    assert engine.run(prompts(6), 40, temperature=0.9, seed=3).tokens == drafted.tokens, "seeds do not reproduce"


@pytest.mark.feature("prefix caching: the same prompt again, sampled")
@pytest.mark.usefixtures("compiled")
def test_sampled_repeats_of_a_cached_prompt(start: StartEngine, oracle_config: dict[str, Any]) -> None:
    """All of the prompt but its last token comes from the cache, so that its prefill looks like a decoding step.

    vLLM then pads it with placeholder drafts, which it counts as drafted and which no sampler may accept.
    """
    engine = start(oracle_config | {"draft_sample_method": "probabilistic"}, enable_prefix_caching=True)
    given = [[(3 * j + i) % 250 for j in range(2 * 32 + 1)] for i in range(4)]
    first = engine.run(given, 12, temperature=0.9, seed=7)
    again = engine.run(given, 12, temperature=0.9, seed=7)
    assert again.cached_tokens == 4 * 64
    assert all_accepted(first)
    assert again.counts.drafted - again.counts.accepted == len(given)
    assert again.tokens == first.tokens


@pytest.mark.feature("asynchronous scheduling")
@pytest.mark.feature("asynchronous scheduling with preemption")
@pytest.mark.usefixtures("compiled", "asynchronous")
def test_asynchronous_scheduling(start: StartEngine, oracle_config: dict[str, Any], plain: Engine) -> None:
    engine = start(oracle_config, enable_prefix_caching=True, num_gpu_blocks_override=18)
    core = engine.llm.llm_engine.engine_core.engine_core
    assert core.batch_queue_size == 2
    assert type(core.scheduler).__name__ == "AsyncScheduler"
    mixed = prompts(8, shortest=20)
    drafted = engine.run(mixed, 60)
    assert all_accepted(drafted)
    assert drafted.preemptions > 0
    assert drafted.tokens == plain.run(mixed, 60).tokens
