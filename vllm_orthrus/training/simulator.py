"""The one-pass loop, simulated on the reference model: how many drafts it foresees and accepts, not how fast it is.

The blocks for the next step's drafts ride along with the verification of this step's. With the anchor at position p and
its drafts d1..dn:

    choose:   H hypotheses (a, c), each the block [c, MASK, ...] at p+a+1 that may turn out useful
    forward:  the AR view runs [anchor, d1..dK] at p..p+K and keeps their keys; in every layer the hypotheses' rows come
              after them and see those keys, so that a block knows d1..da as if they had been accepted
    verify:   a* drafts are accepted, then bonus b, which is the next anchor
    match:    the newest hypothesis that proved true becomes the block at hand: offset a* - a, which is 0 for a hit (the
              rows of a separate draft pass) and larger for a tail. If none did, the old block stays, a* + 1 rows on
    draft:    the next d1..dn from rows offset, offset + 1, ... of the block at hand

Drafts are always drawn anew from the block's rows after the outcome is known, and judged with those rows' q. Nothing
that chose the hypotheses can then bias the text: q is fixed by what was known before the draft was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_orthrus.errors import UserError
from vllm_orthrus.kernels.chances import (
    LOOKED_AT,
    Calibration,
    Drafts,
    History,
    block_values,
    bonus_chances,
    describe_drafts,
    draft_count,
    new_calibration,
    new_history,
    outcome_chances,
    update_calibration,
)
from vllm_orthrus.kernels.hypotheses import NONE, Hypotheses, choose_hypotheses, count_covered, match_outcome
from vllm_orthrus.kernels.most_probable import from_probabilities
from vllm_orthrus.training.reference import Cache, Drafting, Reference, attend
from vllm_orthrus.training.rejection import Verdict, verify_greedy, verify_sampling
from vllm_orthrus.training.selector import Selector, choose_drafts
from vllm_orthrus.training.views import Rope


class Step(NamedTuple):
    """One forward of one sequence."""

    offset: int  # of its drafts in their block; 0: the block knew the bonus
    proposed: int
    accepted: int
    hit: bool  # the next drafts are those of a separate draft pass
    count_covered: bool  # some hypothesis was an exact block after this number of accepted drafts


class Run(NamedTuple):
    tokens: list[int]
    steps: list[Step]

    @property
    def forwards(self) -> int:
        """One draft pass behind the prompt, and a forward per step."""
        return len(self.steps) + 1 if self.steps else 0


class Sequences(NamedTuple):
    """Those sequences that go on."""

    prompt: Tensor  # [R] which one
    prefix: Tensor  # [R] p, the anchor's position: so many tokens are committed before it
    anchors: Tensor  # [R]
    block: Tensor  # [R, B, d] states of the block at hand
    logits: Tensor  # [R, B, V] of its rows
    offset: Tensor  # [R] row of it that predicts what follows the anchor
    history: History

    def keep(self, rows: Tensor) -> Sequences:
        history = History(*(part[rows] for part in self.history))
        parts = {name: part[rows] for name, part in self._asdict().items() if name != "history"}
        return Sequences(**parts, history=history)


class OnePass:
    """Decodes with `hypotheses` blocks per forward. What it learns about drafts is kept from one call to the next."""

    def __init__(
        self,
        reference: Reference,
        hypotheses: int,
        temperature: float = 0.0,
        num_drafts: int | None = None,
        width: int | None = None,
        drafting: Drafting = "probabilistic",
        generator: torch.Generator | None = None,
        carry_all: bool = False,
    ) -> None:
        """`carry_all` really runs all blocks in the verification's forward. Otherwise only the block that proves useful
        is computed, after the verification, with the same result: blocks see neither each other nor later tokens.
        """
        if hypotheses < 1:
            raise UserError(f"hypotheses={hypotheses}: one pass needs at least 1. Without any, use the two-pass loop.")
        self.reference, self.hypotheses, self.temperature = reference, hypotheses, temperature
        self.width = width or reference.config.block_size
        self.drafting_rows = max(1, min(self.width, reference.config.num_drafts))
        self.num_drafts = num_drafts or self.drafting_rows
        self.drafting, self.generator, self.carry_all = drafting, generator, carry_all
        self.calibration: Calibration = new_calibration(reference.device)
        self.values = block_values(self.width, self.drafting_rows, hypotheses, reference.device)
        self.places = torch.arange(self.num_drafts + 1, device=reference.device)
        self.choose: Callable[..., Hypotheses] = choose_hypotheses

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 128, stop: Sequence[int] = ()
    ) -> list[Run]:
        sequences, cache = self._read(prompts, max_new_tokens)
        runs = [Run([token], []) for token in sequences.anchors.tolist()]

        def going(run: Run) -> bool:
            return len(run.tokens) < max_new_tokens and run.tokens[-1] not in stop

        while True:
            keep = [row for row, index in enumerate(sequences.prompt.tolist()) if going(runs[index])]
            if not keep:
                return runs
            if len(keep) < len(sequences.prompt):
                rows = torch.tensor(keep, device=cache.keys[0].device)
                sequences = sequences.keep(rows)
                cache = Cache(*([layer[rows] for layer in side] for side in cache))
            anchors, sampled, steps, sequences = self._step(sequences, cache)
            for index, kept, bonus, step in zip(
                sequences.prompt.tolist(), sampled.tolist(), anchors.tolist(), steps, strict=True
            ):
                run = runs[index]
                run.steps.append(step)
                for token in (*kept[: step.accepted], bonus):
                    if going(run):
                        run.tokens.append(token)

    def _read(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[Sequences, Cache]:
        """Prefill, first token, and the first block, which has no verification to ride with."""
        device = self.reference.device
        prefix = torch.tensor([len(prompt) for prompt in prompts], device=device)
        longest = int(prefix.max())
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
        # A sequence ends at most one whole verification behind its limit.
        cache = self.reference.new_cache(len(prompts), longest + max_new_tokens + 2 * (self.num_drafts + 1))
        hidden = self.reference.autoregressive(ids, torch.arange(longest, device=device).expand_as(ids), cache)
        rows = torch.arange(len(prompts), device=device)
        anchors = self._draw(self._probabilities(self.reference.logits(hidden[rows, prefix - 1])))
        block = self.reference.diffusion(anchors, prefix, cache, self.width)
        history = new_history(len(prompts), device)
        logits = self.reference.logits(block)
        return Sequences(rows, prefix, anchors, block, logits, torch.zeros_like(prefix), history), cache

    def _step(self, now: Sequences, cache: Cache) -> tuple[Tensor, Tensor, list[Step], Sequences]:
        drafts, q = self._draft(now)
        sampling = torch.full_like(now.prefix, self.temperature > 0, dtype=torch.bool)
        chosen = self.choose(
            outcome_chances(self.calibration, now.history, drafts, sampling),
            bonus_chances(self.calibration, drafts, sampling),
            drafts.candidates,
            drafts.tokens,
            now.anchors,
            now.offset,
            self.values,
            self.hypotheses,
        )

        ids = torch.cat((now.anchors[:, None], drafts.tokens), dim=1)  # [R, K+1]
        positions = now.prefix[:, None] + self.places
        if self.carry_all:
            hidden, states = forward(self.reference, cache, ids, positions, chosen, now.prefix, self.width)
        else:
            hidden = self.reference.autoregressive(ids, positions, cache)
        accepted, bonus = self._verify(drafts, q, self.reference.logits(hidden))

        which, offset = match_outcome(chosen, drafts.tokens, accepted + 1, bonus, now.offset)
        self.calibration, history = update_calibration(
            self.calibration, now.history, drafts, sampling, accepted + 1, bonus
        )
        found, at = which >= 0, which.clamp(min=0)[:, None]
        if self.carry_all:
            fresh = states[torch.arange(len(at)), at[:, 0]]
        else:
            # The cache already holds the drafts' keys, so this is what the block would have computed in the forward.
            behind = torch.where(found, now.prefix + chosen.accepted.gather(1, at)[:, 0] + 1, now.prefix)
            fresh = self.reference.diffusion(chosen.token.gather(1, at)[:, 0], behind, cache, self.width)
        block = torch.where(found[:, None, None], fresh, now.block)
        logits = torch.where(found[:, None, None], self.reference.logits(fresh), now.logits)

        hit = found & (offset == 0)
        covered = count_covered(chosen, drafts.tokens, drafts.real, accepted)
        facts = (now.offset, drafts.real, accepted, hit, covered)
        steps = [Step(*row) for row in zip(*(fact.tolist() for fact in facts), strict=True)]
        after = Sequences(now.prompt, now.prefix + accepted + 1, bonus, block, logits, offset, history)
        return bonus, drafts.tokens, steps, after

    def _draft(self, now: Sequences) -> tuple[Drafts, Tensor]:
        """The drafts, described, and the distributions [R, K, V] that they were drawn from."""
        rows = (now.offset[:, None] + self.places).clamp(max=self.width - 1)[..., None]  # [R, K+1, 1]
        logits = now.logits.gather(1, rows.expand(-1, -1, now.logits.shape[2]))
        real = draft_count(now.offset, self.num_drafts, self.drafting_rows)
        if self.reference.selector is not None:
            hidden = now.block.gather(1, rows.expand(-1, -1, now.block.shape[2]))
            return self._select(self.reference.selector, now, logits, hidden, real)
        q = self._probabilities(logits)
        drafted = self._draw(q[:, :-1]) if self.drafting == "probabilistic" else q[:, :-1].argmax(-1)
        said = from_probabilities(q, drafted, LOOKED_AT)
        described = describe_drafts(said, drafted, real, now.offset, self.width)
        if self.drafting == "greedy":  # drawn from nothing, whatever the rows say: q is one-hot
            return described, torch.zeros_like(q[:, :-1]).scatter_(2, drafted[..., None], 1)
        return described, q[:, :-1]

    def _select(
        self, selector: Selector, now: Sequences, logits: Tensor, hidden: Tensor, real: Tensor
    ) -> tuple[Drafts, Tensor]:
        draws = self.temperature > 0 and self.drafting == "probabilistic"
        draw = self._draw if draws else None
        chosen = choose_drafts(
            selector, logits, hidden, now.anchors, now.offset, self.num_drafts, self.temperature, draw
        )
        described = describe_drafts(chosen.said(LOOKED_AT), chosen.drafts, real, now.offset, self.width)
        if draws:
            return described, chosen.dense(logits.shape[2])
        return described, torch.zeros_like(logits[:, :-1]).scatter_(2, chosen.drafts[..., None], 1)

    def _verify(self, drafts: Drafts, q: Tensor, logits: Tensor) -> Verdict:
        """Fillers are judged like any draft: they were drawn from the last row again, with that row's q."""
        if self.temperature == 0:
            return verify_greedy(drafts.tokens, logits)
        return verify_sampling(drafts.tokens, q, self._probabilities(logits), self.generator)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits / (self.temperature or 1.0), dim=-1)

    def _draw(self, probabilities: Tensor) -> Tensor:
        if self.temperature == 0:
            return probabilities.argmax(-1)
        drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=self.generator)
        return drawn.view(probabilities.shape[:-1])


