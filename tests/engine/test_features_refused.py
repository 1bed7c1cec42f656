"""What does not go together says so before anything is loaded, and what vLLM itself refuses is not ours to allow."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from tests.engine import checkpoints
from tests.engine.conftest import Checkpoints, StartEngine
from tests.engine.harness import prompts

Refusal = Callable[[str], AbstractContextManager[None]]


@pytest.fixture
def refusal(record_property: Callable[[str, object], None]) -> Refusal:
    """Expects an error that says this, and keeps what it says for the table."""

    @contextmanager
    def refuses(match: str) -> Iterator[None]:
        with pytest.raises((ValueError, RuntimeError, VLLMValidationError), match=match) as caught:
            yield
        said = str(caught.value)
        wrapped = re.search(r"Value error, (.*?)(?: \[type=|$)", said, re.DOTALL)
        words = (wrapped[1] if wrapped else said).replace("\n", " ")
        record_property("refusal", re.sub(r"/\S*/", "", words))

    return refuses


def build(model: Path, speculative: dict[str, Any] | None, **options: Any) -> VllmConfig:
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128}
    return EngineArgs(model=str(model), speculative_config=speculative, **settings | options).create_engine_config()


def orthrus(tiny: Checkpoints) -> dict[str, Any]:
    return {"method": "orthrus", "model": str(tiny.block_head)}


@pytest.mark.feature("LoRA", "refused")
def test_lora(tiny: Checkpoints, refusal: Refusal) -> None:
    with refusal("enable_lora=True is not supported"):
        build(tiny.base, orthrus(tiny), enable_lora=True)


@pytest.mark.feature("weights offloaded and prefetched", "refused")
def test_prefetched_weights(tiny: Checkpoints, refusal: Refusal) -> None:
    """vLLM fetches the next layer's where a layer is called whole: without, layers would meet each other's weights."""
    with refusal("offload_group_size=2 is not supported"):
        build(tiny.base, orthrus(tiny), offload_group_size=2)


@pytest.mark.feature("pipeline parallelism", "refused")
def test_pipeline_parallelism(tiny: Checkpoints, refusal: Refusal) -> None:
    with refusal("pipeline_parallel_size=2 is not supported"):
        build(tiny.base, orthrus(tiny), pipeline_parallel_size=2)


@pytest.mark.feature("context parallelism", "refused")
def test_context_parallelism(tiny: Checkpoints, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM refuses it for this base and on this platform, too, so it is asked here without its own checks."""
    plain = build(tiny.base, None)
    monkeypatch.setattr(plain.parallel_config, "decode_context_parallel_size", 2)
    engine = EngineArgs(model=str(tiny.base), speculative_config=orthrus(tiny))
    with refusal("decode_context_parallel_size=2 is not supported"):
        engine.create_speculative_config(plain.model_config, plain.parallel_config)


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(checkpoints.CONFIG | changes))
    return folder


@pytest.mark.feature("sliding windows", "refused")
def test_sliding_windows(tiny: Checkpoints, refusal: Refusal, tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    with refusal("full attention in every layer"):
        build(write_config(tmp_path / "base", **window), orthrus(tiny))


@pytest.mark.feature("mixture of experts", "refused")
def test_mixture_of_experts(tiny: Checkpoints, refusal: Refusal, tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    experts |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}
    with refusal("model_type='qwen3_moe' is not supported"):
        build(write_config(tmp_path / "base", **experts), orthrus(tiny))


@pytest.mark.feature("pooling models with method orthrus", "refused")
def test_pooling(tiny: Checkpoints, refusal: Refusal) -> None:
    with refusal("pooling"):
        build(tiny.base, orthrus(tiny), runner="pooling")


@pytest.mark.feature("pooling models beside the plugin")
def test_pooling_without_the_method(tiny: Checkpoints) -> None:
    """The embedding is that of transformers: the last hidden state, normalized."""
    checkpoints.write_tokenizer(tiny.base)
    model = LLM(
        str(tiny.base),
        runner="pooling",
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_batched_tokens=128,
        max_num_seqs=4,
        kv_cache_memory_bytes=16 << 20,
    )
    given = prompts(3)
    found = [
        one.outputs.data
        for one in model.encode(
            [{"prompt_token_ids": tokens} for tokens in given], pooling_task="embed", use_tqdm=False
        )
    ]
    model.llm_engine.engine_core.shutdown()
    reference = AutoModel.from_pretrained(tiny.base).float().eval()
    with torch.no_grad():
        hidden = [reference(torch.tensor([tokens])).last_hidden_state[0, -1] for tokens in given]
    for mine, theirs in zip(found, hidden, strict=True):
        torch.testing.assert_close(mine, torch.nn.functional.normalize(theirs, dim=0), atol=1e-3, rtol=1e-3)


# What vLLM refuses whatever the method


@pytest.mark.parametrize("method", ["orthrus", "ngram"])
@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({"min_p": 0.1}, marks=pytest.mark.feature("min_p", "stock")),
        pytest.param({"logit_bias": {5: 1.0}}, marks=pytest.mark.feature("logit_bias", "stock")),
    ],
    ids=lambda sampling: next(iter(sampling)),
)
def test_sampling_that_vllm_does_not_verify(
    sampling: dict[str, Any], method: str, tiny: Checkpoints, refusal: Refusal
) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    config = build(tiny.base, orthrus(tiny) if method == "orthrus" else ngram)
    with refusal("not yet supported with speculative decoding"):
        SamplingParams(temperature=0.7, **sampling).verify(
            config.model_config, config.speculative_config, config.structured_outputs_config, None
        )


@pytest.mark.feature("sleep levels 1 and 2", "stock")
@pytest.mark.parametrize("drafting", [True, False])
def test_sleeping_deeper(drafting: bool, tiny: Checkpoints, refusal: Refusal) -> None:
    """Level 1 moves weights off the device, so on a CPU no engine has it, with drafts or without."""
    with refusal("[Ss]leep mode is not supported"):
        build(tiny.base, orthrus(tiny) if drafting else None, enable_sleep_mode=True)


@pytest.mark.feature("fp8 targets, quantized while loading", "stock")
@pytest.mark.parametrize("drafting", [True, False])
def test_fp8_targets(drafting: bool, start: StartEngine, tiny: Checkpoints, refusal: Refusal) -> None:
    """The CPU builds lack the kernel that quantizes."""
    with refusal("static_scaled_fp8_quant"):
        start(orthrus(tiny) if drafting else None, quantization="fp8", dtype="bfloat16")
