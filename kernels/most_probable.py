# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The likeliest tokens of a draft's rows and how likely each draft was, from one reading of their logits.

    probability = softmax(logits / temperature)      temperature 0: as if it were 1
    likeliest   = the `count` largest, in order
    confidence  = that of the drafted token

Two launches: each program of the first keeps a stretch of the vocabulary in registers and takes its maximum `count`
times; the second merges the stretches of a row. Neither the probabilities nor a sorted row ever stand in memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_orthrus.kernels.forms import runs_triton
from vllm_orthrus.kernels.packed import require_packed

STRETCH = 4096  # of the vocabulary, per program


class Probable(NamedTuple):
    """For R requests with K drafts each: their rows, and the one behind them."""

    confidence: Tensor  # [R, K] float32
    tokens: Tensor  # [R, K+1, count] int64
    probability: Tensor  # [R, K+1, count] float32, falling


class Likeliest(NamedTuple):
    """For R requests with P rows each."""

    tokens: Tensor  # [R, P, count] int64
    probability: Tensor  # [R, P, count] float32, falling


def most_probable(logits: Tensor, drafts: Tensor, temperature: Tensor, count: int) -> Probable:
    """logits [R * K + R, V], those of the rows behind last; drafts [R, K]; temperature [R]."""
    form = launch if runs_triton(logits.device) else naive
    return form(logits, drafts, temperature, count)


def naive(logits: Tensor, drafts: Tensor, temperature: Tensor, count: int) -> Probable:
    drafting, behind = logits[: drafts.numel()], logits[drafts.numel() :]
    rows = torch.cat((drafting.view(*drafts.shape, logits.shape[1]), behind[:, None]), dim=1).float()  # [R, K+1, V]
    scaled = rows / torch.where(temperature > 0, temperature, 1)[:, None, None]
    return from_probabilities(scaled.softmax(-1), drafts, count)


def from_probabilities(probabilities: Tensor, drafts: Tensor, count: int) -> Probable:
    """The same where probabilities [R, K+1, V] are known."""
    probability, tokens = probabilities.topk(min(count, probabilities.shape[2]), dim=-1)
    return Probable(probabilities[:, :-1].gather(2, drafts[..., None]).squeeze(2), tokens, probability)


def likeliest(logits: Tensor, behind: bool, temperature: Tensor, count: int) -> Likeliest:
    """The same where no draft has been made yet: logits [R * K, V], and behind them, if there are such, R rows more."""
    form = launch_likeliest if runs_triton(logits.device) else naive_likeliest
    return form(logits, behind, temperature, count)


def naive_likeliest(logits: Tensor, behind: bool, temperature: Tensor, count: int) -> Likeliest:
    reqs = len(temperature)
    drafting = logits[: len(logits) - reqs * behind].unflatten(0, (reqs, -1))  # [R, K, V]
    rows = torch.cat((drafting, logits[len(logits) - reqs :, None]), dim=1) if behind else drafting
    scaled = rows.float() / torch.where(temperature > 0, temperature, 1)[:, None, None]
    probability, tokens = scaled.softmax(-1).topk(min(count, logits.shape[1]), dim=-1)
    return Likeliest(tokens, probability)


