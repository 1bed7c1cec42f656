"""A real vLLM engine, and what its scheduler counted."""

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

# The engine lives in the test's own process unless a test is about processes.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.triton_utils import dispatcher
from vllm.v1.spec_decode.metrics import SpecDecodingStats


class Counts(NamedTuple):
    """Drafted and accepted tokens between two points in time."""

    steps: int
    drafted: int
    accepted: int

    def __sub__(self, other: "Counts") -> "Counts":  # type: ignore[override]
        return Counts(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


class Run(NamedTuple):
    tokens: list[list[int]]
    counts: Counts
    preemptions: int
    cached_tokens: int
    outputs: list[Any]


class Listening(NamedTuple):
    """vLLM's periodic log of an engine."""

    logger: Any
    said: list[str]


@contextmanager
def started_again() -> Iterator[None]:
    """Without what a process needs once: seconds of each start would go into it.

    vLLM walks through all that all modules hold to put its kernels for CPUs in place, and looks for garbage three times
    to tell how much memory there is, which engines here are told.
    """
    register = dispatcher.register_kernels

    def register_new(overrides: Mapping[str, Callable[..., Any]]) -> None:
        if not overrides.keys() <= dispatcher._registry.keys():
            register(overrides)

    with patch.object(gc, "collect"), patch.object(dispatcher, "register_kernels", register_new):
        yield


class Engine:
    def __init__(self, model: Path, speculative: dict[str, Any] | None = None, **options: Any) -> None:
        settings: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,
            "kv_cache_memory_bytes": 32 << 20,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "block_size": 32,
        }
        with started_again():
            self.llm = LLM(model=str(model), speculative_config=speculative, **(settings | options))
        self._poison_cache()
        self._counts = Counts(0, 0, 0)
        self.accepted_at: Counter[int] = Counter()  # drafts that were kept, by their place
        self.one_pass: Counter[str] = Counter()  # what the front end was told of one-pass drafting, added up
        client = self.llm.llm_engine.engine_core
        receive = client.get_output

        def get_output() -> Any:
            outputs = receive()
            stats = outputs.scheduler_stats
            if stats is not None and stats.spec_decoding_stats is not None:
                self._count(stats.spec_decoding_stats)
            return outputs

        client.get_output = get_output

    def _poison_cache(self) -> None:
        """Fill the cache as a long-running engine would: a fresh one is all zeros, which hides reads past a prefix."""
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
            generator = torch.Generator().manual_seed(0)
            for cache in self.runner.kv_caches:
                if cache.dtype == torch.uint8:
                    cache.random_(0, 100, generator=generator)  # finite in every fp8 format
                else:
                    cache.normal_(std=3.0, generator=generator)

    def _count(self, stats: SpecDecodingStats) -> None:
        step = Counts(stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens)
        self._counts = Counts(*(total + new for total, new in zip(self._counts, step, strict=True)))
        self.accepted_at.update(dict(enumerate(stats.num_accepted_tokens_per_pos)))
        self.one_pass.update(getattr(stats, "orthrus", None) or {})

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int | Sequence[int] = 32, **sampling: Any) -> Run:
        """max_tokens: of each, or of all."""
        lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        params = [
            SamplingParams(
                **({"temperature": 0.0, "max_tokens": length, "ignore_eos": True, "detokenize": False} | sampling)
            )
            for length in lengths
        ]
        if "seed" in sampling:
            for index, param in enumerate(params):
                param.seed = sampling["seed"] + index
        before = self._counts
        outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        return Run(
            [list(output.outputs[0].token_ids) for output in outputs],
            self._counts - before,
            sum(output.metrics.num_preemptions for output in outputs if output.metrics is not None),
            sum(output.num_cached_tokens or 0 for output in outputs),
            list(outputs),
        )

    @property
    def runner(self) -> Any:
        """The model runner, for engines in this process."""
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        return executor.driver_worker.worker.model_runner

    def close(self, collect: bool = True) -> None:
        """collect: look for what nothing holds any more, which takes a second; vLLM would do so three times over."""
        with patch.object(gc, "collect"):
            self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        if collect:
            gc.collect()


def prompts(count: int, shortest: int = 5) -> list[list[int]]:
    """Prompts of different lengths that share nothing."""
    return [[(7 * i * j + 3 * j + 11 * i) % 250 for j in range(shortest + 3 * i)] for i in range(count)]


# An engine this small reads prompts in pieces, and has to stop requests and start them again.
UNDER_PRESSURE: dict[str, Any] = {
    "max_num_batched_tokens": 128,
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": 18,
}


def says_the_same_under_pressure(engine: Engine, plain: Engine) -> None:
    """Chunked prefill, preemption and prefix hits, with UNDER_PRESSURE."""
    shared = [[(5 * j) % 250 for j in range(70)] + extra for extra in prompts(6)]
    expected = plain.run(shared, 60).tokens
    first, again = engine.run(shared, 60), engine.run(shared, 60)
    assert first.tokens == again.tokens == expected
    assert first.preemptions + again.preemptions > 0
    assert again.cached_tokens > 0


def listen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Listening:
    """To what an interval's log says, from now on, whenever `logger.log` ends one."""
    from vllm.v1.metrics.loggers import LoggingStatLogger

    logger, said = LoggingStatLogger(engine.llm.llm_engine.vllm_config), list[str]()
    monkeypatch.setattr("vllm.v1.metrics.loggers.logger.info", lambda text, *values: said.append(text % values))
    manager = engine.llm.llm_engine.logger_manager
    monkeypatch.setattr(manager, "stat_loggers", [*manager.stat_loggers, logger])
    return Listening(logger, said)
