"""The Orthrus model in plain PyTorch: both views with dense masks, and the paper's two-pass loop. Meant to be read.

With the committed tokens at positions 0..p-1 and the newest one, the anchor, at position p:

    draft:   the diffusion view runs [anchor, MASK, ...] at p, p+1, ...; it sees the AR view's keys before p and all
             of its own block
    verify:  the AR view runs [anchor, d1..dK] at p..p+K and keeps their keys; the longest agreed prefix is accepted
    bonus:   the AR view's own token after that prefix becomes the next anchor
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vllm_orthrus.errors import UserError
from vllm_orthrus.heads import BaseShape, HeadConfig, HeadError, find_selector, open_files, open_head
from vllm_orthrus.training.rejection import Verdict, verify_greedy, verify_sampling
from vllm_orthrus.training.selector import Selector, choose_drafts
from vllm_orthrus.training.views import DiffusionHead, Rope, View, autoregressive_view, diffusion_view

Drafting = Literal["probabilistic", "greedy"]


class Cycle(NamedTuple):
    """One draft-and-verify cycle of one sequence."""

    proposed: int
    accepted: int


class Generation(NamedTuple):
    tokens: list[int]
    cycles: list[Cycle]

    @property
    def tokens_per_cycle(self) -> float:
        """Accepted drafts plus the bonus, averaged; the first token comes from the prefill and is not counted."""
        return tokens_per_cycle(self.cycles)


def tokens_per_cycle(cycles: Sequence[Cycle]) -> float:
    return 1 + sum(cycle.accepted for cycle in cycles) / len(cycles) if cycles else float("nan")


class Cache(NamedTuple):
    """The AR view's keys and values. A token's slot is its position, so stale slots lie beyond every prefix."""

    keys: list[Tensor]  # per layer [B, H_kv, S, D]
    values: list[Tensor]

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> None:
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = k.transpose(1, 2)
        self.values[layer][rows, :, positions] = v.transpose(1, 2)


class Reference:
    """A frozen base and a head, as two views over one cache, and perhaps a selector of drafts."""

    def __init__(
        self, base: PreTrainedModel, head: DiffusionHead, config: HeadConfig, selector: Selector | None = None
    ) -> None:
        self.base, self.head, self.config, self.selector = base.eval(), head.eval(), config, selector
        self.shape = BaseShape.from_config(base.config)
        self.decoder: Any = base.model
        self.device, self.dtype = base.device, base.dtype

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        head: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        revision: str | None = None,
        selector: str = "auto",
    ) -> Reference:
        """Load a base and a head, which may be one merged checkpoint. Remote code is never run.

        selector: "auto", that of the head if it has one; "off"; or where another lies.
        """
        checkpoint = open_head(base if head is None else head, revision)
        model = load_base(base, dtype).to(device)
        checkpoint.config.check_fits(model.config, str(base))
        checkpoint.check_complete()
        weights = DiffusionHead(model.model.layers, dtype)
        weights.load_published(dict(checkpoint.tensors()))
        found = find_selector(selector, checkpoint)
        if found is not None:
            found.check_fits(model.config, checkpoint.config.shape.hidden_size, str(base))
        embedding = model.model.embed_tokens.weight
        chosen = None if found is None else Selector.open(found, embedding)
        return cls(model, weights.to(device), checkpoint.config, chosen)

    # The two views

    def views(self) -> Iterator[tuple[Any, View, View]]:
        weights: Any = self.head.layers
        for layer, diffusion in zip(self.decoder.layers, weights, strict=True):
            yield layer, autoregressive_view(layer.self_attn), diffusion_view(layer.self_attn, diffusion)

    def new_cache(self, batch: int, slots: int) -> Cache:
        size = (batch, self.shape.num_kv_heads, slots, self.shape.head_dim)
        keys, values = (
            [torch.zeros(size, dtype=self.dtype, device=self.device) for _ in range(self.shape.num_layers)]
            for _ in range(2)
        )
        return Cache(keys, values)

    def autoregressive(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Run ids [B, T] at positions [B, T] and write their keys and values; final hidden states [B, T, d]."""
        x = self.decoder.embed_tokens(ids)
        rope = Rope.at(self.decoder.rotary_emb, x, positions)
        slots = torch.arange(cache.keys[0].shape[2], device=ids.device)
        visible = slots <= positions[..., None]  # [B, T, S]: a token sees itself and what stands before it
        for index, (layer, view, _) in enumerate(self.views()):
            q, k, v = view.project(layer.input_layernorm(x), rope)
            cache.write(index, k, v, positions)
            x = x + view.output(attend(q, cache.keys[index], cache.values[index], visible, view.scaling))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        hidden: Tensor = self.decoder.norm(x)
        return hidden

    def diffusion(self, anchors: Tensor, prefix: Tensor, cache: Cache, width: int | None = None) -> Tensor:
        """Run each sequence's block [anchor, MASK, ...] behind its first `prefix` [B] tokens; hidden [B, width, d].

        Row i predicts the token at prefix + i + 1. The cache is read, never written.
        """
        width = width or self.config.block_size
        ids = torch.full((len(anchors), width), self.config.mask_token_id, device=anchors.device)
        ids[:, 0] = anchors
        positions = prefix[:, None] + torch.arange(width, device=anchors.device)
        x = self.decoder.embed_tokens(ids)
        rope = Rope.at(self.decoder.rotary_emb, x, positions)
        slots = torch.arange(cache.keys[0].shape[2], device=anchors.device)
        in_prefix = (slots < prefix[:, None])[:, None].expand(-1, width, -1)  # [B, width, S]
        visible = torch.cat((in_prefix, in_prefix.new_ones(len(anchors), width, width)), dim=-1)
        for index, (layer, _, view) in enumerate(self.views()):
            q, k, v = view.project(layer.input_layernorm(x), rope)
            keys = torch.cat((cache.keys[index], k), dim=2)
            values = torch.cat((cache.values[index], v), dim=2)
            x = x + view.output(attend(q, keys, values, visible, view.scaling))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        hidden: Tensor = self.decoder.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.base.lm_head(hidden)
        return logits

    # The two-pass loop

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        num_drafts: int | None = None,
        width: int | None = None,
        drafting: Drafting = "probabilistic",
        stop: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> list[Generation]:
        """Continue every prompt, drafting `num_drafts` tokens per cycle from a block of `width` rows.

        `drafting="greedy"` proposes each row's most probable token even when sampling; verification then treats q as
        one-hot. A sequence ends after `max_new_tokens` tokens or after a token of `stop`, which is kept.
        """
        width = width or self.config.block_size
        num_drafts = num_drafts or max(1, min(width, self.config.num_drafts))
        self._check_request(prompts, num_drafts, width)
        chooser = _Chooser(temperature, drafting, generator)

        prefix = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        longest = int(prefix.max())
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        # The last cycle may overshoot by a whole block, and a finished sequence verifies once more behind that.
        cache = self.new_cache(len(prompts), longest + max_new_tokens + 2 * (num_drafts + 1))
        positions = torch.arange(longest, device=self.device).expand_as(ids)
        hidden = self.autoregressive(ids, positions, cache)
        rows = torch.arange(len(prompts), device=self.device)
        anchors = chooser.first(self.logits(hidden[rows, prefix - 1]))

        results = [Generation([token], []) for token in anchors.tolist()]
        while True:
            unfinished = [not _ended(result.tokens, max_new_tokens, stop) for result in results]
            if not any(unfinished):
                return results
            hidden = self.diffusion(anchors, prefix, cache, width)[:, :num_drafts]
            drafts, q = chooser.draft(self.logits(hidden), hidden, anchors, self.selector)

            verified = torch.cat((anchors[:, None], drafts), dim=1)  # [B, K+1]
            positions = prefix[:, None] + torch.arange(num_drafts + 1, device=self.device)
            logits = self.logits(self.autoregressive(verified, positions, cache))
            verdict = chooser.verify(drafts, q, logits)

            for row, result in enumerate(results):
                if unfinished[row]:
                    kept = int(verdict.accepted[row])
                    result.cycles.append(Cycle(num_drafts, kept))
                    _extend(
                        result.tokens, [*drafts[row, :kept].tolist(), int(verdict.bonus[row])], max_new_tokens, stop
                    )
            # A finished sequence stands still: its rows are recomputed and ignored until the others end.
            going = torch.tensor(unfinished, device=self.device)
            prefix = torch.where(going, prefix + verdict.accepted + 1, prefix)
            anchors = torch.where(going, verdict.bonus, anchors)

    def _check_request(self, prompts: Sequence[Sequence[int]], num_drafts: int, width: int) -> None:
        if not prompts or not all(prompts):
            raise ValueError(
                "generate() needs at least one prompt, and no prompt may be empty: the anchor follows a token."
            )
        if num_drafts > width:
            raise UserError(f"num_drafts={num_drafts} exceeds the block of {width} rows. Draft at most {width} tokens.")


