"""The runner from its construction to a cache, and our passes, on "cuda": devices, dtypes, shapes and launches."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.rehearsal.machines import Ask
from tests.rehearsal.qwen3 import configure, meet

LAYERS = 2


def cache_of(runner: Any, blocks: int) -> Any:
    """Layers outermost, as engine cores plan it for FlashAttention."""
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheTensor

    specs = runner.get_kv_cache_spec()
    spec, layers = next(iter(specs.values())), list(specs)
    page = spec.page_size_bytes
    memory = KVCacheTensor(page * blocks * len(layers), layers, layer_stride=page * blocks, block_stride=page)
    config = KVCacheConfig(blocks, [memory], [KVCacheGroupSpec(layers, spec)])
    config.kv_cache_layout = runner.vllm_config.cache_config.kv_cache_layout = "LBNHC"
    return config


def start(fault: str | None = None, settings: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Launches of each stage, with `settings` of the head's and `options` of the engine's."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.config.compilation import CUDAGraphMode
    from vllm.forward_context import set_forward_context
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.workspace import init_workspace_manager

    from tests.rehearsal.fake_cuda import fake_cuda
    from tests.rehearsal.fp8_operators import products_in_fp8
    from vllm_orthrus.engine.onepass.drafting import Turn

    # Nothing is compiled: a compiler would trace through tensors that are traced already.
    config = configure(settings, enforce_eager=True, hf_overrides={"num_hidden_layers": LAYERS}, **options)
    stages: dict[str, Any] = {}
    with set_current_vllm_config(config):
        meet()
        with fake_cuda() as launched, products_in_fp8(launched):

            def stage(name: str) -> None:
                stages[name] = dict(Counter(launched))
                launched.clear()

            device = torch.device("cuda", 0)
            init_workspace_manager(device)
            runner = GPUModelRunner(config, device)
            runner.load_model()
            speculator = runner.speculator
            if fault == "rows on the host":
                speculator.rows.input_ids = torch.zeros(speculator.rows.input_ids.shape, dtype=torch.int64)
            if fault == "weights in float32":
                projection = speculator.model.layers[1].o_proj
                wide = torch.empty(projection.weight.shape, dtype=torch.float32, device=device)
                projection.weight = torch.nn.Parameter(wide, requires_grad=False)
            runner.profile_run()
            stage("profile")

            runner.initialize_kv_cache(cache_of(runner, blocks=1000))
            stage("cache")
            draft_pass = speculator.draft_pass
            context = draft_pass.attention.begin(speculator.rows.blocks(4, 4096))
            draft_pass.compute(4, context, speculator.shape.block)
            stage("draft")
            speculator.drafting.finish(4, Turn(np.arange(4), 4, speculator.shape.drafts))
            stage("behind it")
            speculator.drafting.match_and_draft(4)
            stage("outcome")

            tokens = 4 * speculator.shape.verified
            rows = speculator.drafting.one_pass.dummy(4, tokens)
            speculator.drafting.one_pass.announce(CUDAGraphMode.NONE, capturing=True)
            slots = dict.fromkeys(config.compilation_config.static_forward_context, torch.zeros(tokens, device=device))
            with set_forward_context({}, config, tokens, slot_mapping=slots):
                ids, positions = runner.input_buffers.input_ids[:tokens], runner.input_buffers.positions[:tokens]
                hidden = runner.model(ids, positions, None, None, hypotheses=rows)
            assert hidden.shape == (tokens, 4096) and hidden.is_cuda and hidden.dtype == torch.bfloat16
            stage("one pass")
            stages["paired"] = set(speculator.drafting.paired), all(map(neighbours, targets_and_views(speculator)))
    return stages


def targets_and_views(speculator: Any) -> list[tuple[Any, Any]]:
    layers = zip(speculator.model.target.model.layers, speculator.model.layers, strict=True)
    return [
        (getattr(target.self_attn, name), getattr(view, name))
        for target, view in layers
        for name in ("qkv_proj", "o_proj")
    ]


def neighbours(pair: tuple[Any, Any]) -> bool:
    from vllm_orthrus.engine.onepass.pairs import side_by_side

    return side_by_side(*pair) is not None


def test_every_stage_on_cuda(ask: Ask) -> None:
    stages = ask("A100", start)
    each = dict.fromkeys(("_norm_rotate_kernel", "_attend_kernel", "_merge_kernel"), LAYERS)
    assert stages["draft"] == stages["one pass"] == each
    assert {"_attend_kernel", "_merge_kernel"}.isdisjoint(stages["profile"]), "there is no cache yet"
    assert stages["paired"] == ({1}, True)


def test_a_head_in_fp8_on_cuda(ask: Ask) -> None:
    """Of each layer two inputs are rounded by vLLM's own kernel, all else is launched as ever, no result is moved."""
    stages = ask("H200", start, None, {"orthrus_head_quantization": "fp8"})
    plain = ask("H200", start)
    more = dict.fromkeys(("scaled_fp8_quant", "cutlass_scaled_mm"), 2 * LAYERS)
    assert more.keys().isdisjoint(plain["draft"])
    assert stages["draft"] == plain["draft"] | more
    in_place = dict.fromkeys(("cutlass_scaled_mm", "multiply_in_fp8"), LAYERS)
    assert stages["one pass"] == plain["one pass"] | more | in_place
    assert (plain["paired"], stages["paired"]) == (({1, 2, 4}, True), (set(), False))


def complaint(fault: str) -> str:
    try:
        start(fault)
    except Exception as error:  # not all of PyTorch's can travel between processes
        return str(error)
    return "none"


@pytest.mark.parametrize(("fault", "message"), [("rows on the host", "cpu"), ("weights in float32", "float32")])
def test_planted_faults(fault: str, message: str, ask: Ask) -> None:
    assert message in ask("A100", complaint, fault)
