"""The kernel path: our own kernel reads the target's cache in place; the block's keys and values go nowhere else."""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.platforms import current_platform

from vllm_orthrus.engine.attention.blocks import BlockAttention, Blocks, CachedLayer, ForwardInputs
from vllm_orthrus.engine.attention.cache import PLAIN, cached_keys_values, packed
from vllm_orthrus.kernels.dual_view_attention import (
    PagedCache,
    Plan,
    Verification,
    dual_view_attention,
    make_plan,
    workspace_size,
)
from vllm_orthrus.kernels.forms import wanted_form

FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def unreadable(layer: CachedLayer) -> str | None:
    """Why the kernel cannot read this layer's cache, or None."""
    attn = layer.attn
    if attn.kv_cache_dtype not in PLAIN and attn.kv_cache_dtype not in FP8:
        return f"kv_cache_dtype={attn.kv_cache_dtype} stores scales between the values"
    if FP8.get(attn.kv_cache_dtype) == torch.float8_e4m3fn and (capability := _capability_below(8, 9)) is not None:
        return (
            f"kv_cache_dtype={attn.kv_cache_dtype} holds e4m3, which Triton converts from compute capability 8.9 on, "
            f"and this GPU has {capability}; fp8_e5m2 can be read"
        )
    if problem := packed(attn):
        return problem
    if attn.head_size & (attn.head_size - 1) or not 16 <= attn.head_size <= 256:
        return f"head_dim={attn.head_size} is not a power of two up to 256"
    return None


def make_workspace(attn: Any, passes: Iterable[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """For passes of so many requests with so many rows each. One serves all layers and passes: they never overlap."""
    needed = [workspace_size(_plan(attn, num_reqs, rows, device)) for num_reqs, rows in passes]
    return torch.empty(max(needed, default=0), dtype=torch.float32, device=device)


def _plan(attn: Any, num_reqs: int, rows: int, device: torch.device, workspace: torch.Tensor | None = None) -> Plan:
    return make_plan(
        num_reqs,
        rows,
        attn.num_heads,
        attn.num_kv_heads,
        attn.head_size,
        attn.dtype,
        FP8.get(attn.kv_cache_dtype, attn.kv_cache_torch_dtype),
        device,
        buffer=workspace,
        allocate=workspace is not None,
    )


def _capability_below(major: int, minor: int) -> str | None:
    """What an NVIDIA GPU has that has less than this."""
    if not current_platform.is_cuda() or current_platform.has_device_capability((major, minor)):
        return None
    return str(current_platform.get_device_capability().as_version_str())


class KernelAttention(BlockAttention):
    takes_any_width = True

    def __init__(self, layers: list[CachedLayer], workspace: torch.Tensor, verified: int = 0) -> None:
        """workspace: from `make_workspace`, of at least what any pass of this object needs.

        verified: the most verification rows of a request that share a launch with its block rows.
        """
        self.layers, self.workspace, self.verified = layers, workspace, verified
        self.supports_graphs = wanted_form() != "torch"  # the twin reads lengths on the host
        self.plans: dict[tuple[int, int], Plan] = {}

    def begin(self, blocks: Blocks, capturing: bool = False) -> ForwardInputs:
        self._blocks = blocks
        num_reqs, rows = blocks.positions.shape
        if (num_reqs, rows) not in self.plans:
            attn = self.layers[0].attn
            self.plans[num_reqs, rows] = _plan(
                attn, num_reqs, self.verified + rows, self.workspace.device, self.workspace
            )
        self._plan = self.plans[num_reqs, rows]
        return ForwardInputs()

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        self.into(out, layer, q, k, v)
        return out

    def into(
        self,
        out: torch.Tensor,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        verification: Verification | None = None,
    ) -> None:
        cached, blocks = self.layers[layer], self._blocks
        attn = cached.attn
        dim = attn.head_size
        keys, values = cached_keys_values(attn)
        scaled = attn.kv_cache_dtype in FP8
        if scaled:
            stored = _fp8(attn.kv_cache_dtype)
            keys, values = keys.view(stored), values.view(stored)
        cache = PagedCache(
            keys,
            values,
            blocks.block_tables[cached.group],
            cached.block_size,
            attn._k_scale if scaled else None,
            attn._v_scale if scaled else None,
        )
        dual_view_attention(
            q.view(len(q), -1, dim),
            k.view(len(k), -1, dim),
            v.view(len(v), -1, dim),
            cache,
            blocks.prefix_lengths,
            attn.impl.scale,
            out=out.view(len(q), -1, dim),
            plan=self._plan,
            verification=verification,
        )


def _fp8(kv_cache_dtype: str) -> torch.dtype:
    """vLLM keeps fp8 caches as bytes; what e4m3 means is the platform's."""
    dtype: torch.dtype = FP8[kv_cache_dtype]
    return current_platform.fp8_dtype() if dtype == torch.float8_e4m3fn else dtype
