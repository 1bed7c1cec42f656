"""What a batch is made of before a forward, and how requests advance after it."""

from typing import Any

import numpy as np
import torch

from vllm_orthrus.patches.native.launch import Grid, native
from vllm_orthrus.patches.native.memory import flat

_MODULE = "vllm.v1.worker.gpu.input_batch:"


@native(_MODULE + "_prepare_prefill_inputs_kernel", "0afba0f1c070")
def prepare_prefill_inputs(
    grid: Grid,
    *,
    input_ids_ptr: torch.Tensor,
    next_prefill_tokens_ptr: torch.Tensor,
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    prefill_lens_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    **_: Any,
) -> None:
    (n,) = grid
    slots = flat(idx_mapping_ptr)[:n]
    computed, prefill = flat(num_computed_tokens_ptr)[slots], flat(prefill_lens_ptr)[slots]
    reading = np.flatnonzero(computed < prefill)
    if len(reading) == 0:
        return
    starts, tokens = flat(query_start_loc_ptr)[: n + 1], flat(all_token_ids_ptr)
    input_ids, following = flat(input_ids_ptr), flat(next_prefill_tokens_ptr)
    for i in reading.tolist():
        slot, start, end = int(slots[i]), int(starts[i]), int(starts[i + 1])
        request = tokens[slot * all_token_ids_stride :]
        first = int(computed[i])
        behind = first + end - start
        input_ids[start:end] = request[first:behind]
        for ahead in range(num_lookahead):
            at = behind + ahead
            following[ahead * next_prefill_tokens_stride + slot] = request[at] if at < prefill[i] else 0


@native(_MODULE + "_prepare_pos_seq_lens_kernel", "930d45316455")
def prepare_pos_seq_lens(
    grid: Grid,
    *,
    pos_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    max_num_reqs: int,
    **_: Any,
) -> None:
    n = grid[0] - 1
    starts = flat(query_start_loc_ptr)[: n + 1]
    computed = flat(num_computed_tokens_ptr)[flat(idx_mapping_ptr)[:n]]
    lengths = starts[1:] - starts[:-1]
    seq_lens = flat(seq_lens_ptr)
    seq_lens[:n] = computed + lengths
    seq_lens[n:max_num_reqs] = 0
    if n:
        first, last = int(starts[0]), int(starts[-1])
        flat(pos_ptr)[first:last] = np.arange(first, last) + np.repeat(computed - starts[:-1], lengths)


@native(_MODULE + "_combine_sampled_and_draft_tokens_kernel", "757d13562755")
def combine_sampled_and_draft_tokens(
    grid: Grid,
    *,
    input_ids_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    last_sampled_tokens_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    draft_tokens_ptr: torch.Tensor,
    draft_tokens_stride: int,
    cu_num_logits_ptr: torch.Tensor,
    logits_indices_ptr: torch.Tensor,
    NUM_NEW_SAMPLED_TOKENS: int,
    **_: Any,
) -> None:
    (n,) = grid
    slots, ends = flat(idx_mapping_ptr)[:n], flat(query_start_loc_ptr)[1 : n + 1]
    logits = flat(cu_num_logits_ptr)[: n + 1]
    counts = logits[1:] - logits[:-1]
    first, last = int(logits[0]), int(logits[-1])
    flat(logits_indices_ptr)[first:last] = np.arange(first, last) + np.repeat(ends - logits[1:], counts)

    lengths, prefill = flat(seq_lens_ptr)[:n], flat(prefill_len_ptr)[slots]
    input_ids = flat(input_ids_ptr)
    if NUM_NEW_SAMPLED_TOKENS:
        sampled = (lengths > prefill) & (lengths - counts >= prefill)
        input_ids[(ends - counts)[sampled]] = flat(last_sampled_tokens_ptr)[slots[sampled]]
    drafts = flat(draft_tokens_ptr)
    for i in np.flatnonzero((lengths > prefill) & (counts > NUM_NEW_SAMPLED_TOKENS)).tolist():
        count, end, start = int(counts[i]) - NUM_NEW_SAMPLED_TOKENS, int(ends[i]), int(slots[i]) * draft_tokens_stride
        input_ids[end - count : end] = drafts[start : start + count]


