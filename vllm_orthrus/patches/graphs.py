"""CUDA graphs of verifications, for every number of drafts that a step may make."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_orthrus.patches.arguments import is_ours
from vllm_orthrus.patches.registry import Patch, takes


def _init(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def __init__(self: Any, vllm_config: Any, *arguments: Any, **named: Any) -> None:
        original(self, vllm_config, *arguments, **named)
        config = vllm_config.speculative_config
        if is_ours(config) and config.orthrus_modes:
            from vllm_orthrus.engine.graphs import plan_modes

            plan_modes(self, config.orthrus_modes)

    return __init__


# Only workers load what captures graphs, so this one is applied there, once a drafter is made.
WORKER_PATCHES = [
    Patch(
        target="vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager.__init__",
        why="The manager plans graphs of verifications of `num_speculative_tokens`. Of vLLM's table by batch size it "
        "would take further numbers, but only as many as `max_num_seqs`, and capture all of its sizes for each.",
        upstream="vLLM's dynamic speculative decoding knows a table by batch size, and nothing of time or acceptance",
        remove_when="vLLM can be told which numbers of drafts to capture, and for how many requests",
        check=takes(
            "self",
            "vllm_config",
            "device",
            "cudagraph_mode",
            "decode_query_len",
            "lora_capture_cases",
            "varlen_decode",
            "ubatch_runner",
        ),
        replace=_init,
    ),
]
