"""Logarithmic probabilities, ranks, and which tokens they are reported for."""

from typing import Any

import numpy as np
import torch

from vllm_orthrus.patches.native.launch import Grid, native
from vllm_orthrus.patches.native.memory import Array, flat, floats, rows

_LOGPROB = "vllm.v1.worker.gpu.sample.logprob:"


@native(_LOGPROB + "_topk_log_softmax_kernel", "4d92b685e377")
def topk_log_softmax(
    grid: Grid,
    *,
    output_ptr: torch.Tensor,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    topk_ids_ptr: torch.Tensor,
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    **_: Any,
) -> None:
    (n,) = grid
    logits, tokens = rows(logits_ptr, logits_stride, n, vocab_size), rows(topk_ids_ptr, topk_ids_stride, n, topk)
    out = rows(output_ptr, topk, n, topk)
    for i in range(n):  # a row at a time: a prompt's may be many
        values = floats(logits_ptr, logits[i])
        greatest = np.fmax.reduce(values)
        exponentials = np.zeros(-(-vocab_size // BLOCK_SIZE) * BLOCK_SIZE, dtype=np.float32)
        exponentials[:vocab_size] = np.exp(values - greatest)
        total = np.float32(0)
        for partial in exponentials.reshape(-1, BLOCK_SIZE).sum(axis=1):
            total += partial
        out[i] = values[tokens[i]] - greatest - np.log(total)


@native(_LOGPROB + "_ranks_kernel", "21179d402490")
def ranks(
    grid: Grid,
    *,
    output_ptr: torch.Tensor,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    token_ids_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    **_: Any,
) -> None:
    (n,) = grid
    logits, tokens = rows(logits_ptr, logits_stride, n, vocab_size), flat(token_ids_ptr)
    out = flat(output_ptr)
    for i in range(n):
        values = floats(logits_ptr, logits[i])
        value = values[tokens[i]]
        out[i] = np.count_nonzero(values >= value)
        if value == -np.inf:  # the kernel counts what fills its last block, too
            out[i] += -vocab_size % BLOCK_SIZE


@native(_LOGPROB + "_fill_logprob_token_ids_kernel", "0024f9954042")
def fill_logprob_token_ids(
    grid: Grid,
    *,
    out_token_ids_ptr: torch.Tensor,
    out_token_ids_stride: int,
    out_valid_mask_ptr: torch.Tensor,
    out_valid_mask_stride: int,
    sampled_token_ids_ptr: torch.Tensor,
    topk_indices_ptr: torch.Tensor,
    topk_indices_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    num_per_req_token_ids_ptr: torch.Tensor,
    per_req_token_ids_ptr: torch.Tensor,
    per_req_token_ids_stride: int,
    NUM_TOPK: int,
    **_: Any,
) -> None:
    (n,) = grid
    out, valid, sampled = flat(out_token_ids_ptr), flat(out_valid_mask_ptr), flat(sampled_token_ids_ptr)
    wanted, best = flat(per_req_token_ids_ptr), flat(topk_indices_ptr)
    for i, slot in enumerate(flat(expanded_idx_mapping_ptr)[:n].tolist()):
        count, start = int(flat(num_per_req_token_ids_ptr)[slot]), slot * per_req_token_ids_stride
        tokens: Array = wanted[start : start + count]
        if count == 0:
            tokens = best[i * topk_indices_stride :][:NUM_TOPK]
        row = np.append(sampled[i], tokens)
        out[i * out_token_ids_stride :][: len(row)] = row
        valid[i * out_valid_mask_stride :][: len(row)] = True


@native("vllm.v1.worker.gpu.sample.prompt_logprob:_prompt_logprobs_token_ids_kernel", "13fa17193765")
def prompt_logprobs_token_ids(
    grid: Grid,
    *,
    prompt_logprobs_token_ids_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    **_: Any,
) -> None:
    (n,) = grid
    starts, computed = flat(query_start_loc_ptr)[: n + 1].tolist(), flat(num_computed_tokens_ptr)
    out, tokens = flat(prompt_logprobs_token_ids_ptr), flat(all_token_ids_ptr)
    for i, slot in enumerate(flat(idx_mapping_ptr)[:n].tolist()):
        first = slot * all_token_ids_stride + int(computed[slot]) + 1  # a token is predicted by the one before it
        # Behind the last request's tokens the memory may end, and nothing is asked about those.
        found = tokens[first : first + starts[i + 1] - starts[i]]
        out[starts[i] : starts[i] + len(found)] = found


@native("vllm.v1.worker.gpu.metrics.logits:_num_nans_kernel", "dea28a8cf4da")
def num_nans(
    grid: Grid, *, logits_ptr: torch.Tensor, logits_stride: int, num_nans_ptr: torch.Tensor, vocab_size: int, **_: Any
) -> None:
    (n,) = grid
    logits = rows(logits_ptr, logits_stride, n, vocab_size)
    flat(num_nans_ptr)[:n] = [np.count_nonzero(np.isnan(floats(logits_ptr, row))) for row in logits]
