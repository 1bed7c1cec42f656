"""Qwen3-8B and its head as vLLM is configured for them. For processes that are where a GPU is."""

import json
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

BASE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
BLOCK, MASK = 32, 151669


def configure(settings: dict[str, Any] | None = None, usage: str = "OPENAI_API_SERVER", **options: Any) -> Any:
    """The `VllmConfig` that `vllm serve` builds, with `settings` of the head's and `options` of the engine's."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from vllm_orthrus.heads import HeadConfig

    with tempfile.TemporaryDirectory() as folder:
        base, head = Path(folder) / "base", Path(folder) / "head"
        facts = HeadConfig.for_base(BASE, BLOCK, MASK, "Qwen/Qwen3-8B").to_json(torch.bfloat16)
        for place, content in ((base, BASE), (head, facts)):
            place.mkdir()
            (place / "config.json").write_text(json.dumps(content))
        speculative = {"method": "orthrus", "model": str(head)} | (settings or {})
        arguments = EngineArgs(
            model=str(base),
            skip_tokenizer_init=True,
            load_format="dummy",
            speculative_config=speculative,
            **options,
        )
        return arguments.create_engine_config(UsageContext[usage])


class Loaded(NamedTuple):
    """What a worker has when it knows its cache, all on PyTorch's meta device."""

    config: Any
    attention: list[Any]  # the target's layers
    speculator: Any
    support: Any  # for graphs, of the target's attention
    mode: Any  # of graphs, as vLLM resolves it
    target_graphs: Any


@cache
def meet() -> None:
    """The process groups of a single worker. Only where a configuration is set."""
    from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment

    with tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/meet", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)


@cache
def load(*settings: tuple[str, Any]) -> Loaded:
    """Target and head, in the order in which vLLM's worker and runner do it; with these settings of the head's."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.worker.gpu import spec_decode
    from vllm.v1.worker.gpu.attn_utils import init_attn_backend
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    config, device = configure(dict(settings)), torch.device("meta")
    most, drafts = config.scheduler_config.max_num_seqs, config.speculative_config.num_speculative_tokens
    with set_current_vllm_config(config):
        meet()
        with set_default_torch_dtype(config.model_config.dtype), device:
            model = initialize_model(config)
        speculator: Any = spec_decode.init_speculator(config, device, None)
        speculator.load_model(model)
        attention = config.compilation_config.static_forward_context
        specs = [layer.get_kv_cache_spec(config) for layer in attention.values()]
        cache_config = KVCacheConfig(1000, [], [KVCacheGroupSpec(list(attention), specs[0])])
        groups, support, _ = init_attn_backend(cache_config, config, torch.device("cpu"))
        blocks = config.model_config.max_model_len // specs[0].block_size
        table = torch.zeros(most, blocks, dtype=torch.int32, device=device)
        tables = SimpleNamespace(block_sizes=[specs[0].block_size], input_block_tables=[table])
        speculator.set_attn(None, cache_config, tables, None, groups)
        mode = resolve(config, support, cache_config)
        target_graphs = ModelCudaGraphManager(config, device, mode, decode_query_len=1 + drafts)
        speculator.init_cudagraph_manager(mode)
    for manager in filter(None, (target_graphs, speculator.graphs, speculator.outcome_graphs)):
        manager.graphs = dict.fromkeys(graph for graphs in manager._capture_descs.values() for graph in graphs)
        manager._graphs_captured = True  # as after a capture, which needs the device
    return Loaded(config, list(attention.values()), speculator, support, mode, target_graphs)


def verification_graphs(config: Any, mode: Any) -> list[Any]:
    """Of whole verifications, as planned where graphs have this mode."""
    import torch
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    verified = 1 + config.speculative_config.num_speculative_tokens
    manager = ModelCudaGraphManager(config, torch.device("meta"), mode, decode_query_len=verified)
    return list(manager._capture_descs.get(CUDAGraphMode.FULL, ()))


def resolve(config: Any, support: Any, cache_config: Any) -> Any:
    """The mode of graphs that the runner hands to its managers and to the speculator."""
    return config.compilation_config.resolve_cudagraph_mode_and_sizes(
        support.min_cg_support,
        support.min_cg_attn_backend,
        1 + config.speculative_config.num_speculative_tokens,
        use_v2_model_runner=True,
        kv_cache_config=cache_config,
        max_num_reqs=config.scheduler_config.max_num_seqs,
    )
