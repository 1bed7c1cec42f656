# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Choose a block's drafts from left to right, each by a score that knows the draft before it, in one launch.

Row i of a block names its C likeliest tokens c, each with probability p_i(c) at the request's temperature T (at 0: as
if it were 1). Behind the block's first row, which knows its predecessor, the selector corrects them:

    score_i(c | d) = T log p_i(c) + < P[d] * g_i, S[c] >      d: the draft before it, or the anchor;  P, S: [V, rank]
    q_i            = softmax(score_i / T) over the C tokens
    draft_i        = argmax score_i at T = 0 or where drafts are not drawn, else drawn from q_i

What is drawn from is what is kept for the verification, rounded as it is kept there. All other tokens have -inf in it:
so they stand from the start, and only what the step before has written is taken back.

The rows behind the last draft are scored as well, given that draft: they speak of what may follow it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_orthrus.kernels.forms import runs_triton
from vllm_orthrus.kernels.most_probable import Likeliest, Probable
from vllm_orthrus.kernels.packed import require_contiguous, require_packed
from vllm_orthrus.kernels.uniform import uniform, uniform_of

LARGEST = 1 - 2.0**-24  # of draws: one more is 1 in float32, whose noise is infinite


class Tables(NamedTuple):
    """What each token adds, before it and as a candidate."""

    previous: Tensor  # P [V, rank]
    candidate: Tensor  # S [V, rank]


class Blocks(NamedTuple):
    """Of R requests, whose rows are being chosen from."""

    slot: Tensor  # [R], -1: nobody's
    anchor: Tensor  # [R]
    offset: Tensor  # [R], the row of its block that gives the first draft
    temperature: Tensor  # [R]
    gate: Tensor  # g [R * K (+ R), rank], in the order of the logits


class Kept(NamedTuple):
    """The distributions that drafts are drawn from, for the verification; by slot."""

    seeds: Tensor  # [slots] int64
    keys: Tensor  # [R, K] of the draws, none twice for a request
    logits: Tensor  # [slots, K, V], -inf but for `tokens`
    tokens: Tensor  # [slots, K, C] int32, those that are not; -1: none


def corrections(tables: Tables, previous: Tensor, gate: Tensor, tokens: Tensor) -> Tensor:
    """[..., C] of candidates `tokens` [..., C] behind `previous` [...], where the row's gate is [..., rank]."""
    behind = tables.previous[previous].float() * gate.float()
    return (tables.candidate[tokens].float() * behind[..., None, :]).sum(-1)


def select(
    said: Likeliest, blocks: Blocks, tables: Tables, drafts: Tensor, looked_at: int, kept: Kept | None = None
) -> Probable:
    """Fill drafts [R, K]. said: of K rows each, or K + 1. kept: if drafts are drawn; else they are the likeliest.

    Returns what the rows say of the drafts and of other tokens, the `looked_at` likeliest of each.
    """
    form = launch if runs_triton(drafts.device) else naive
    return form(said, blocks, tables, drafts, looked_at, kept)


def naive(
    said: Likeliest, blocks: Blocks, tables: Tables, drafts: Tensor, looked_at: int, kept: Kept | None = None
) -> Probable:
    reqs, places, candidates = said.tokens.shape
    num_drafts, vocabulary, shown = drafts.shape[1], len(tables.previous), min(looked_at, candidates)
    degrees = torch.where(blocks.temperature > 0, blocks.temperature, 1)[:, None]
    # A row that says nothing, for its logits are no numbers, leaves nothing to choose by, and may name a token twice.
    speaks = (said.probability > 0).any(-1, keepdim=True)  # [R, P, 1]
    tokens = torch.where(speaks, said.tokens, torch.arange(candidates, device=drafts.device))
    plain = torch.where(said.probability > 0, said.probability.log(), float("-inf"))
    plain = torch.where(speaks, plain, 0)
    gates = blocks.gate[: reqs * num_drafts].view(reqs, num_drafts, -1)
    if places > num_drafts:
        gates = torch.cat((gates, blocks.gate[reqs * num_drafts :, None]), dim=1)
    out = _room(drafts, places, looked_at, torch.zeros)
    before = blocks.anchor.clamp(0, vocabulary - 1)
    for place in range(places):
        named = tokens[:, place]
        added = corrections(tables, before, gates[:, place], named)
        corrects = speaks[:, place] & (blocks.offset[:, None] + place > 0) & added.isfinite().all(-1, keepdim=True)
        score = plain[:, place] * degrees + torch.where(corrects, added, 0)  # [R, C]
        if kept is not None and place < num_drafts:
            score = score.to(kept.logits.dtype).float()
        q = (score / degrees).softmax(-1)
        found, order = q.sort(dim=-1, descending=True, stable=True)
        out.tokens[:, place, :shown] = named.gather(1, order[:, :shown])
        out.probability[:, place, :shown] = found[:, :shown]
        if place == num_drafts:
            break
        noised = score / degrees
        if kept is not None:
            seeds = torch.where(blocks.slot >= 0, kept.seeds[blocks.slot], 0)
            draw = uniform(seeds[:, None], kept.keys[:, place, None], named).clamp(max=LARGEST)
            noised = torch.where((blocks.temperature > 0)[:, None], noised - (-draw.log()).log(), noised)
            _keep(kept, blocks.slot, place, named, score)
        best = noised.argmax(-1, keepdim=True)
        before = named.gather(1, best)[:, 0]
        drafts[:, place] = before
        out.confidence[:, place] = q.gather(1, best)[:, 0]
    return out


