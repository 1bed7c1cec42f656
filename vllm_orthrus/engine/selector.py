"""The selector beside a head: its gate and, for each token, what it adds before a draft and as one.

The checkpoint's matrices meet the base's embedding once, while loading. Behind that a step needs one product per row,
`gate`, and reads a row of `rank` numbers for each candidate, on every rank the whole tables:

    2 x vocabulary x rank       numbers: 39 MB in bf16 for 151,936 tokens and a rank of 64
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vllm_orthrus.engine.vllm import VllmConfig
from vllm_orthrus.heads import SELECTOR_PARTS, HeadCheckpoint, SelectorShape, find_selector, read_head_config
from vllm_orthrus.kernels.select import Tables

AT_ONCE = 8192  # embeddings, while tables are made


class Selector(nn.Module):
    def __init__(self, shape: SelectorShape, parts: dict[str, torch.Tensor], target: Any, vocabulary: int) -> None:
        super().__init__()
        self.shape = shape
        embed = target.model.embed_tokens
        chunks = torch.arange(vocabulary, device=parts["gate"].device).split(AT_ONCE)

        def table(part: str) -> nn.Parameter:
            # Through the layer itself, which knows how ranks share it.
            return _parameter(torch.cat([functional.linear(embed(ids), parts[part]) for ids in chunks]))

        self.previous, self.candidate = table("previous"), table("candidate")
        self.gate = _parameter(parts["gate"])

    @property
    def tables(self) -> Tables:
        return Tables(self.previous, self.candidate)

    def gates(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, rank]"""
        return functional.linear(hidden, self.gate)


@torch.inference_mode()
def load_selector(
    vllm_config: VllmConfig, target: Any, head: HeadCheckpoint | None, device: torch.device
) -> Selector | None:
    """head: None if weights are made up, where only its facts are there."""
    config, model = vllm_config.speculative_config, vllm_config.model_config
    if not config.has_selector:
        return None
    if head is None:
        facts, _ = read_head_config(config.model, config.revision, config.head_cache)
        assert facts.selector is not None
        size = (facts.selector.rank, model.get_hidden_size())
        parts = {part: torch.randn(size, dtype=model.dtype, device=device) for part in SELECTOR_PARTS}
        return Selector(facts.selector, parts, target, model.get_vocab_size())
    found = find_selector(config.orthrus_selector, head, config.orthrus_selector_revision, config.head_cache)
    assert found is not None
    parts = {part: tensor.to(device, model.dtype) for part, tensor in found.tensors()}
    return Selector(found.shape, parts, target, model.get_vocab_size())


def _parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=False)
