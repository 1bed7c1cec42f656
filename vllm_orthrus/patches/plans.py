"""What vLLM may take over from an earlier start (`VLLM_ENABLE_STARTUP_PLAN=1`)."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_orthrus.patches.arguments import is_ours
from vllm_orthrus.patches.registry import Patch, takes


def _fingerprint(original: Callable[..., str]) -> Callable[..., str]:
    @wraps(original)
    def compute_plan_fingerprint(vllm_config: Any, rank: int, world_size: int) -> str:
        found = original(vllm_config, rank, world_size)
        if not is_ours(vllm_config.speculative_config):
            return found
        from vllm_orthrus.engine.timing import digest, of_drafting

        return digest([found, of_drafting(vllm_config.speculative_config)])

    return compute_plan_fingerprint


WORKER_PATCHES = [
    Patch(
        target="vllm.v1.worker.startup_plan:compute_plan_fingerprint",
        why="A plan says how large the cache may be. vLLM's key knows the method and the target, and neither the head, "
        "its quantization and selector, nor how many graphs are captured, all of which take memory.",
        upstream="the key is vLLM's hash of what is compiled, in which most of a speculative config has no place",
        remove_when="a speculative config can add to the key",
        check=takes("vllm_config", "rank", "world_size"),
        replace=_fingerprint,
    ),
]