def _keep(kept: Kept, slot: Tensor, place: int, tokens: Tensor, score: Tensor) -> None:
    somebody = slot >= 0
    slot, tokens, score = slot[somebody], tokens[somebody], score[somebody]
    rows, old, new = slot[:, None].expand_as(tokens), kept.tokens[slot, place].long(), score > float("-inf")
    kept.logits[rows[old >= 0], place, old[old >= 0]] = float("-inf")
    kept.logits[rows[new], place, tokens[new]] = score[new].to(kept.logits.dtype)
    kept.tokens[slot, place] = torch.where(new, tokens, -1).to(kept.tokens.dtype)


def _room(drafts: Tensor, places: int, looked_at: int, make: Callable[..., Tensor]) -> Probable:
    reqs, device = len(drafts), drafts.device
    return Probable(
        make(drafts.shape, dtype=torch.float32, device=device),
        make((reqs, places, looked_at), dtype=torch.int64, device=device),
        make((reqs, places, looked_at), dtype=torch.float32, device=device),
    )


def launch(
    said: Likeliest, blocks: Blocks, tables: Tables, drafts: Tensor, looked_at: int, kept: Kept | None = None
) -> Probable:
    reqs, places, candidates = said.tokens.shape
    rank = tables.previous.shape[1]
    out = _room(drafts, places, looked_at, torch.empty)
    if reqs == 0:
        return out
    require_packed(drafts=drafts, temperature=blocks.temperature)
    require_contiguous(**said._asdict(), **tables._asdict(), gate=blocks.gate, offset=blocks.offset)
    if kept is not None:
        require_packed(keys=kept.keys, logits=kept.logits)
        require_contiguous(kept_tokens=kept.tokens, seeds=kept.seeds)
    _select_kernel[(reqs,)](
        reqs,
        said,
        blocks,
        blocks.slot.stride(0),
        blocks.anchor.stride(0),
        tables,
        len(tables.previous),
        drafts,
        drafts.stride(0),
        out,
        kept,
        0 if kept is None else kept.keys.stride(0),
        0 if kept is None else kept.logits.stride(0),
        0 if kept is None else kept.logits.stride(1),
        0 if kept is None else kept.tokens.shape[1],
        PLACES=places,
        DRAFTS=drafts.shape[1],
        CANDIDATES=candidates,
        CANDIDATES_TILE=triton.next_power_of_2(candidates),
        RANK=rank,
        RANK_TILE=triton.next_power_of_2(rank),
        LOOKED_AT=looked_at,
        LARGEST=LARGEST,
        num_warps=1 if rank <= 64 else 4,
    )
    return out


