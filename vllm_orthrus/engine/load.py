"""Loading a head's weights beside the target's."""

from typing import Any

import torch
from vllm.logger import init_logger

from vllm_orthrus.engine.view import DiffusionView
from vllm_orthrus.engine.vllm import (
    VllmConfig,
    initialize_single_dummy_weight,
    process_weights_after_loading,
    set_current_vllm_config,
    set_default_torch_dtype,
)
from vllm_orthrus.heads import BaseShape, open_head

logger = init_logger("vllm.orthrus")


def load_view(vllm_config: VllmConfig, target: Any, device: torch.device) -> DiffusionView:
    config, model_config = vllm_config.speculative_config, vllm_config.model_config
    shape = BaseShape.from_config(model_config.hf_text_config)
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(model_config.dtype), device:
        view = DiffusionView(shape, target)
    if vllm_config.load_config.load_format == "dummy":
        for parameter in view.parameters():
            initialize_single_dummy_weight(parameter)
    else:
        head = open_head(config.model, config.revision, config.head_cache)
        view.load_weights(head.tensors())
        _warn_of_nonsense(view, config.model)
    # Linear layers prepare their kernels' layouts here, which vLLM's loader does only for models it built.
    size = sum(parameter.nbytes for parameter in view.parameters())
    process_weights_after_loading(view, model_config, device)
    logger.info(
        "Orthrus head %s: %.2f GiB on this rank, all else is the target's. Blocks of %d rows give %d drafts.",
        config.model,
        size / 2**30,
        config.orthrus_block_size,
        config.num_speculative_tokens,
    )
    return view.eval()


def _warn_of_nonsense(view: DiffusionView, head: str) -> None:
    broken = torch.stack([~parameter.isfinite().all() for parameter in view.parameters()])
    names = [name for (name, _), found in zip(view.named_parameters(), broken.tolist(), strict=True) if found]
    if names:
        logger.warning(
            "Orthrus head %s has %d tensors with values that are not finite, the first of them %s. The text stays "
            "right, but its drafts will hardly be kept, and steps are slower for them. Convert or train the head anew.",
            head,
            len(names),
            names[0],
        )
