"""`vllm serve Qwen/Qwen3-8B` with its head, on the GPUs that people have."""

from functools import partial
from typing import Any

import pytest

from tests.rehearsal.gpus import GPUS
from tests.rehearsal.machines import Ask
from tests.rehearsal.qwen3 import configure, load

# Requests, those that may run at a time if fewer, and tokens per step: as without drafts, by the GPU's name and memory.
SERVING = {
    "A100": (256, None, 2048),
    "H100": (1024, None, 8192),
    "H200": (1024, None, 8192),
    "RTX 4090": (256, None, 2048),
}
CAPTURED = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]


def configuration() -> dict[str, Any]:
    from vllm.platforms import current_platform

    from vllm_orthrus.patches import PATCHES, State
    from vllm_orthrus.patches.cpu import interpreter_enabled

    config = configure()
    compilation, scheduler, ours = config.compilation_config, config.scheduler_config, config.speculative_config
    return {
        "platform": type(current_platform).__name__,
        "mode": compilation.cudagraph_mode.name,
        "captured": compilation.cudagraph_capture_sizes,
        "limits": (scheduler.max_num_seqs, scheduler.max_num_active_seqs, scheduler.max_num_batched_tokens),
        "asynchronous": scheduler.async_scheduling,
        "ours": (ours.orthrus_block_size, ours.num_speculative_tokens, ours.orthrus_passes, ours.orthrus_attention),
        "modes": ours.orthrus_modes,
        "runner": config.use_v2_model_runner,
        "interpreter": interpreter_enabled(),
        "patches": {patch.state for patch in PATCHES if patch.applies()} == {State.APPLIED},
    }


@pytest.mark.parametrize("gpu", GPUS)
def test_serving_with_defaults(gpu: str, ask: Ask) -> None:
    assert ask(gpu, configuration) == {
        "platform": "NvmlCudaPlatform",
        "mode": "FULL_AND_PIECEWISE",
        "captured": CAPTURED,
        "limits": SERVING[gpu],
        "asynchronous": True,
        "ours": (16, 15, "one", "auto"),
        "modes": [0, 3, 7, 14, 15],
        "runner": True,
        "interpreter": False,
        "patches": True,
    }


def modes(**settings: Any) -> list[int] | None:
    found: list[int] | None = configure(settings).speculative_config.orthrus_modes
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"orthrus_passes": "one"}, None),
        ({"orthrus_passes": "two"}, None),
        ({"orthrus_modes": []}, []),
        ({"orthrus_attention": "write_through"}, [0, 3, 7, 15]),  # which cannot be in one pass
        ({"num_speculative_tokens_per_batch_size": [(1, 8, 15), (9, 1024, 3)]}, None),
    ],
)
def test_modes_are_a_default_that_gives_way(settings: dict[str, Any], expected: list[int] | None, ask: Ask) -> None:
    assert ask("H200", partial(modes, **settings)) == expected


def chosen() -> dict[str, Any]:
    """What target and head choose once they are loaded."""
    loaded = load()
    speculator = loaded.speculator
    return {
        "target": {layer.attn_backend.get_name() for layer in loaded.attention},
        "support": loaded.support.min_cg_support.name,
        "mode": loaded.mode.name,
        "draft passes": type(speculator.draft_pass.attention).__name__,
        "hypotheses": type(speculator.drafting.one_pass.attention.blocks).__name__,
        "graphs": (bool(speculator.graphs.graphs), bool(speculator.outcome_graphs.graphs)),
    }


@pytest.mark.parametrize("gpu", GPUS)
def test_kernels_and_graphs(gpu: str, ask: Ask) -> None:
    assert ask(gpu, chosen) == {
        "target": {"FLASH_ATTN"},
        "support": "ALWAYS" if GPUS[gpu].capability[0] == 9 else "UNIFORM_BATCH",  # FlashAttention 3 or 2
        "mode": "FULL_AND_PIECEWISE",
        "draft passes": "KernelAttention",
        "hypotheses": "KernelAttention",
        "graphs": (True, True),
    }
