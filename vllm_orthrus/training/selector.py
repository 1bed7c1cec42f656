"""The selector in plain PyTorch: its weights in training, and how it chooses drafts from left to right.

    score(c | d) = logit(c) + < (A e(d)) * (G h), B e(c) >      over the C likeliest tokens c of a row

It begins as nothing, with B at zero, and is trained to name the AR view's token among the candidates, once the draft
before it is the true one: a row behind a wrong draft is never reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vllm_orthrus.heads import SELECTOR_PARTS, SelectorCheckpoint, SelectorShape
from vllm_orthrus.kernels.most_probable import Probable
from vllm_orthrus.kernels.select import Tables, corrections
from vllm_orthrus.training.config import SelectorLoss
from vllm_orthrus.training.kl import chunk_rows

CE_SHARE = 0.1  # of `ce_tv`, beside total variation


class Selector(NamedTuple):
    """Ready to be used with one base."""

    shape: SelectorShape
    gate: Tensor  # G [rank, hidden]
    tables: Tables  # [V, rank]

    @classmethod
    def of(cls, shape: SelectorShape, parts: Mapping[str, Tensor], embedding: Tensor) -> Selector:
        """embedding [V, hidden]: the base's own."""
        previous, gate, candidate = (parts[name].to(embedding) for name in SELECTOR_PARTS)
        return cls(shape, gate, Tables(embedding @ previous.T, embedding @ candidate.T))

    @classmethod
    def open(cls, checkpoint: SelectorCheckpoint, embedding: Tensor) -> Selector:
        return cls.of(checkpoint.shape, dict(checkpoint.tensors()), embedding)


class Chosen(NamedTuple):
    drafts: Tensor  # [R, K]
    tokens: Tensor  # [R, P, C] candidates, of the rows behind the drafts as well
    q: Tensor  # [R, P, C] given the draft before

    def dense(self, vocabulary: int) -> Tensor:
        """[R, K, V], zero but for candidates."""
        tokens, q = self.tokens[:, : self.drafts.shape[1]], self.q[:, : self.drafts.shape[1]]
        return q.new_zeros(*q.shape[:2], vocabulary).scatter(2, tokens, q)

    def said(self, looked_at: int) -> Probable:
        drafted = self.tokens[:, : self.drafts.shape[1]] == self.drafts[..., None]
        confidence = torch.where(drafted, self.q[:, : self.drafts.shape[1]], 0).sum(-1)
        probability, order = self.q.topk(min(looked_at, self.q.shape[-1]), dim=-1)
        return Probable(confidence, self.tokens.gather(2, order), probability)


def choose_drafts(
    selector: Selector,
    logits: Tensor,  # [R, P, V] of the rows that draft, and perhaps of those behind them
    hidden: Tensor,  # [R, P, d]
    anchors: Tensor,  # [R]
    offset: Tensor,  # [R] the first of these rows, counted in its block
    num_drafts: int,
    temperature: float,
    draw: Callable[[Tensor], Tensor] | None = None,  # from q [R, C] a place; None: the likeliest
) -> Chosen:
    plain, tokens = logits.log_softmax(-1).topk(min(selector.shape.candidates, logits.shape[-1]), dim=-1)
    gate = hidden @ selector.gate.T
    before, drafts, qs = anchors, [], []
    for place in range(logits.shape[1]):
        named = tokens[:, place]
        added = corrections(selector.tables, before, gate[:, place], named)
        score = plain[:, place] + torch.where((offset + place > 0)[:, None], added, 0)
        q = (score / (temperature or 1.0)).softmax(-1)
        qs.append(q)
        if place < num_drafts:
            best = q.argmax(-1) if draw is None else draw(q)
            before = named.gather(1, best[:, None])[:, 0]
            drafts.append(before)
    return Chosen(torch.stack(drafts, 1), tokens, torch.stack(qs, 1))