# Compiled once for all numbers of requests.
@triton.jit(do_not_specialize=["reqs"])
def _select_kernel(
    reqs,
    said,
    blocks,
    slot_stride,
    anchor_stride,
    tables,
    vocabulary,
    drafts,
    drafts_stride,
    out,
    kept,
    keys_stride,
    logits_slot_stride,
    logits_place_stride,
    kept_places,
    PLACES: tl.constexpr,
    DRAFTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CANDIDATES_TILE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    LOOKED_AT: tl.constexpr,
    LARGEST: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    slot = tl.load(blocks.slot + req * slot_stride).to(tl.int64)
    offset = tl.load(blocks.offset + req)
    degrees = tl.load(blocks.temperature + req).to(tl.float32)
    warm = degrees > 0
    degrees = tl.where(warm, degrees, 1.0)
    before = tl.load(blocks.anchor + req * anchor_stride).to(tl.int64)
    before = tl.minimum(tl.maximum(before, 0), vocabulary - 1)
    c = tl.arange(0, CANDIDATES_TILE)
    r = tl.arange(0, RANK_TILE)
    inside, ranked = c < CANDIDATES, r < RANK
    for place in range(PLACES):
        at = (req * PLACES + place) * CANDIDATES + c
        probability = tl.load(said.probability + at, mask=inside, other=0.0)
        probability = tl.where(probability > 0, probability, 0.0)  # drops NaN, too
        speaks = tl.max(probability, 0) > 0
        named = tl.where(speaks, tl.load(said.tokens + at, mask=inside, other=0), c).to(tl.int64)
        plain = tl.where(probability > 0, tl.log(probability), float("-inf"))
        plain = tl.where(speaks, plain, tl.where(inside, 0.0, float("-inf")))

        row = tl.where(place < DRAFTS, req * DRAFTS + place, reqs * DRAFTS + req)
        gate = tl.load(blocks.gate + row * RANK + r, mask=ranked, other=0.0).to(tl.float32)
        behind = tl.load(tables.previous + before * RANK + r, mask=ranked, other=0.0).to(tl.float32) * gate
        pair = named[:, None] * RANK + r[None, :]  # [C, rank]
        of_candidates = tl.load(tables.candidate + pair, mask=inside[:, None] & ranked[None, :], other=0.0)
        added = tl.sum(of_candidates.to(tl.float32) * behind[None, :], 1)
        finite = tl.min(((added - added) == 0).to(tl.int32), 0) > 0
        corrects = speaks & finite & (offset + place > 0)
        score = plain * degrees + tl.where(corrects, added, 0.0)
        if kept is not None:
            score = tl.where(place < DRAFTS, score.to(kept.logits.dtype.element_ty).to(tl.float32), score)
        scaled = score / degrees
        raised = tl.exp(scaled - tl.max(scaled, 0))
        q = raised / tl.sum(raised, 0)

        left = tl.where(inside, q, -1.0)
        to = (req * PLACES + place) * LOOKED_AT
        for rank in range(LOOKED_AT):
            best = tl.argmax(left, 0)
            taken = (c == best) & (left >= 0)
            tl.store(out.tokens + to + rank, tl.sum(tl.where(taken, named, 0), 0))
            tl.store(out.probability + to + rank, tl.sum(tl.where(taken, left, 0.0), 0))
            left = tl.where(taken, -1.0, left)

        if place < DRAFTS:
            noised = scaled
            if kept is not None:
                somebody = c < tl.where(slot >= 0, CANDIDATES, 0)
                new = somebody & (score > float("-inf"))
                seed = tl.load(kept.seeds + slot, mask=slot >= 0, other=0)
                key = tl.load(kept.keys + req * keys_stride + place)
                draw = tl.minimum(uniform_of(seed, key, named), LARGEST)
                noised = tl.where(warm, scaled - tl.log(-tl.log(draw)), scaled)
                note = kept.tokens + (slot * kept_places + place) * CANDIDATES + c
                old = tl.load(note, mask=somebody, other=-1)
                written = tl.where(new, named, -1).to(tl.int32)
                again = tl.max((old[:, None] == written[None, :]).to(tl.int32), 1)  # [C] of the old
                logits = kept.logits + slot * logits_slot_stride + place * logits_place_stride
                # No place is written twice here, in whatever order a program writes.
                tl.store(logits + old, float("-inf"), mask=somebody & (old >= 0) & (again < 1))
                tl.store(logits + named, score.to(kept.logits.dtype.element_ty), mask=new)
                tl.store(note, written, mask=somebody)
            best = tl.argmax(noised, 0)
            before = tl.sum(tl.where(c == best, named, 0), 0)
            tl.store(drafts + req * drafts_stride + place, before)
            tl.store(out.confidence + req * DRAFTS + place, tl.sum(tl.where(c == best, q, 0.0), 0))
