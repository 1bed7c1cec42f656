"""A head in fp8 on the GPUs that people have: what vLLM computes it with, what it weighs, and how ranks share it."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from tests.rehearsal import fp8_operators
from tests.rehearsal.gpus import GPUS
from tests.rehearsal.machines import Ask
from tests.rehearsal.qwen3 import BASE, configure, load

FP8 = ("orthrus_head_quantization", "fp8")


def chosen() -> dict[str, Any]:
    from vllm_orthrus.engine.costs import model_of

    loaded = load(FP8)
    view = loaded.speculator.model
    schemes = [layer.scheme for attention in view.layers for layer in (attention.qkv_proj, attention.o_proj)]
    kernels = [getattr(scheme, "fp8_linear", None) or scheme.linear_kernel for scheme in schemes]
    return {
        "schemes": {type(scheme).__name__ for scheme in schemes},
        "kernels": {type(kernel).__name__ for kernel in kernels},
        "run uncompiled": sum(type(op).__name__ == "QuantFP8" for op in view._unfused),
        "bytes": sum(parameter.nbytes for parameter in view.parameters()),
        "streamed": model_of(loaded.config).head_weight_bytes,
    }


@pytest.mark.parametrize("gpu", GPUS)
def test_kernels_and_bytes(gpu: str, ask: Ask) -> None:
    """As vLLM chooses for a checkpoint of linear layers that is stored so."""
    multiplies = GPUS[gpu].capability >= (8, 9)
    layers, hidden, kv = BASE["num_hidden_layers"], BASE["hidden_size"], 128 * BASE["num_key_value_heads"]
    weights, scales, norms = hidden * (2 * hidden + 2 * kv), 2 * (hidden + kv), 2 * 128
    assert ask(gpu, chosen) == {
        "schemes": {"CompressedTensorsW8A8Fp8" if multiplies else "CompressedTensorsW8A16Fp8"},
        "kernels": {"CutlassFP8ScaledMMLinearKernel" if multiplies else "MarlinFP8ScaledMMLinearKernel"},
        "run uncompiled": 2 * layers if multiplies else 0,
        "bytes": layers * (weights + (4 if multiplies else 2) * scales + 2 * norms),
        "streamed": 1,
    }


def refusal(options: dict[str, Any], variable: str | None = None) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if variable is not None:
            patch.setenv(variable, "1")
        try:
            configure(dict([FP8]), **options)
        except ValueError as error:
            return str(error)
    return "none"


@pytest.mark.parametrize(
    ("gpu", "options", "variable", "facts"),
    [
        ("H200", {}, None, None),
        ("A100", {}, None, None),
        ("H200", {"dtype": "float32"}, None, ["float32", "bfloat16 or float16"]),
        ("A100", {}, "VLLM_BATCH_INVARIANT", ["VLLM_BATCH_INVARIANT=1", "8.9", "8.0"]),
    ],
)
def test_refused_with_the_reason(
    gpu: str, options: dict[str, Any], variable: str | None, facts: list[str] | None, ask: Ask
) -> None:
    said = ask(gpu, partial(refusal, options, variable))
    if facts is None:
        assert said == "none"
    else:
        assert all(fact in said for fact in ["orthrus_head_quantization='fp8'", "leave it out", *facts])


SMALL = {
    "model_type": "qwen3",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
}


def far_from_whole(ranks: int, fault: str | None = None) -> float:
    """How far the products of all ranks' shares are from those of the whole head, its inputs rounded as vLLM rounds."""
    import torch
    from torch import nn
    from vllm import _custom_ops
    from vllm.config import set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_orthrus.engine.quantization import multiplies_in_place, multiply_in_fp8
    from vllm_orthrus.engine.view import DiffusionView
    from vllm_orthrus.engine.vllm import process_weights_after_loading
    from vllm_orthrus.heads import BaseShape, dequantized, expected_tensors, quantized

    shape = BaseShape.from_config(SMALL)
    torch.manual_seed(0)
    sizes = expected_tensors(shape)
    head = {
        name: torch.randn(size) * torch.logspace(-2, 2, size[0])[(...,) + (None,) * (len(size) - 1)]
        for name, size in sizes.items()
    }
    stored = dict(quantized(head.items()))
    if fault == "scales in another order":
        stored = {name: one.flip(0) if name.endswith("scale") else one for name, one in stored.items()}
    if fault == "one scale for all":
        stored = {name: one.mean().expand_as(one) if name.endswith("scale") else one for name, one in stored.items()}

    class Target(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            attention = nn.Module()
            attention.q_norm = SimpleNamespace(variance_epsilon=1e-6)  # type: ignore[assignment]
            attention.q_size, attention.kv_size = 64 // ranks, 16 * max(1, 2 // ranks)  # type: ignore[assignment]
            layer = nn.Module()
            layer.self_attn = attention
            self.model = nn.Module()
            self.model.layers = nn.ModuleList([layer])

    x, attended = torch.randn(5, 64), torch.randn(5, 64)
    found: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": [], "o": []}
    config = configure(dict([FP8]))
    for rank in range(ranks):
        with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(config):
            patch.setattr(_custom_ops, "scaled_fp8_quant", fp8_operators.quantize_rows)
            for module in (linear, parameter):
                patch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
                patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
            with set_default_torch_dtype(torch.bfloat16):
                view = DiffusionView(shape, Target(), "fp8")
            view.load_weights(stored.items())
            process_weights_after_loading(view, config.model_config, torch.device("cpu"))
            (attention,) = view.layers
            with view.fused():
                qkv, _ = attention.qkv_proj(x.bfloat16())
                share = attended.bfloat16().chunk(ranks, dim=1)[rank]
                out = attention.o_proj.quant_method.apply(attention.o_proj, share.contiguous())
                assert multiplies_in_place(attention.o_proj, torch.bfloat16)
                both = torch.full((2 * len(out), out.shape[1]), torch.nan, dtype=torch.bfloat16)
                multiply_in_fp8(attention.o_proj, share.contiguous(), None, both[len(out) :])
                assert both[len(out) :].equal(out)
                assert both[: len(out)].isnan().all()
        for name, part in zip("qkv", qkv.split(attention.sizes, dim=1), strict=True):
            found[name].append(part)
        found["o"].append(out)
    weights = dict(dequantized(quantized(head.items())))
    worst = 0.0
    for name, given in (("q", x), ("k", x), ("v", x), ("o", attended)):
        whole = given @ weights[f"model.layers.0.self_attn.{name}_proj_diff.weight"].t()
        parts = found[name]
        if name in "kv" and ranks > 2:
            parts = parts[:: ranks // 2]  # those that share a head of the cache
        mine = torch.stack(parts).sum(0) if name == "o" else torch.cat(parts, dim=1)
        error = (mine - whole).pow(2).mean(0).sqrt() / whole.pow(2).mean(0).sqrt()  # by channel
        worst = max(worst, float(error.max()))
    return worst


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_scales_go_where_their_weights_go(ranks: int, ask: Ask) -> None:
    """Channels here differ by four orders of magnitude. What is left is the rounding of inputs to three bits."""
    assert ask("H200", far_from_whole, ranks) < 0.15
    assert ask("H200", far_from_whole, ranks, "scales in another order") > 1
    assert ask("H200", far_from_whole, ranks, "one scale for all") > 1