@native(_MODULE + "_get_num_sampled_and_rejected_kernel", "7705ef4522bf")
def get_num_sampled_and_rejected(
    grid: Grid,
    *,
    num_sampled_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
) -> None:
    (n,) = grid
    reading = flat(seq_lens_ptr)[:n] < flat(prefill_len_ptr)[flat(idx_mapping_ptr)[:n]]
    num_sampled, logits = flat(num_sampled_ptr)[:n], flat(cu_num_logits_ptr)
    num_sampled[reading] = 0
    flat(num_rejected_ptr)[:n] = np.where(reading, 0, logits[1 : n + 1] - logits[:n] - num_sampled)


@native(_MODULE + "_post_update_kernel", "39d5f0f51be4", "20c033236810")
def post_update(
    grid: Grid,
    *,
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    last_sampled_tokens_ptr: torch.Tensor,
    output_bin_counts_ptr: torch.Tensor | None,
    output_bin_counts_stride: int,
    sampled_tokens_ptr: torch.Tensor,
    sampled_tokens_stride: int,
    num_sampled_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor | None,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    total_len_ptr: torch.Tensor,
    draft_tokens_ptr: torch.Tensor | None = None,
    draft_tokens_out_ptr: torch.Tensor | None = None,
    num_draft_tokens: int = 0,
    **_: Any,
) -> None:
    (n,) = grid
    slots = flat(idx_mapping_ptr)[:n].tolist()
    counts, rejected = flat(num_sampled_ptr)[:n].tolist(), flat(num_rejected_ptr)[:n].tolist()
    starts = None if query_start_loc_ptr is None else flat(query_start_loc_ptr)[: n + 1].tolist()
    computed, total_len = flat(num_computed_tokens_ptr), flat(total_len_ptr)
    sampled, last_sampled, tokens = (
        flat(sampled_tokens_ptr),
        flat(last_sampled_tokens_ptr),
        flat(all_token_ids_ptr),
    )
    bins = None if output_bin_counts_ptr is None else flat(output_bin_counts_ptr)
    for i, slot in enumerate(slots):
        if slot < 0:
            continue
        if draft_tokens_ptr is not None and draft_tokens_out_ptr is not None:
            start, out = i * num_draft_tokens, slot * num_draft_tokens
            flat(draft_tokens_out_ptr)[out : out + num_draft_tokens] = flat(draft_tokens_ptr)[
                start : start + num_draft_tokens
            ]
        if counts[i] > 0:
            new = sampled[i * sampled_tokens_stride :][: counts[i]]
            last_sampled[slot] = new[-1]
            start = slot * all_token_ids_stride + int(total_len[slot])
            tokens[start : start + len(new)] = new
            total_len[slot] += len(new)
            if bins is not None:
                np.add.at(bins, slot * output_bin_counts_stride + new, 1)
        query = 0 if starts is None else starts[i + 1] - starts[i]
        computed[slot] += query - rejected[i]


@native(_MODULE + "_post_update_num_computed_tokens_kernel", "b42560701a0d")
def post_update_num_computed_tokens(
    grid: Grid,
    *,
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
) -> None:
    (n,) = grid
    starts = flat(query_start_loc_ptr)
    flat(num_computed_tokens_ptr)[flat(idx_mapping_ptr)[:n]] += starts[1 : n + 1] - starts[:n]


@native(_MODULE + "_expand_idx_mapping_kernel", "72eebc8ca45e")
def expand_idx_mapping(
    grid: Grid,
    *,
    idx_mapping_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    **_: Any,
) -> None:
    (n,) = grid
    starts = flat(cu_num_logits_ptr)[: n + 1]
    counts = starts[1:] - starts[:-1]
    first, last = int(starts[0]), int(starts[-1])
    flat(expanded_idx_mapping_ptr)[first:last] = np.repeat(flat(idx_mapping_ptr)[:n], counts)
    flat(expanded_local_pos_ptr)[first:last] = np.arange(first, last) - np.repeat(starts[:-1], counts)
