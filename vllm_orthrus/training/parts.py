"""What a training run is made of: tokenizer, base and head, loaded and checked against each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vllm_orthrus.heads import HeadConfig, SelectorShape, open_head, open_selector
from vllm_orthrus.training.config import ConfigError, TrainConfig
from vllm_orthrus.training.reference import load_base
from vllm_orthrus.training.selector import SelectorWeights
from vllm_orthrus.training.views import DiffusionHead


class Parts(NamedTuple):
    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel
    head: DiffusionHead
    head_config: HeadConfig
    selector: SelectorWeights | None


def load_parts(config: TrainConfig, device: torch.device, sharded: bool = False) -> Parts:
    tokenizer = AutoTokenizer.from_pretrained(config.base, revision=config.revision, trust_remote_code=False)
    # A frozen base needs no fp32 copy, unless its shards must share one dtype with the head's.
    dtype = torch.bfloat16 if config.run.precision == "bf16" and not sharded else torch.float32
    base = load_base(config.base, dtype, config.revision).to(device)
    base_config = base.config.to_dict()
    mask, block = config.head.mask_token_id, config.head.block_size
    head = DiffusionHead(base.model.layers)
    if config.head.initial is not None:
        initial = open_head(config.head.initial)
        initial.config.check_fits(base.config, config.base)
        initial.check_complete()
        head.load_published(dict(initial.tensors()))
        if config.train == "selector":  # the head stays what it is
            mask, block = initial.config.mask_token_id, initial.config.block_size
            head.requires_grad_(False)
    mask = choose_mask_token(tokenizer, base_config["vocab_size"]) if mask is None else mask
    selector = None if config.train == "head" else _selector(config, base)
    shape = None if selector is None else selector.shape
    head_config = HeadConfig.for_base(base_config, block, mask, config.base, config.revision, selector=shape)
    return Parts(tokenizer, base, head.to(device), head_config, None if selector is None else selector.to(device))


def _selector(config: TrainConfig, base: PreTrainedModel) -> SelectorWeights:
    asked = config.selector
    shape = SelectorShape(asked.rank, asked.candidates)
    if asked.initial is None:
        return SelectorWeights(base, shape)
    initial = open_selector(asked.initial)
    if initial.shape.rank != shape.rank:
        raise ConfigError(
            f"selector.rank={shape.rank}, and selector.initial={asked.initial} has rank {initial.shape.rank}. Set them "
            "alike, or leave selector.initial out."
        )
    initial.check_fits(base.config, base.config.hidden_size, config.base)
    return SelectorWeights(base, shape, dict(initial.tensors()))


def choose_mask_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """The tokenizer's own mask token, else the first spare row of the embedding."""
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    if len(tokenizer) < vocab_size:
        return len(tokenizer)
    raise ConfigError(
        f"head.mask_token_id is not set, the tokenizer has no mask token, and its {len(tokenizer)} tokens leave no "
        f"spare row in the vocabulary of {vocab_size}. Set head.mask_token_id to a token that never occurs in text."
    )
