"""Which caches the kernel reads on which GPU."""

from types import SimpleNamespace

import pytest

from tests.rehearsal.gpus import GPUS
from tests.rehearsal.machines import Ask

CACHES = ("auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


def refusals() -> dict[str, str | None]:
    """By `kv_cache_dtype`, why a layer of FlashInfer's has a cache that cannot be read."""
    from vllm_orthrus.engine.attention.blocks import CachedLayer
    from vllm_orthrus.engine.attention.kernel import unreadable

    backend = SimpleNamespace(get_name=lambda: "FLASHINFER")  # not installed where there is no GPU
    layers = {dtype: SimpleNamespace(attn_backend=backend, kv_cache_dtype=dtype, head_size=128) for dtype in CACHES}
    return {dtype: unreadable(CachedLayer(layer, group=0, block_size=16)) for dtype, layer in layers.items()}


@pytest.mark.parametrize("gpu", GPUS)
def test_e4m3_needs_a_gpu_that_converts_it(gpu: str, ask: Ask) -> None:
    refused = {dtype: reason for dtype, reason in ask(gpu, refusals).items() if reason is not None}
    if gpu != "A100":
        assert refused == {}
        return
    assert refused.keys() == {"fp8", "fp8_e4m3"}
    for dtype, reason in refused.items():
        for fact in (f"kv_cache_dtype={dtype}", "8.9", "8.0", "fp8_e5m2"):
            assert fact in reason
