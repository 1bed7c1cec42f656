"""What the draft pass asks of vLLM's batch limits."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_orthrus.patches.arguments import is_ours
from vllm_orthrus.patches.registry import Patch, is_property, takes


def _set_max_num_scheduled_tokens(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def _set_max_num_scheduled_tokens(self: Any) -> None:
        spec = self.speculative_config
        if is_ours(spec):
            budget, block = self.scheduler_config.max_num_batched_tokens, spec.orthrus_block_size
            if budget < block:
                raise ValueError(
                    f"max_num_batched_tokens={budget} has no room for one draft block of orthrus_block_size={block} "
                    f"rows. Raise max_num_batched_tokens to at least {block}, or give a smaller orthrus_block_size."
                )
        original(self)

    return _set_max_num_scheduled_tokens


def _num_lookahead_tokens(original: property) -> property:
    @wraps(original.fget)  # type: ignore[arg-type]
    def num_lookahead_tokens(self: Any) -> int:
        spec = self.speculative_config
        if is_ours(spec):
            return int(spec.slots_written_ahead)
        return int(original.fget(self))  # type: ignore[misc]

    return property(num_lookahead_tokens)


PATCHES = [
    Patch(
        target="vllm.config.vllm:VllmConfig._set_max_num_scheduled_tokens",
        why="A draft pass has at least one block of rows; vLLM sizes its profile run, compiled ranges and workspaces "
        "for max_num_batched_tokens rows.",
        upstream="vLLM holds its own block drafters to that limit in this very method",
        remove_when="a speculator can state its query rows per request to the scheduler config",
        check=takes("self"),
        replace=_set_max_num_scheduled_tokens,
    ),
    Patch(
        target="vllm.config.vllm:VllmConfig.num_lookahead_tokens",
        why="Writing a block through the cache needs that many slots reserved behind each request.",
        upstream="vLLM reserves them for its own block drafters in this very property",
        remove_when="a speculator can state how many slots it writes ahead",
        check=is_property,
        replace=_num_lookahead_tokens,
    ),
]