def forward(
    reference: Reference,
    cache: Cache,
    ids: Tensor,
    positions: Tensor,
    hypotheses: Hypotheses,
    prefix: Tensor,
    width: int,
) -> tuple[Tensor, Tensor]:
    """One forward over verification rows [R, T] and H blocks per request: hidden states [R, T, d] and [R, H, B, d].

    In every layer the verification rows write their keys first. A hypothesis sees them as far as its own prefix goes.
    """
    reqs, num_hypotheses = hypotheses.token.shape
    behind = torch.where(hypotheses.accepted == NONE, 0, prefix[:, None] + hypotheses.accepted + 1)  # [R, H]
    block_ids = torch.full((reqs, num_hypotheses, width), reference.config.mask_token_id, device=ids.device)
    block_ids[..., 0] = hypotheses.token
    places = (behind[..., None] + torch.arange(width, device=ids.device)).flatten(0, 1)  # [R*H, B]

    x = reference.decoder.embed_tokens(ids)
    y = reference.decoder.embed_tokens(block_ids.flatten(0, 1))  # [R*H, B, d]
    rope, block_rope = (
        Rope.at(reference.decoder.rotary_emb, rows, where) for rows, where in ((x, positions), (y, places))
    )
    slots = torch.arange(cache.keys[0].shape[2], device=ids.device)
    visible = slots <= positions[..., None]  # [R, T, S]
    in_prefix = (slots < behind.flatten()[:, None])[:, None].expand(-1, width, -1)  # [R*H, B, S]
    block_visible = torch.cat((in_prefix, in_prefix.new_ones(len(places), width, width)), dim=-1)
    for index, (layer, view, diffusion) in enumerate(reference.views()):
        q, k, v = view.project(layer.input_layernorm(x), rope)
        cache.write(index, k, v, positions)
        x = x + view.output(attend(q, cache.keys[index], cache.values[index], visible, view.scaling))
        x = x + layer.mlp(layer.post_attention_layernorm(x))

        q, k, v = diffusion.project(layer.input_layernorm(y), block_rope)
        prefix_k, prefix_v = (side[index].repeat_interleave(num_hypotheses, dim=0) for side in cache)
        keys, values = torch.cat((prefix_k, k), dim=2), torch.cat((prefix_v, v), dim=2)
        y = y + diffusion.output(attend(q, keys, values, block_visible, diffusion.scaling))
        y = y + layer.mlp(layer.post_attention_layernorm(y))
    norm = reference.decoder.norm
    return norm(x), norm(y).unflatten(0, (reqs, num_hypotheses))


class Figures(NamedTuple):
    """What one pass gave on the prompts of one class."""

    prompts: int
    steps: int
    tokens_per_forward: float
    hit: float  # share of steps
    count_missed: float  # share of steps: no exact block after that number of accepted drafts
    bonus_missed: float  # share of steps: there was one, for another bonus


def figures(runs: Sequence[Run]) -> Figures:
    """Tokens past a sequence's limit or stop count like any others, as they do in tokens per cycle."""
    steps = [step for run in runs for step in run.steps]
    total = len(steps) or 1
    hits = sum(step.hit for step in steps)
    missed = [step for step in steps if not step.hit]
    return Figures(
        len(runs),
        len(steps),
        sum(step.accepted + 1 for step in steps) / (sum(run.forwards for run in runs) or 1),
        hits / total,
        sum(not step.count_covered for step in missed) / total,
        sum(step.count_covered for step in missed) / total,
    )
