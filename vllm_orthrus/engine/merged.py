"""The autoregressive view of a merged Orthrus checkpoint: plain Qwen3."""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from vllm_orthrus.heads import is_head_tensor


class OrthrusForCausalLM(Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen3 whose checkpoint also carries a head, which is not this model's to load."""

    @staticmethod
    def is_unused_checkpoint_weight(name: str) -> bool:
        """Lets vLLM skip shards that hold nothing but head tensors."""
        return is_head_tensor(name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: Any = super().load_weights((name, tensor) for name, tensor in weights if not is_head_tensor(name))
        return set(loaded)
