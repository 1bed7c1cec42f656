"""Path E: our own kernel reads the target's cache in place; the block's keys and values go nowhere else."""

from collections.abc import Sequence

import torch
from vllm.platforms import current_platform

from vllm_orthrus.attention import BlockAttention, Blocks, CachedLayer, ForwardInputs, cached_keys_values
from vllm_orthrus.kernels.dual_view_attention import (
    PagedCache,
    Plan,
    Verification,
    dual_view_attention,
    make_plan,
    workspace_size,
)

# Backends that keep keys and values of one head side by side, so that strides say everything about the layout.
READABLE = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER", "FLEX_ATTENTION", "CPU_ATTN")
PLAIN = ("auto", "float16", "bfloat16", "float32")
FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def unreadable(layer: CachedLayer) -> str | None:
    """Why the kernel cannot read this layer's cache, or None."""
    attn = layer.attn
    backend = attn.attn_backend.get_name()
    if backend not in READABLE:
        return f"attention backend {backend} keeps its cache in a form of its own"
    if attn.kv_cache_dtype not in PLAIN and attn.kv_cache_dtype not in FP8:
        return f"kv_cache_dtype={attn.kv_cache_dtype} stores scales between the values"
    if FP8.get(attn.kv_cache_dtype) == torch.float8_e4m3fn and (capability := _capability_below(8, 9)) is not None:
        return (
            f"kv_cache_dtype={attn.kv_cache_dtype} holds e4m3, which Triton converts from compute capability 8.9 on, "
            f"and this GPU has {capability}; fp8_e5m2 can be read"
        )
    if backend == "CPU_ATTN" and (
        attn.kv_cache_dtype not in PLAIN or getattr(attn, "isa", "vec") not in ("vec", "vec16")
    ):
        return "this CPU's attention packs its cache for matrix tiles"
    if attn.head_size & (attn.head_size - 1) or not 16 <= attn.head_size <= 256:
        return f"head_dim={attn.head_size} is not a power of two up to 256"
    return None


def _capability_below(major: int, minor: int) -> str | None:
    """What an NVIDIA GPU has that has less than this."""
    if not current_platform.is_cuda() or current_platform.has_device_capability((major, minor)):
        return None
    return str(current_platform.get_device_capability().as_version_str())


class KernelAttention(BlockAttention):
    supports_graphs = True

    def __init__(
        self, layers: list[CachedLayer], rows_by_count: Sequence[int], device: torch.device, verified: int = 0
    ) -> None:
        """rows_by_count: block rows per request when there are 1, 2, ... requests; 0 where there is no such pass.

        verified: the most verification rows of a request that share a launch with them.
        """
        self.layers = layers
        self.device = device
        self.verified = verified
        self.plans: dict[tuple[int, int], Plan] = {}
        # One workspace for all layers and all batch sizes: passes never overlap.
        shapes = [(num_reqs, rows) for num_reqs, rows in enumerate(rows_by_count, 1) if rows]
        needed = [workspace_size(self._make_plan(num_reqs, rows, None)) for num_reqs, rows in shapes]
        self.workspace = torch.empty(max(needed, default=0), dtype=torch.float32, device=device)

    def _make_plan(self, num_reqs: int, rows: int, workspace: torch.Tensor | None) -> Plan:
        attn = self.layers[0].attn
        stored = attn.kv_cache_torch_dtype
        return make_plan(
            num_reqs,
            self.verified + rows,
            attn.num_heads,
            attn.num_kv_heads,
            attn.head_size,
            attn.dtype,
            FP8.get(attn.kv_cache_dtype, stored),
            self.device,
            buffer=workspace,
            allocate=workspace is not None,
        )

    def begin(self, blocks: Blocks, capturing: bool = False) -> ForwardInputs:
        self._blocks = blocks
        num_reqs, rows = blocks.positions.shape
        if (num_reqs, rows) not in self.plans:
            self.plans[num_reqs, rows] = self._make_plan(num_reqs, rows, self.workspace)
        self._plan = self.plans[num_reqs, rows]
        return ForwardInputs()

    def __call__(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        verification: Verification | None = None,
    ) -> torch.Tensor:
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
        out = torch.empty_like(q)
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
        return out


def _fp8(kv_cache_dtype: str) -> torch.dtype:
    """vLLM keeps fp8 caches as bytes; what e4m3 means is the platform's."""
    dtype: torch.dtype = FP8[kv_cache_dtype]
    return current_platform.fp8_dtype() if dtype == torch.float8_e4m3fn else dtype