class _Chooser(NamedTuple):
    """The temperature's part in the loop: how drafts are drawn and judged."""

    temperature: float
    drafting: Drafting
    generator: torch.Generator | None

    def first(self, logits: Tensor) -> Tensor:
        """The token after the prompt, from logits [B, V]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self._probabilities(logits), 1, generator=self.generator).squeeze(1)

    def draft(
        self, logits: Tensor, hidden: Tensor, anchors: Tensor, selector: Selector | None
    ) -> tuple[Tensor, Tensor]:
        """Drafts [B, K] and the distribution q [B, K, V] that they were drawn from."""
        draws = self.temperature > 0 and self.drafting == "probabilistic"
        if selector is not None:
            start, draw = torch.zeros_like(anchors), self._draw if draws else None
            chosen = choose_drafts(selector, logits, hidden, anchors, start, logits.shape[1], self.temperature, draw)
            if draws:
                return chosen.drafts, chosen.dense(logits.shape[-1])
            return chosen.drafts, nn.functional.one_hot(chosen.drafts, logits.shape[-1]).to(logits.dtype)
        if self.temperature == 0 or self.drafting == "greedy":
            drafts = logits.argmax(-1)
            return drafts, nn.functional.one_hot(drafts, logits.shape[-1]).to(logits.dtype)
        q = self._probabilities(logits)
        return torch.multinomial(q.flatten(0, 1), 1, generator=self.generator).view(q.shape[:2]), q

    def verify(self, drafts: Tensor, q: Tensor, logits: Tensor) -> Verdict:
        if self.temperature == 0:
            return verify_greedy(drafts, logits)
        return verify_sampling(drafts, q, self._probabilities(logits), self.generator)

    def _draw(self, q: Tensor) -> Tensor:
        return torch.multinomial(q, 1, generator=self.generator).squeeze(1)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits / self.temperature, dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Dense attention: q [B, H, T, D], k and v [B, H_kv, S, D], visible [B, T, S] -> [B, H, T, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scaling).masked_fill(~visible[:, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return weights.to(q.dtype) @ v


def load_base(base: str | Path, dtype: torch.dtype, revision: str | None = None) -> PreTrainedModel:
    """The stock transformers model of a base, or of the base inside a merged checkpoint."""
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise HeadError(f"the base {base} cannot be loaded ({error}). Copy or download it anew.") from error
    return model.requires_grad_(False)


def read_base_config(base: str | Path) -> Any:
    """A base's config as transformers knows it; raises `HeadError` for a damaged one and for what no head serves."""
    _, written = open_files(base, None, None)
    BaseShape.from_config(written)
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # what a library makes of another's wrong fields has no common class
        raise HeadError(f"{base}: config.json is no config of a model ({error}). Copy or download it anew.") from error


def _ended(tokens: list[int], limit: int, stop: Sequence[int]) -> bool:
    return len(tokens) >= limit or tokens[-1] in stop


def _extend(tokens: list[int], new: list[int], limit: int, stop: Sequence[int]) -> None:
    for token in new:
        if _ended(tokens, limit, stop):
            return
        tokens.append(token)
