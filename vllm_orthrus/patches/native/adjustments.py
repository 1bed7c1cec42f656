"""What requests ask of their logits: penalties, biases, forbidden words, grammars."""

from typing import Any

import numpy as np
import torch

from vllm_orthrus.patches.native.launch import Grid, native
from vllm_orthrus.patches.native.memory import Array, flat, floats, rows, stored

_PENALTIES = "vllm.v1.worker.gpu.sample.penalties:"


def _never(logits: torch.Tensor) -> Any:
    """Minus infinity as these logits hold it."""
    return stored(logits, np.array([-np.inf], dtype=np.float32))[0]


@native(_PENALTIES + "_penalties_kernel", "e3eb8f6ce918")
def apply_penalties(
    grid: Grid,
    *,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    token_ids_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    repetition_penalty_ptr: torch.Tensor,
    frequency_penalty_ptr: torch.Tensor,
    presence_penalty_ptr: torch.Tensor,
    prompt_bin_mask_ptr: torch.Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: torch.Tensor,
    output_bin_counts_stride: int,
    vocab_size: int,
    **_: Any,
) -> None:
    n = grid[0]
    slots, local = flat(expanded_idx_mapping_ptr)[:n].tolist(), flat(expanded_local_pos_ptr)[:n].tolist()
    repetition, frequency = flat(repetition_penalty_ptr), flat(frequency_penalty_ptr)
    presence, tokens = flat(presence_penalty_ptr), flat(token_ids_ptr)
    logits = rows(logits_ptr, logits_stride, n, vocab_size)
    for row, slot in enumerate(slots):
        if repetition[slot] == 1 and frequency[slot] == 0 and presence[slot] == 0:
            continue
        counts = flat(output_bin_counts_ptr)[slot * output_bin_counts_stride :][:vocab_size].copy()
        drafted = tokens[row - local[row] + 1 : row + 1]  # the drafts before this place
        np.add.at(counts, drafted[(drafted >= 0) & (drafted < vocab_size)], 1)
        said = counts > 0
        values = floats(logits_ptr, logits[row])
        if repetition[slot] != 1:
            words = flat(prompt_bin_mask_ptr)[slot * prompt_bin_mask_stride :][: -(-vocab_size // 32)]
            in_prompt = np.unpackbits(words.view(np.uint8), bitorder="little", count=vocab_size).astype(np.bool_)
            scale = np.where(in_prompt | said, repetition[slot], np.float32(1))
            values *= np.where(values > 0, np.float32(1) / scale, scale)
        values -= frequency[slot] * counts.astype(np.float32)
        values -= presence[slot] * said.astype(np.float32)
        logits[row] = stored(logits_ptr, values)


@native(_PENALTIES + "_bincount_kernel", "7f2d11764695")
def bincount(
    grid: Grid,
    *,
    expanded_idx_mapping_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    prompt_bin_mask_ptr: torch.Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: torch.Tensor,
    output_bin_counts_stride: int,
    BLOCK_SIZE: int,
    **_: Any,
) -> None:
    n, blocks = grid
    for slot in flat(expanded_idx_mapping_ptr)[:n].tolist():
        request = flat(all_token_ids_ptr)[slot * all_token_ids_stride :][: blocks * BLOCK_SIZE]
        prompt, prefill = int(flat(prompt_len_ptr)[slot]), int(flat(prefill_len_ptr)[slot])
        words = flat(prompt_bin_mask_ptr)[slot * prompt_bin_mask_stride :]
        read = request[: min(prompt, -(-prefill // BLOCK_SIZE) * BLOCK_SIZE)]
        np.bitwise_or.at(words, read // 32, np.int32(1) << (read % 32))
        np.add.at(flat(output_bin_counts_ptr)[slot * output_bin_counts_stride :], request[prompt:prefill], 1)


@native("vllm.v1.worker.gpu.sample.logit_bias:_bias_kernel", "7e259e42d7bb")
def apply_logit_bias(
    grid: Grid,
    *,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    vocab_size: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    num_allowed_token_ids_ptr: torch.Tensor,
    allowed_token_ids_ptr: torch.Tensor,
    allowed_token_ids_stride: int,
    num_logit_bias_ptr: torch.Tensor,
    bias_token_ids_ptr: torch.Tensor,
    bias_token_ids_stride: int,
    bias_ptr: torch.Tensor,
    bias_stride: int,
    pos_ptr: torch.Tensor,
    min_lens_ptr: torch.Tensor,
    num_stop_token_ids_ptr: torch.Tensor,
    restore_when_all_masked_ptr: torch.Tensor,
    stop_token_ids_ptr: torch.Tensor,
    stop_token_ids_stride: int,
    CHECK_ALL_MASKED_ROWS: bool,
    **_: Any,
) -> None:
    (n,) = grid
    never = _never(logits_ptr)
    all_logits = rows(logits_ptr, logits_stride, n, vocab_size)
    positions = flat(pos_ptr)[:n].tolist()
    for row, slot in enumerate(flat(expanded_idx_mapping_ptr)[:n].tolist()):
        logits = all_logits[row]
        if count := int(flat(num_allowed_token_ids_ptr)[slot]):
            allowed = flat(allowed_token_ids_ptr)[slot * allowed_token_ids_stride :][:count]
            kept = logits[allowed]
            logits[:] = never
            logits[allowed] = kept
        if count := int(flat(num_logit_bias_ptr)[slot]):
            tokens = flat(bias_token_ids_ptr)[slot * bias_token_ids_stride :][:count]
            bias = flat(bias_ptr)[slot * bias_stride :][:count]
            logits[tokens] = stored(logits_ptr, floats(logits_ptr, logits[tokens]) + bias)
        count = int(flat(num_stop_token_ids_ptr)[slot])
        if count and positions[row] + 1 < int(flat(min_lens_ptr)[slot]):
            stops = flat(stop_token_ids_ptr)[slot * stop_token_ids_stride :][:count]
            before: Array = logits[stops]
            logits[stops] = never
            if CHECK_ALL_MASKED_ROWS and flat(restore_when_all_masked_ptr)[slot]:
                rest = floats(logits_ptr, logits)
                if np.fmax.reduce(rest) == -np.inf:
                    finite = np.isfinite(floats(logits_ptr, before))
                    logits[stops[finite]] = before[finite]


@native("vllm.v1.worker.gpu.sample.bad_words:_bad_words_kernel", "af1265c86bff")
def apply_bad_words(
    grid: Grid,
    *,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    bad_word_token_ids_ptr: torch.Tensor,
    bad_word_token_ids_stride: int,
    bad_word_offsets_ptr: torch.Tensor,
    bad_word_offsets_stride: int,
    num_bad_words_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: torch.Tensor,
    total_len_ptr: torch.Tensor,
    input_ids_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
) -> None:
    n, most = grid
    never = _never(logits_ptr)
    logits, local = flat(logits_ptr), flat(expanded_local_pos_ptr)[:n].tolist()
    for row, slot in enumerate(flat(expanded_idx_mapping_ptr)[:n].tolist()):
        count = min(int(flat(num_bad_words_ptr)[slot]), most)
        if count == 0:
            continue
        prompt, total = int(flat(prompt_len_ptr)[slot]), int(flat(total_len_ptr)[slot])
        output = flat(all_token_ids_ptr)[slot * all_token_ids_stride :][prompt:total]
        drafted = flat(input_ids_ptr)[row - local[row] + 1 : row + 1]
        before = np.concatenate([output, drafted])
        ends = flat(bad_word_offsets_ptr)[slot * bad_word_offsets_stride :][: count + 1].tolist()
        words = flat(bad_word_token_ids_ptr)[slot * bad_word_token_ids_stride :]
        for word in range(count):
            *prefix, last = words[ends[word] : ends[word + 1]].tolist()
            if len(prefix) <= len(before) and before[len(before) - len(prefix) :].tolist() == prefix:
                logits[row * logits_stride + last] = never


@native("vllm.v1.worker.gpu.structured_outputs:_apply_grammar_bitmask_kernel", "ef52b126f48d")
def apply_grammar_bitmask(
    grid: Grid,
    *,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    logits_indices_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    bitmask_ptr: torch.Tensor,
    bitmask_stride: int,
    vocab_size: int,
    MASK_STRIDE: int,
    **_: Any,
) -> None:
    n = grid[0]
    never, logits = _never(logits_ptr), flat(logits_ptr)
    starts, masks = flat(cu_num_logits_ptr), flat(bitmask_ptr)
    for i, index in enumerate(flat(logits_indices_ptr)[:n].tolist()):
        request, place = divmod(index, MASK_STRIDE)
        row = int(starts[request]) + place
        if row >= starts[request + 1]:  # a place that was not verified in the end
            continue
        words = masks[i * bitmask_stride :][: min(bitmask_stride, -(-vocab_size // 32))]
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little", count=vocab_size)
        logits[row * logits_stride :][:vocab_size][allowed == 0] = never
