"""The target's and the diffusion view's attention of one layer side by side, in as few launches as there can be.

    q, k, v     a product for both views, or one for each; norms, rotation and the write to the cache in one launch
    results     a product for both views, or each view's into its part of one tensor; and one sum over the ranks

This calls the parts of the target's attention module instead of the module, so it is for those that are known.
"""

from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context

from vllm_orthrus.engine.attention.blocks import CachedLayer
from vllm_orthrus.engine.attention.cache import PLAIN, cached_keys_values
from vllm_orthrus.engine.attention.kernel import unreadable
from vllm_orthrus.engine.onepass import pairs
from vllm_orthrus.engine.onepass.pairs import is_a_product, side_by_side
from vllm_orthrus.engine.quantization import multiplies_in_place, multiply_in_fp8
from vllm_orthrus.engine.rotation import projected, rotate, rotate_nothing, rotates_plainly
from vllm_orthrus.engine.target_attention import computes_as_given
from vllm_orthrus.kernels.norm_rotate import CacheSlots

# Their forward is: project, norm if there are norms, rotate, attend, project.
KNOWN = ("Qwen3Attention", "Qwen2Attention", "LlamaAttention", "MistralAttention")

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q [rows, heads * dim], k and v [rows, kv_heads * dim]


def can_join(layer: CachedLayer, target: Any, device: torch.device) -> bool:
    """target: the attention module that this cached layer is a part of."""
    attn = layer.attn
    return (
        type(target).__name__ in KNOWN
        and type(target).__module__.startswith("vllm.")
        and not getattr(target, "do_llama_4_scaling", False)
        and rotates_plainly(target.rotary_emb, attn.head_size, device)
        and unreadable(layer) is None
        and attn.kv_cache_dtype in PLAIN
        and computes_as_given(attn)
    )


def project(
    target: Any, diffusion: Any, positions: tuple[torch.Tensor, torch.Tensor], hidden: torch.Tensor, pair: bool
) -> list[Rows]:
    """Of verification rows, whose keys and values are in the cache then, and of hypothesis rows."""
    split = len(positions[0])
    weights = side_by_side(target.qkv_proj, diffusion.qkv_proj) if pair else None
    if weights is None:
        qkv, _ = target.qkv_proj(hidden[:split])
        fresh, _ = diffusion.qkv_proj(hidden[split:])
    else:
        qkv, fresh = pairs.project(hidden, split, weights)
    views = projected(target, qkv, positions[0]), projected(diffusion, fresh, positions[1])
    return rotate(views, diffusion.sizes, diffusion.head_dim, target.rotary_emb, diffusion.eps, _slots(target.attn))


def warm_up(target: Any, diffusion: Any) -> None:
    """Launch what `project` does, for rows whose keys and values go nowhere."""
    nowhere = torch.full((1,), -1, dtype=torch.int64, device=target.rotary_emb.cos_sin_cache.device)
    cache = CacheSlots(*cached_keys_values(target.attn), nowhere)
    rotate_nothing(diffusion, target.rotary_emb, target, cache)


def _slots(attn: Any) -> CacheSlots | None:
    """Where vLLM wants this forward's keys and values; None in a run without a cache."""
    slots = get_forward_context().slot_mapping.get(attn.layer_name)
    return None if slots is None else CacheSlots(*cached_keys_values(attn), slots)


class Attended:
    """Where the rows of both views put what they see in a layer, and what becomes of it."""

    def __init__(self, target: Any, diffusion: Any, rows: Rows, fresh: Rows, pair: bool) -> None:
        self.target, self.diffusion = target, diffusion
        sizes = len(rows[0]), len(fresh[0])
        self.weights = side_by_side(target.o_proj, diffusion.o_proj) if pair else None
        if self.weights is None:
            self.verified, self.drafted = (q.new_empty(q.shape) for q in (rows[0], fresh[0]))
        else:
            self.room = pairs.Room(rows[0], *sizes)
            self.verified, self.drafted = self.room.verified, self.room.drafted

    def results(self) -> torch.Tensor:
        """[rows of both, hidden]"""
        if self.weights is None:
            return results(self.target, self.diffusion, self.verified, self.drafted)
        return _summed(self.target, self.room.results(self.weights))


def results(target: Any, diffusion: Any, verified: torch.Tensor, drafted: torch.Tensor) -> torch.Tensor:
    """[rows of both, hidden]"""
    given = [(one.o_proj, rows, _bias(one.o_proj)) for one, rows in ((target, verified), (diffusion, drafted))]
    if all(is_a_product(o_proj) or multiplies_in_place(o_proj, verified.dtype) for o_proj, _, _ in given):
        out = verified.new_empty(len(verified) + len(drafted), target.o_proj.output_size)
        for (o_proj, rows, bias), part in zip(given, out.split([len(verified), len(drafted)]), strict=True):
            if not is_a_product(o_proj):
                multiply_in_fp8(o_proj, rows, bias, part)
            elif bias is None:
                torch.mm(rows, o_proj.weight.t(), out=part)
            else:
                torch.addmm(bias, rows, o_proj.weight.t(), out=part)
    else:
        out = torch.cat([o_proj.quant_method.apply(o_proj, rows, bias) for o_proj, rows, bias in given])
    return _summed(target, out)


def _summed(target: Any, out: torch.Tensor) -> torch.Tensor:
    """Over the ranks."""
    return tensor_model_parallel_all_reduce(out) if target.o_proj.tp_size > 1 else out


def _bias(o_proj: Any) -> torch.Tensor | None:
    """Added once, and not by every rank."""
    return None if o_proj.tp_rank > 0 else o_proj.bias
