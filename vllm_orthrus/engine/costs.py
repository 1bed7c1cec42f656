"""What steps of an engine would cost by the roofline, from its model, its device and its settings."""

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from vllm_orthrus.engine.quantization import keeps_eight_bits
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.errors import UserError
from vllm_orthrus.policy.clock import Costs
from vllm_orthrus.policy.cost import Device, Mode, Model, step_seconds
from vllm_orthrus.policy.devices import CPU, DEVICES, find_device

logger = init_logger("vllm.orthrus")

# Bytes of a weight, for the ways of storing them that save reading; all others are read as the model computes.
_STORED = (("fp8", 1.0), ("int8", 1.0), ("awq", 0.56), ("gptq", 0.56), ("fp4", 0.56), ("int4", 0.56))


def estimated_costs(vllm_config: Any) -> Costs:
    shape = DraftShape.of(vllm_config)
    model, device = model_of(vllm_config), device_of()
    rides = who_rides(vllm_config)

    def seconds(drafts: int, requests: int, context: float) -> float:
        every = drafts == shape.drafts
        hypotheses = shape.num_hypotheses(requests) if every and rides(requests) else 0
        block = shape.block if every else drafts
        return step_seconds(device, model, Mode(drafts, block, hypotheses), requests, context)

    return seconds


def who_rides(vllm_config: Any) -> Callable[[int], bool]:
    """Whether all drafts of so many requests come with the verification before."""
    from vllm_orthrus.engine.vllm import CUDAGraphMode  # it imports what is patched before an engine starts

    one_pass, shape = vllm_config.speculative_config.orthrus_passes == "one", DraftShape.of(vllm_config)
    pieces = vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.PIECEWISE  # which have no room for them
    return lambda requests: one_pass and not pieces and shape.num_hypotheses(requests) > 0


def model_of(vllm_config: Any) -> Model:
    """As one rank has it."""
    model, text = vllm_config.model_config, vllm_config.model_config.hf_text_config
    computed = float(model.dtype.itemsize)
    quantization = str(model.quantization or "").lower()
    stored = next((size for name, size in _STORED if name in quantization), computed)
    eight_bits = vllm_config.speculative_config.orthrus_head_quantization is not None and keeps_eight_bits()
    cached = 1.0 if str(vllm_config.cache_config.cache_dtype).startswith("fp8") else computed
    whole = Model(
        text.num_hidden_layers,
        text.hidden_size,
        text.intermediate_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        model.get_head_size(),
        text.vocab_size,
        stored,
        1.0 if eight_bits else computed,
        cached,
        vllm_config.speculative_config.has_selector,
    )
    return whole.share(vllm_config.parallel_config.tensor_parallel_size)


def device_of() -> Device:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return CPU
    name = current_platform.get_device_name()
    try:
        return find_device(name)
    except UserError:
        logger.info("Orthrus has no figures of %s and begins with an A100's; steps that are timed correct them.", name)
        return DEVICES["A100"]
