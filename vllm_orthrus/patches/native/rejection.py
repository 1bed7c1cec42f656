"""Verifying drafts: which are accepted, and what is sampled in place of the first that is not.

As in the kernels, a row of logits is described by the maximum and the sum of exponentials of each block of the
vocabulary, from which the logarithm of its softmax's denominator follows:

    lse = max + log(sum of sums * exp(maxima - max))
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_orthrus.patches.native.draws import accept_draws, gumbel_noise, gumbel_noise_double
from vllm_orthrus.patches.native.launch import DECLINED, Grid, native
from vllm_orthrus.patches.native.memory import Array, flat, floats, rows
from vllm_orthrus.patches.native.sampling import block_argmax

_UTILS = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils:"
_SAMPLER = "vllm.v1.worker.gpu.spec_decode.rejection_sampler:"

Floats = NDArray[np.float32]


class _Stats(NamedTuple):
    """What is known of the blocks of each row of logits."""

    maximum: torch.Tensor
    maximum_stride: int
    sumexp: torch.Tensor
    sumexp_stride: int
    blocks: int
    padded: int

    def lse(self, first: int, count: int) -> Floats:
        """[count], of rows from the first on."""
        end = first + count
        maximum = np.full((count, self.padded), -np.inf, dtype=np.float32)
        sums = np.zeros((count, self.padded), dtype=np.float32)
        maximum[:, : self.blocks] = rows(self.maximum, self.maximum_stride, end, self.blocks)[first:]
        sums[:, : self.blocks] = rows(self.sumexp, self.sumexp_stride, end, self.blocks)[first:]
        greatest = np.fmax.reduce(maximum, axis=1)
        found: Floats = greatest + np.log((sums * np.exp(maximum - greatest[:, None])).sum(axis=1))
        return found


class _Logits(NamedTuple):
    """Logits of the target, a row for each place, or of the drafts, by slot and step and before temperature."""

    pointer: torch.Tensor
    stride: int
    stride_of_steps: int = 0

    def row(self, index: int, width: int, step: int = 0) -> Floats:
        start = index * self.stride + step * self.stride_of_steps
        return floats(self.pointer, flat(self.pointer)[start : start + width])

    def of_tokens(self, first: int, tokens: Array) -> Floats:
        """[n], of one token in each row from the first on."""
        return floats(self.pointer, flat(self.pointer)[(first + np.arange(len(tokens))) * self.stride + tokens])

    def of_drafts(self, slot: int, tokens: Array) -> Floats:
        """[n], of one token at each step of this slot."""
        start = slot * self.stride + np.arange(len(tokens)) * self.stride_of_steps
        return floats(self.pointer, flat(self.pointer)[start + tokens])


@native(_SAMPLER + "_gather_draft_sampled_kernel", "51d18b47b48c")
def gather_draft_sampled(
    grid: Grid,
    *,
    draft_sampled_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    input_ids_ptr: torch.Tensor,
    positions_ptr: torch.Tensor,
    logits_indices_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    num_logits: int,
    **_: Any,
) -> None:
    at = flat(logits_indices_ptr)[:num_logits]
    positions, local = flat(positions_ptr)[at], flat(expanded_local_pos_ptr)[:num_logits]
    prefill = flat(prefill_len_ptr)[flat(expanded_idx_mapping_ptr)[:num_logits]]
    filler = (local > 0) & (positions - local < prefill)
    flat(draft_sampled_ptr)[:num_logits] = np.where(filler, -1, flat(input_ids_ptr)[at])
    flat(pos_ptr)[:num_logits] = positions


@native(_SAMPLER + "_flatten_sampled_kernel", "b0469ffe73e7")
def flatten_sampled(
    grid: Grid,
    *,
    flat_sampled_ptr: torch.Tensor,
    sampled_ptr: torch.Tensor,
    sampled_stride: int,
    num_sampled_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    **_: Any,
) -> None:
    (n,) = grid
    out, sampled = flat(flat_sampled_ptr), flat(sampled_ptr)
    counts, starts = flat(num_sampled_ptr)[:n].tolist(), flat(cu_num_logits_ptr)[:n].tolist()
    for i, (count, start) in enumerate(zip(counts, starts, strict=True)):
        out[start : start + count] = sampled[i * sampled_stride :][:count]


@native(_UTILS + "_compute_local_logits_stats_kernel", "67ae7ea6b6a8", "28662e4f0334")
def compute_local_logits_stats(
    grid: Grid,
    *,
    target_local_argmax_ptr: torch.Tensor,
    target_local_argmax_stride: int,
    target_local_max_ptr: torch.Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: torch.Tensor,
    target_local_sumexp_stride: int,
    draft_local_max_ptr: torch.Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: torch.Tensor,
    draft_local_sumexp_stride: int,
    target_logits_ptr: torch.Tensor,
    target_logits_stride: int,
    draft_logits_ptr: torch.Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    num_speculative_steps: int | None = None,
    **_: Any,
) -> None:
    n, blocks = grid
    steps, slots = flat(expanded_local_pos_ptr)[:n], flat(expanded_idx_mapping_ptr)[:n]
    temperature = flat(temp_ptr)[slots].astype(np.float32)
    drafted = ~_is_bonus(steps, num_speculative_steps)
    logits = rows(target_logits_ptr, target_logits_stride, n, vocab_size)
    maximum = rows(target_local_max_ptr, target_local_max_stride, n, blocks)
    greedy = np.flatnonzero(drafted & (temperature == 0))
    if len(greedy):
        argmax = rows(target_local_argmax_ptr, target_local_argmax_stride, n, blocks)
        maximum[greedy], argmax[greedy] = block_argmax(floats(target_logits_ptr, logits[greedy]), BLOCK_SIZE)
    drawn = np.flatnonzero(drafted & (temperature != 0))
    if len(drawn):
        sums = rows(target_local_sumexp_ptr, target_local_sumexp_stride, n, blocks)
        maximum[drawn], sums[drawn] = _max_and_sumexp(floats(target_logits_ptr, logits[drawn]), BLOCK_SIZE)
        if draft_logits_ptr is not None:
            drafts = _Logits(draft_logits_ptr, draft_logits_stride_0, draft_logits_stride_1)
            said = np.stack([drafts.row(int(slots[i]), vocab_size, int(steps[i])) / temperature[i] for i in drawn])
            maximum = rows(draft_local_max_ptr, draft_local_max_stride, n, blocks)
            sums = rows(draft_local_sumexp_ptr, draft_local_sumexp_stride, n, blocks)
            maximum[drawn], sums[drawn] = _max_and_sumexp(said, BLOCK_SIZE)


@native(_UTILS + "_compute_cumulative_log_p_kernel", "46ed1e458103")
def compute_cumulative_log_p(
    grid: Grid,
    *,
    cumulative_log_p_ptr: torch.Tensor,
    target_logits_ptr: torch.Tensor,
    target_logits_stride: int,
    target_local_max_ptr: torch.Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: torch.Tensor,
    target_local_sumexp_stride: int,
    draft_sampled_ptr: torch.Tensor,
    draft_logits_ptr: torch.Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_local_max_ptr: torch.Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: torch.Tensor,
    draft_local_sumexp_stride: int,
    cu_num_logits_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    vocab_num_blocks: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
    **_: Any,
) -> None:
    (n,) = grid
    slots, starts = flat(idx_mapping_ptr)[:n].tolist(), flat(cu_num_logits_ptr)[: n + 1].tolist()
    sizes = vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS
    target_stats = _Stats(
        target_local_max_ptr, target_local_max_stride, target_local_sumexp_ptr, target_local_sumexp_stride, *sizes
    )
    draft_stats = _Stats(
        draft_local_max_ptr, draft_local_max_stride, draft_local_sumexp_ptr, draft_local_sumexp_stride, *sizes
    )
    target = _Logits(target_logits_ptr, target_logits_stride)
    drafts = None
    if draft_logits_ptr is not None:
        drafts = _Logits(draft_logits_ptr, draft_logits_stride_0, draft_logits_stride_1)
    out, tokens = flat(cumulative_log_p_ptr), flat(draft_sampled_ptr)
    for i, slot in enumerate(slots):
        start, count = starts[i], starts[i + 1] - starts[i] - 1
        temperature = np.float32(flat(temp_ptr)[slot])
        if temperature == 0 or count <= 0:
            continue
        judged = _judge(start, count, slot, temperature, tokens, target, target_stats, drafts, draft_stats)
        log_p = np.float32(0)
        for step, ratio in enumerate(judged.target - judged.draft):
            if judged.valid[step]:
                log_p = np.fmin(log_p + ratio, np.float32(0))
            out[start + step] = log_p


@native(_UTILS + "_compute_local_residual_mass_kernel", "9ac15cef885b", "c0ff4c05bfc0")
def compute_local_residual_mass(
    grid: Grid,
    *,
    local_residual_mass_ptr: torch.Tensor,
    local_residual_mass_stride: int,
    cumulative_log_p_ptr: torch.Tensor,
    target_logits_ptr: torch.Tensor,
    target_logits_stride: int,
    target_local_max_ptr: torch.Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: torch.Tensor,
    target_local_sumexp_stride: int,
    draft_logits_ptr: torch.Tensor,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_local_max_ptr: torch.Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: torch.Tensor,
    draft_local_sumexp_stride: int,
    draft_sampled_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    vocab_size: int,
    vocab_num_blocks: int,
    BLOCK_SIZE: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
    num_speculative_steps: int | None = None,
    **_: Any,
) -> None:
    n, blocks = grid
    steps, slots = flat(expanded_local_pos_ptr)[:n], flat(expanded_idx_mapping_ptr)[:n]
    temperature = flat(temp_ptr)[slots].astype(np.float32)
    needed = ~_is_bonus(steps, num_speculative_steps) & (steps > 0) & (temperature != 0)
    needed[-1] = False
    needed[:-1] &= flat(draft_sampled_ptr)[1:n] >= 0
    sizes = vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS
    target_stats = _Stats(
        target_local_max_ptr, target_local_max_stride, target_local_sumexp_ptr, target_local_sumexp_stride, *sizes
    )
    draft_stats = _Stats(
        draft_local_max_ptr, draft_local_max_stride, draft_local_sumexp_ptr, draft_local_sumexp_stride, *sizes
    )
    target = _Logits(target_logits_ptr, target_logits_stride)
    drafts = _Logits(draft_logits_ptr, draft_logits_stride_0, draft_logits_stride_1)
    out = rows(local_residual_mass_ptr, local_residual_mass_stride, n, blocks)
    for i in np.flatnonzero(needed).tolist():
        by_target = np.exp(target.row(i, vocab_size) - target_stats.lse(i, 1))
        said = drafts.row(int(slots[i]), vocab_size, int(steps[i])) / temperature[i]
        by_draft = np.exp(said - draft_stats.lse(i, 1))
        left = np.fmax(np.exp(flat(cumulative_log_p_ptr)[i - 1]) * by_target - by_draft, np.float32(0))
        out[i] = _blocks(left[None], BLOCK_SIZE, np.float32(0)).sum(axis=2)[0]


@native(_UTILS + "_rejection_kernel", "b6aa81413704")
@native(_UTILS + "_rejection_kernel", "5683c916e0e0", seed_by_step=True)
def reject(
    grid: Grid,
    *,
    sampled_ptr: torch.Tensor,
    sampled_stride: int,
    rejected_steps_ptr: torch.Tensor,
    target_rejected_logsumexp_ptr: torch.Tensor,
    draft_rejected_logsumexp_ptr: torch.Tensor,
    target_logits_ptr: torch.Tensor,
    target_logits_stride: int,
    target_local_argmax_ptr: torch.Tensor,
    target_local_argmax_stride: int,
    target_local_max_ptr: torch.Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: torch.Tensor,
    target_local_sumexp_stride: int,
    draft_sampled_ptr: torch.Tensor,
    draft_logits_ptr: torch.Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_local_max_ptr: torch.Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: torch.Tensor,
    draft_local_sumexp_stride: int,
    cu_num_logits_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    seed_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    synthetic_conditional_rates_ptr: torch.Tensor | None,
    cumulative_log_p_ptr: torch.Tensor | None,
    local_residual_mass_ptr: torch.Tensor | None,
    local_residual_mass_stride: int,
    vocab_num_blocks: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
    FLY_WINDOW_SIZE: int = 0,
    seed_by_step: bool = False,
    **_: Any,
) -> object:
    if FLY_WINDOW_SIZE:
        return DECLINED
    (n,) = grid
    slots, starts = flat(idx_mapping_ptr)[:n].tolist(), flat(cu_num_logits_ptr)[: n + 1].tolist()
    sizes = vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS
    target_stats = _Stats(
        target_local_max_ptr, target_local_max_stride, target_local_sumexp_ptr, target_local_sumexp_stride, *sizes
    )
    draft_stats = _Stats(
        draft_local_max_ptr, draft_local_max_stride, draft_local_sumexp_ptr, draft_local_sumexp_stride, *sizes
    )
    target = _Logits(target_logits_ptr, target_logits_stride)
    drafts = None
    if draft_logits_ptr is not None:
        drafts = _Logits(draft_logits_ptr, draft_logits_stride_0, draft_logits_stride_1)
    rates = None if synthetic_conditional_rates_ptr is None else flat(synthetic_conditional_rates_ptr)
    tokens, sampled = flat(draft_sampled_ptr), flat(sampled_ptr)
    accepted_counts = flat(rejected_steps_ptr)
    target_lse, draft_lse = flat(target_rejected_logsumexp_ptr), flat(draft_rejected_logsumexp_ptr)
    temperatures, seeds, positions = flat(temp_ptr), flat(seed_ptr), flat(pos_ptr)
    for i, slot in enumerate(slots):
        start, count = starts[i], starts[i + 1] - starts[i] - 1
        accepted_counts[i], target_lse[i], draft_lse[i] = 0, 0, 0
        if count <= 0:
            continue
        drafted = tokens[start + 1 : start + 1 + count]
        valid, out = drafted >= 0, sampled[i * sampled_stride :]
        temperature = np.float32(temperatures[slot])
        by_block = cumulative_log_p_ptr is not None and temperature != 0
        if temperature != 0 or rates is not None:
            steps = np.arange(count, dtype=np.int64)
            seed = seeds[slot] ^ (steps << 32) if seed_by_step and cumulative_log_p_ptr is not None else seeds[slot]
            u = accept_draws(np.broadcast_to(seed, count), positions[start : start + count])
        if temperature == 0:
            argmax = _argmax(
                rows(target_local_max_ptr, target_local_max_stride, start + count, vocab_num_blocks)[start:],
                rows(target_local_argmax_ptr, target_local_argmax_stride, start + count, vocab_num_blocks)[start:],
            )
            accepted = valid & (argmax == drafted if rates is None else u < rates[:count])
            kept = _leading(accepted)
            out[:kept] = drafted[:kept]
            if kept < count:
                out[kept] = argmax[kept]
            accepted_counts[i] = kept
        elif by_block:
            judged = _leading(valid)
            out[:judged] = drafted[:judged]
            prefix = np.exp(flat(cumulative_log_p_ptr)[start : start + judged])  # type: ignore[arg-type]
            threshold = prefix.copy()
            followed = int(min(judged, count - 1, _leading(valid[1:])))  # steps with a valid draft behind them
            if followed:
                if local_residual_mass_ptr is not None:
                    masses = rows(
                        local_residual_mass_ptr, local_residual_mass_stride, start + 1 + followed, vocab_num_blocks
                    )
                    padded = np.zeros((followed, PADDED_VOCAB_NUM_BLOCKS), dtype=np.float32)
                    padded[:, :vocab_num_blocks] = masses[start + 1 :]
                    left = padded.sum(axis=1)
                else:
                    logit = target.of_tokens(start + 1, drafted[1 : 1 + followed])
                    lse = target_stats.lse(start + 1, followed)
                    left = prefix[:followed] * (np.float32(1) - np.exp(logit - lse))
                whole = left + np.float32(1) - prefix[:followed]
                threshold[:followed] = np.where(whole > 0, left / whole, np.float32(1))
            reached = np.flatnonzero(u[:judged] <= threshold)
            kept = int(reached[-1]) + 1 if len(reached) else 0
            accepted_counts[i] = kept
            if kept < count:
                target_lse[i] = target_stats.lse(start + kept, 1)[0]
                if drafts is not None:
                    draft_lse[i] = draft_stats.lse(start + kept, 1)[0]
        else:
            said = _judge(start, count, slot, temperature, tokens, target, target_stats, drafts, draft_stats)
            accepted = valid & (said.target > np.log(u) + said.draft if rates is None else u < rates[:count])
            kept = _leading(accepted)
            judged = kept + int(kept < count and bool(valid[kept]))
            out[:judged] = drafted[:judged]
            accepted_counts[i] = kept
            if judged:
                target_lse[i], draft_lse[i] = said.target_lse[judged - 1], said.draft_lse[judged - 1]
    return None


@native(_UTILS + "_resample_kernel", "3a6e524b36c3", "deedfe6a4b85")
def resample(
    grid: Grid,
    *,
    resampled_local_argmax_ptr: torch.Tensor,
    resampled_local_argmax_stride: int,
    resampled_local_max_ptr: torch.Tensor,
    resampled_local_max_stride: int,
    target_logits_ptr: torch.Tensor,
    target_logits_stride: int,
    target_rejected_logsumexp_ptr: torch.Tensor,
    draft_logits_ptr: torch.Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_rejected_logsumexp_ptr: torch.Tensor,
    rejected_step_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    draft_sampled_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    seed_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    cumulative_log_p_ptr: torch.Tensor | None,
    vocab_size: int,
    BLOCK_SIZE: int,
    USE_FP64: bool,
    WATERMARK: bool = False,
    **_: Any,
) -> object:
    if WATERMARK:
        return DECLINED
    n, blocks = grid
    ends = flat(cu_num_logits_ptr)[: n + 1].astype(np.int64)
    accepted = flat(rejected_step_ptr)[:n].astype(np.int64)
    places = ends[:-1] + accepted  # of the tokens to be sampled
    slots = flat(expanded_idx_mapping_ptr)[places].astype(np.int64)
    real, bonus = slots >= 0, places == ends[1:] - 1
    temperature = np.where(real, flat(temp_ptr)[slots], 0).astype(np.float32)
    which = np.flatnonzero((temperature != 0) | bonus)
    if len(which) == 0:
        return None
    target = _Logits(target_logits_ptr, target_logits_stride)
    drafts = None
    if draft_logits_ptr is not None:
        drafts = _Logits(draft_logits_ptr, draft_logits_stride_0, draft_logits_stride_1)
    logits = np.stack([target.row(int(place), vocab_size) for place in places[which]])  # [n, vocabulary]
    for row, i in zip(logits, which.tolist(), strict=True):
        rejected = -1 if bonus[i] else int(flat(draft_sampled_ptr)[places[i] + 1])
        if rejected < 0:
            continue
        if drafts is None:
            row[rejected : rejected + 1] = -np.inf  # of a vocabulary that may be wider than what is sampled from
            continue
        said = drafts.row(int(slots[i]), vocab_size, int(accepted[i])) / temperature[i]
        row -= flat(target_rejected_logsumexp_ptr)[i]
        if cumulative_log_p_ptr is not None:
            row += flat(cumulative_log_p_ptr)[places[i] - 1] if accepted[i] > 0 else np.float32(0)
        ratio = np.exp(said - flat(draft_rejected_logsumexp_ptr)[i] - row)
        row[:] = np.where(ratio < 1, row + np.log1p(-ratio), -np.inf)
    values: Array = logits.astype(np.float64) if USE_FP64 else logits
    drawn = np.flatnonzero(temperature[which])
    if len(drawn):
        noise = gumbel_noise_double if USE_FP64 else gumbel_noise
        at = which[drawn]
        values[drawn] += noise(flat(seed_ptr)[slots[at]], flat(pos_ptr)[places[at]], vocab_size)
    best, token = block_argmax(values, BLOCK_SIZE)
    rows(resampled_local_argmax_ptr, resampled_local_argmax_stride, n, blocks)[which] = token
    rows(resampled_local_max_ptr, resampled_local_max_stride, n, blocks)[which] = best
    return None


@native(_UTILS + "_insert_resampled_kernel", "f64fff1caf0b")
def insert_resampled(
    grid: Grid,
    *,
    sampled_ptr: torch.Tensor,
    sampled_stride: int,
    num_sampled_ptr: torch.Tensor,
    resampled_local_argmax_ptr: torch.Tensor,
    resampled_local_argmax_stride: int,
    resampled_local_max_ptr: torch.Tensor,
    resampled_local_max_stride: int,
    resample_num_blocks: int,
    cu_num_logits_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    **_: Any,
) -> None:
    (n,) = grid
    ends, num_sampled = flat(cu_num_logits_ptr)[: n + 1].astype(np.int64), flat(num_sampled_ptr)[:n]
    accepted = num_sampled.astype(np.int64)
    num_sampled += 1
    places = ends[:-1] + accepted
    temperature = flat(temp_ptr)[flat(expanded_idx_mapping_ptr)[places]]
    which = np.flatnonzero((temperature != 0) | (places == ends[1:] - 1))
    token = _argmax(
        rows(resampled_local_max_ptr, resampled_local_max_stride, n, resample_num_blocks)[which],
        rows(resampled_local_argmax_ptr, resampled_local_argmax_stride, n, resample_num_blocks)[which],
    )
    flat(sampled_ptr)[which * sampled_stride + accepted[which]] = token


class _Judged(NamedTuple):
    """Of each draft of a request: whether it is one, and its logarithmic probability by target and draft."""

    valid: NDArray[np.bool_]
    target: Floats
    draft: Floats
    target_lse: Floats
    draft_lse: Floats


def _judge(
    start: int,
    count: int,
    slot: int,
    temperature: np.float32,
    tokens: Array,
    target: _Logits,
    target_stats: _Stats,
    drafts: _Logits | None,
    draft_stats: _Stats,
) -> _Judged:
    drafted = tokens[start + 1 : start + 1 + count]
    valid, at = drafted >= 0, np.maximum(drafted, 0)
    target_lse = target_stats.lse(start, count)
    by_target = target.of_tokens(start, at) - target_lse
    if drafts is None:  # the draft was certain
        zeros = np.zeros(count, dtype=np.float32)
        return _Judged(valid, by_target, zeros, target_lse, zeros)
    draft_lse = draft_stats.lse(start, count)
    by_draft = drafts.of_drafts(slot, at) / temperature - draft_lse
    return _Judged(valid, by_target, by_draft, target_lse, draft_lse)


def _is_bonus(steps: Array, num_speculative_steps: int | None) -> NDArray[np.bool_]:
    """[n] whether these places of their requests are behind all drafts, of which there may be fewer than that."""
    if num_speculative_steps is not None:
        full: NDArray[np.bool_] = steps >= num_speculative_steps
        return full
    last = np.ones(len(steps), dtype=np.bool_)
    last[:-1] = steps[1:] == 0
    return last


def _blocks(values: Floats, block: int, filler: np.float32) -> Floats:
    """[n, blocks, block]"""
    n, width = values.shape
    blocks = -(-width // block)
    padded = np.full((n, blocks * block), filler, dtype=np.float32)
    padded[:, :width] = values
    return padded.reshape(n, blocks, block)


def _max_and_sumexp(logits: Floats, block: int) -> tuple[Floats, Floats]:
    """Of each block of each row."""
    blocks = _blocks(logits, block, np.float32(-np.inf))
    greatest = np.fmax.reduce(blocks, axis=2)
    sums = np.exp(blocks - greatest[:, :, None]).sum(axis=2)
    return greatest, np.where(greatest > -np.inf, sums, np.float32(0))


def _argmax(maximum: Array, argmax: Array) -> Array:
    """[n] the token of the greatest block of each row."""
    best = np.where(np.isnan(maximum), -np.inf, maximum).argmax(axis=1)
    token: Array = argmax[np.arange(len(argmax)), best]
    return token


def _leading(accepted: NDArray[np.bool_]) -> int:
    """How many, from the first on, are accepted."""
    return len(accepted) if accepted.all() else int(accepted.argmin())
