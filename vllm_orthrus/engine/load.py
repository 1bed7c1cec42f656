"""Loading a head's weights beside the target's."""

from typing import Any

import torch
from vllm.logger import init_logger

from vllm_orthrus.engine.quantization import keeps_eight_bits
from vllm_orthrus.engine.selector import load_selector
from vllm_orthrus.engine.view import DiffusionView
from vllm_orthrus.engine.vllm import (
    VllmConfig,
    initialize_single_dummy_weight,
    process_weights_after_loading,
    set_current_vllm_config,
    set_default_torch_dtype,
)
from vllm_orthrus.heads import BaseShape, Nonsense, dequantized, find_nonsense, open_head, quantized

logger = init_logger("vllm.orthrus")


def load_view(vllm_config: VllmConfig, target: Any, device: torch.device) -> DiffusionView:
    config, model_config = vllm_config.speculative_config, vllm_config.model_config
    shape = BaseShape.from_config(model_config.hf_text_config)
    quantization = config.orthrus_head_quantization
    kept = quantization if keeps_eight_bits() else None
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(model_config.dtype), device:
        view = DiffusionView(shape, target, kept)
    head = None if config.made_up else open_head(config.model, config.revision, config.head_cache)
    if head is None:
        for parameter in view.parameters():
            initialize_single_dummy_weight(parameter)
    else:
        tensors = head.stored()
        if quantization is not None and head.config.quantization is None:
            # Whole, before ranks take their shares, and by what converts a head: the same weights come of both.
            tensors = quantized((name, tensor.to(device)) for name, tensor in tensors)
        if quantization is not None and kept is None:
            tensors = dequantized(tensors)
        view.load_weights(tensors)
        nonsense = find_nonsense(dequantized(view.named_parameters()))
        view.drafts_nothing = nonsense.drafts_nothing
        useless = "the model is served without drafts" if nonsense.drafts_nothing else "its drafts will hardly be kept"
        _warn_of_nonsense(nonsense, f"head {config.model}", useless)
    view.selector = load_selector(vllm_config, target, head, device)
    if view.selector is not None and head is not None:
        nonsense = find_nonsense(view.selector.named_parameters())
        _warn_of_nonsense(nonsense, "selector", "rows that it spoils draft as the head alone")
    # Linear layers prepare their kernels' layouts here, which vLLM's loader does only for models it built.
    size = sum(parameter.nbytes for parameter in view.parameters())
    process_weights_after_loading(view, model_config, device)
    logger.info(
        "Orthrus head %s%s%s: %.2f GiB on this rank, all else is the target's. Blocks of %d rows give %d drafts.",
        config.model,
        "" if view.selector is None else f" with a selector of rank {view.selector.shape.rank}",
        f" in {quantization}" if kept else f" rounded to {quantization}" if quantization else "",
        size / 2**30,
        config.orthrus_block_size,
        config.num_speculative_tokens,
    )
    cascade = config.cascade_of(None)
    if cascade is not None:
        logger.warning(
            "LOSSY: Orthrus leaves tokens to drafts by %s, for all requests that don't say otherwise.", cascade
        )
    return view.eval()


def _warn_of_nonsense(found: Nonsense, what: str, outcome: str) -> None:
    if str(found):
        logger.warning("Orthrus %s %s. The text stays right; %s. Convert or train it anew.", what, found, outcome)


def drafts_nothing(worker: Any) -> bool:
    """Whether this worker has found a head that no draft can come of."""
    view = getattr(getattr(worker.model_runner, "speculator", None), "model", None)
    return isinstance(view, DiffusionView) and view.drafts_nothing
