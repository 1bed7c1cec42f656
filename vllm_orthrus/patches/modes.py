"""The mode of each step, decided where batches are made: in vLLM's scheduler.

Dynamic speculative decoding is vLLM's: its scheduler looks up how many tokens to draft by the size of the batch, and
the runner and our drafter follow. With `orthrus_modes` the table that it looks into is a policy.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from vllm_orthrus.engine.costs import estimated_costs, who_rides
from vllm_orthrus.patches.arguments import is_ours
from vllm_orthrus.patches.registry import Patch, takes
from vllm_orthrus.policy.clock import Step
from vllm_orthrus.policy.kept import Outcome
from vllm_orthrus.policy.modes import ModePolicy

_UPSTREAM = "vLLM's dynamic speculative decoding knows a table by batch size, and nothing of time or acceptance"
_REMOVE_WHEN = "a plugin can state the number of speculative tokens of each step"


class AskPolicy:
    """Stands where the scheduler has its table: asked once for each step that schedules anything."""

    def __init__(self, scheduler: Any, policy: ModePolicy) -> None:
        self.scheduler, self.policy = scheduler, policy
        self.asked_at: deque[float] = deque()  # of steps whose output has not come yet
        self.ended_at = 0.0

    def __getitem__(self, batch_size: int) -> int:
        self.asked_at.append(time.perf_counter())
        running = self.scheduler.running
        return self.policy.choose([request.request_id for request in running], _context(running))

    def learn(self, batch: Any, output: Any) -> None:
        """batch: of a step; output: what its forward and sampling gave."""
        now = time.perf_counter()
        # With asynchronous scheduling a step is scheduled while the one before it still runs.
        seconds, self.ended_at = now - max(self.asked_at.popleft(), self.ended_at), now
        drafts = batch.scheduled_spec_decode_tokens
        sampled = output.sampled_token_ids
        self.policy.verified(
            [
                Outcome(request, len(drafts[request]), len(sampled[index]) - 1)
                for request, index in output.req_id_to_index.items()
                if drafts.get(request) and sampled[index]
            ]
        )
        counts = batch.num_scheduled_tokens
        verified = {len(drafts.get(request, ())) for request in counts}
        decoded = all(count == 1 + len(drafts.get(request, ())) for request, count in counts.items())
        if decoded and not batch.scheduled_new_reqs:
            drafting, context = batch.num_spec_tokens_to_schedule, _context(self.scheduler.running)
            step = Step(len(counts), context, max(verified), drafting, seconds)
            if len(verified) == 1:
                self.policy.observe(step)
            self.policy.gave(sum(map(len, sampled)), step)

    def forget(self, requests: Iterable[str]) -> None:
        for request in requests:
            self.policy.finished(request)

    def counts(self) -> dict[str, int]:
        """In microseconds, since the start."""
        worth = self.policy.worth
        return {"seconds": round(1e6 * worth.seconds), "plain_seconds": round(1e6 * worth.plain)}


def _context(running: list[Any]) -> float:
    return float(sum(request.num_computed_tokens for request in running)) / max(1, len(running))


def _init(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def __init__(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        config = self.vllm_config.speculative_config
        if is_ours(config) and config.orthrus_modes:
            self.dynamic_sd_lookup = AskPolicy(
                self, ModePolicy(config.orthrus_modes, estimated_costs(self.vllm_config), who_rides(self.vllm_config))
            )

    return __init__


def _update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        ask = self.dynamic_sd_lookup
        if isinstance(ask, AskPolicy):
            if scheduler_output.num_scheduled_tokens:
                ask.learn(scheduler_output, model_runner_output)
            ask.forget(scheduler_output.finished_req_ids)  # the last to end come with a step that has nothing to do
        return original(self, scheduler_output, model_runner_output)

    return update_from_output


def _init_core(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def __init__(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        if is_ours(self.vllm_config.speculative_config):
            from vllm_orthrus.engine.load import drafts_nothing

            if any(self.model_executor.collective_rpc(drafts_nothing)):
                self.scheduler.dynamic_sd_lookup = [0] * (self.scheduler.max_num_running_reqs + 1)
        ask, config = getattr(self.scheduler, "dynamic_sd_lookup", None), self.vllm_config.speculative_config
        # A connector would hand on what the prompts leave in the cache.
        if isinstance(ask, AskPolicy) and config.orthrus_time_modes and self.scheduler.connector is None:
            from vllm_orthrus.engine import timing  # it imports what is patched when an engine starts

            timing.teach(self, ask, config.orthrus_modes)

    return __init__


PATCHES = [
    Patch(
        target="vllm.v1.engine.core:EngineCore.__init__",
        why="What a step takes is timed with whole steps, before the engine serves: the scheduler's part included.",
        upstream=_UPSTREAM,
        remove_when="an engine tells plugins that it is ready, before it serves",
        check=takes(
            "self", "vllm_config", "executor_class", "log_stats", "executor_fail_callback", "include_finished_set"
        ),
        replace=_init_core,
    ),
    Patch(
        target="vllm.v1.core.sched.scheduler:Scheduler.__init__",
        why="The scheduler decides how many drafts a step makes, by a table of its own.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        check=takes(
            "self",
            "vllm_config",
            "kv_cache_config",
            "structured_output_manager",
            "block_size",
            "hash_block_size",
            "mm_registry",
            "include_finished_set",
            "log_stats",
        ),
        replace=_init,
    ),
    Patch(
        target="vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        why="The scheduler is told here what became of a step's drafts, which the policy learns from.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        check=takes("self", "scheduler_output", "model_runner_output"),
        replace=_update_from_output,
    ),
]