def launch_likeliest(
    logits: Tensor, behind: bool, temperature: Tensor, count: int, stretch: int = STRETCH
) -> Likeliest:
    reqs = len(temperature)
    return Likeliest(*_launch(logits, reqs, len(logits) // reqs, behind, None, temperature, count, stretch)[1:])


def launch(logits: Tensor, drafts: Tensor, temperature: Tensor, count: int, stretch: int = STRETCH) -> Probable:
    return _launch(logits, len(drafts), drafts.shape[1] + 1, True, drafts, temperature, count, stretch)


def _launch(
    logits: Tensor,
    reqs: int,
    places: int,
    behind: bool,
    drafts: Tensor | None,
    temperature: Tensor,
    count: int,
    stretch: int,
) -> Probable:
    vocabulary = logits.shape[1]
    require_packed(logits=logits, drafts=drafts, temperature=temperature)
    count = min(count, vocabulary)
    stretches = triton.cdiv(vocabulary, stretch)
    device, rows = logits.device, len(logits)  # which may lie apart, as those of a padded vocabulary do
    largest, sums = (torch.empty(rows, stretches, dtype=torch.float32, device=device) for _ in range(2))
    values = torch.empty(rows, stretches, count, dtype=torch.float32, device=device)
    found = torch.empty(rows, stretches, count, dtype=torch.int32, device=device)
    _scan_kernel[(rows, stretches)](
        logits,
        logits.stride(0),
        reqs,
        temperature,
        largest,
        sums,
        values,
        found,
        vocabulary,
        stretches,
        PLACES=places,
        BEHIND=behind,
        COUNT=count,
        TILE=triton.next_power_of_2(min(stretch, vocabulary)),
        num_warps=8,
    )
    out = Probable(
        torch.empty(reqs, places - 1, dtype=torch.float32, device=device),
        torch.empty(reqs, places, count, dtype=torch.int64, device=device),
        torch.empty(reqs, places, count, dtype=torch.float32, device=device),
    )
    _merge_scans_kernel[(rows,)](
        logits,
        logits.stride(0),
        reqs,
        temperature,
        drafts,
        0 if drafts is None else drafts.stride(0),
        largest,
        sums,
        values,
        found,
        *out,
        stretches,
        PLACES=places,
        BEHIND=behind,
        COUNT=count,
        STRETCHES_TILE=triton.next_power_of_2(stretches),
        TILE=triton.next_power_of_2(stretches * count),
        num_warps=4,
    )
    return out


# Compiled once for all numbers of requests.
@triton.jit(do_not_specialize=["reqs"])
def _scan_kernel(
    logits,
    row_stride,
    reqs,
    temperature,
    out_largest,
    out_sums,
    out_values,
    out_found,
    vocabulary,
    stretches,
    PLACES: tl.constexpr,
    BEHIND: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stretch = tl.program_id(1)
    degrees = tl.load(temperature + _place(row, reqs, PLACES, BEHIND)[0]).to(tl.float32)
    token = stretch * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * row_stride + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    x = x / tl.where(degrees > 0, degrees, 1.0)
    largest = tl.max(x, 0)
    at = row * stretches + stretch
    tl.store(out_largest + at, largest)
    tl.store(out_sums + at, tl.sum(tl.exp(x - tl.maximum(largest, -1e38)), 0))  # all may be -inf
    for rank in range(COUNT):
        best = tl.argmax(x, 0)
        tl.store(out_values + at * COUNT + rank, tl.max(x, 0))
        tl.store(out_found + at * COUNT + rank, stretch * TILE + best)
        x = tl.where(token == stretch * TILE + best, float("-inf"), x)


@triton.jit(do_not_specialize=["reqs"])
def _merge_scans_kernel(
    logits,
    row_stride,
    reqs,
    temperature,
    drafts,
    drafts_stride,
    largest,
    sums,
    values,
    found,
    out_confidence,
    out_tokens,
    out_probability,
    stretches,
    PLACES: tl.constexpr,
    BEHIND: tl.constexpr,
    COUNT: tl.constexpr,
    STRETCHES_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    req, place = _place(row, reqs, PLACES, BEHIND)
    to = req * PLACES + place
    degrees = tl.load(temperature + req).to(tl.float32)
    degrees = tl.where(degrees > 0, degrees, 1.0)
    part = tl.arange(0, STRETCHES_TILE)
    maxima = tl.load(largest + row * stretches + part, mask=part < stretches, other=float("-inf"))
    total = tl.load(sums + row * stretches + part, mask=part < stretches, other=0.0)
    top = tl.max(maxima, 0)
    total = tl.sum(total * tl.exp(maxima - top), 0)

    candidate = tl.arange(0, TILE)
    inside = candidate < stretches * COUNT
    x = tl.load(values + row * stretches * COUNT + candidate, mask=inside, other=float("-inf"))
    token = tl.load(found + row * stretches * COUNT + candidate, mask=inside, other=0)
    for rank in range(COUNT):
        best = tl.argmax(x, 0)
        taken = candidate == best
        tl.store(out_tokens + to * COUNT + rank, tl.sum(tl.where(taken, token, 0), 0).to(tl.int64))
        tl.store(out_probability + to * COUNT + rank, tl.exp(tl.max(x, 0) - top) / total)
        x = tl.where(taken, float("-inf"), x)

    if drafts is not None:
        drafted = place < PLACES - 1
        draft = tl.load(drafts + req * drafts_stride + place, mask=drafted, other=0)
        logit = tl.load(logits + row * row_stride + draft, mask=drafted, other=0.0).to(tl.float32) / degrees
        tl.store(out_confidence + req * (PLACES - 1) + place, tl.exp(logit - top) / total, mask=drafted)


@triton.jit
def _place(row, reqs, PLACES: tl.constexpr, BEHIND: tl.constexpr):
    """Whose row of logits this is, and the draft's place that it speaks of."""
    if not BEHIND:
        return row // PLACES, row % PLACES
    drafting = row < reqs * (PLACES - 1)
    req = tl.where(drafting, row // (PLACES - 1), row - reqs * (PLACES - 1))
    return req, tl.where(drafting, row % (PLACES - 1), PLACES - 1)