class SelectorWeights(nn.Module):
    """A, G and B in training, in units in which embeddings and hidden states have a mean square near 1.

    The units are powers of two, so that what is stored is exactly what is trained.
    """

    def __init__(self, base: Any, shape: SelectorShape, initial: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        embedding, norm = base.model.embed_tokens.weight.detach().float(), base.model.norm.weight.detach().float()
        self.shape = shape
        self.scale_e, self.scale_h = (2.0 ** round(-math.log2(x.square().mean().sqrt())) for x in (embedding, norm))
        hidden = embedding.shape[1]
        generator = torch.Generator().manual_seed(0)

        def random() -> Tensor:
            values: Tensor = torch.randn(shape.rank, hidden, generator=generator) / hidden**0.5
            return values

        self.previous, self.gate = nn.Parameter(random()), nn.Parameter(random())
        self.candidate = nn.Parameter(torch.zeros(shape.rank, hidden))
        if initial is not None:
            self.load(initial)

    def parts(self) -> dict[str, Tensor]:
        """As they are stored: for embeddings and hidden states as the base has them."""
        return {
            "previous": self.previous * self.scale_e,
            "gate": self.gate * self.scale_h,
            "candidate": self.candidate * self.scale_e,
        }

    @torch.no_grad()
    def load(self, parts: Mapping[str, Tensor]) -> None:
        for name, scale in (("previous", self.scale_e), ("gate", self.scale_h), ("candidate", self.scale_e)):
            getattr(self, name).copy_(parts[name].float() / scale)


class Taught(NamedTuple):
    """Rows of blocks that learn, and what they learn from."""

    student: Tensor  # [N, d] their states
    place: Tensor  # [N] in their blocks
    tokens: Tensor  # [M] of the data
    teacher: Tensor  # [M, d] the AR view's states there
    of_row: Tensor  # [N] the token before the one that a row predicts
    weights: Tensor  # [N]


class SelectorObjective(NamedTuple):
    loss: Tensor
    right: Tensor  # [N] bool: the AR view's token is the one that is scored highest


def selector_loss(
    weights: SelectorWeights, taught: Taught, embedding: Tensor, output: Tensor, kind: SelectorLoss
) -> SelectorObjective:
    """The first row of a block is left alone. Of rows whose candidates lack the AR view's token only variation counts.

    embedding, output [V, hidden]: the base's.
    """
    count, total = len(taught.student), 0.0 * weights.candidate.sum()
    right = torch.zeros(count, dtype=torch.bool, device=taught.student.device)
    later = taught.weights * (taught.place > 0)
    share = (later / later.sum().clamp(min=1e-9)).float()
    parts = weights.parts()
    for start in range(0, count, rows := chunk_rows(output)):
        part = slice(start, start + rows)
        hidden, of_row = taught.student[part], taught.of_row[part]
        with torch.no_grad():
            plain, tokens = _log_softmax(hidden, output).topk(min(weights.shape.candidates, len(output)), dim=-1)
            distinct, which = torch.unique(of_row, return_inverse=True)  # blocks overlap
            log_p = _log_softmax(taught.teacher[distinct], output)
            is_label = tokens == log_p.argmax(-1)[which, None]  # [n, C]
            p = log_p[which].gather(1, tokens).exp()
            before, candidates = embedding[taught.tokens[of_row]].float(), embedding[tokens].float()
        behind = (before @ parts["previous"].T) * (hidden.detach().float() @ parts["gate"].T)  # [n, rank]
        # <x, B e> = <B' x, e>, which is one product for each row and not for each candidate.
        added = (candidates @ (behind @ parts["candidate"])[..., None]).squeeze(-1)
        score = plain + torch.where(taught.place[part, None] > 0, added, 0)
        log_q = score.log_softmax(-1)
        told = p if kind == "kl" else is_label.float()
        loss = -(told * log_q).sum(-1)
        if kind == "ce_tv":
            variation = 1 - torch.minimum(log_q.exp(), p).sum(-1)
            loss = CE_SHARE * loss + (1 - CE_SHARE) * variation
        total = total + (loss * share[part]).sum()
        right[part] = is_label.gather(1, score.argmax(-1, keepdim=True))[:, 0]
    return SelectorObjective(total, right)


def _log_softmax(states: Tensor, output: Tensor) -> Tensor:
    return (states.to(output.dtype) @ output.T).float().log_softmax(-1)
