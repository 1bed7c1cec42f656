"""All contact with vLLM: what is patched, in which order, and whether it took."""

import logging

from vllm_orthrus.patches import (
    arguments,
    cascades,
    cpu,
    dispatch,
    graphs,
    limits,
    logprobs,
    metrics,
    models,
    modes,
    plans,
)
from vllm_orthrus.patches.registry import Patch, State, apply_all
from vllm_orthrus.patches.versions import SUPPORTED_VLLM, installed_vllm, vllm_is

__all__ = [
    "PATCHES",
    "SUPPORTED_VLLM",
    "WORKER_PATCHES",
    "Patch",
    "State",
    "install",
    "install_in_worker",
    "installed_vllm",
]

PATCHES: list[Patch] = [
    *arguments.PATCHES,
    *cascades.PATCHES,
    *dispatch.PATCHES,
    *limits.PATCHES,
    *metrics.PATCHES,
    *modes.PATCHES,
    *cpu.PATCHES,
]
# Only workers load what these are about.
WORKER_PATCHES: list[Patch] = [
    *metrics.WORKER_PATCHES,
    *graphs.WORKER_PATCHES,
    *logprobs.WORKER_PATCHES,
    *cascades.WORKER_PATCHES,
    *plans.WORKER_PATCHES,
]

# vLLM configures the logger "vllm" and its children, so this is where our messages are seen.
logger = logging.getLogger("vllm.orthrus")

_refused = False


def install() -> bool:
    """Apply every patch that this vLLM needs. False, after one message, if this vLLM is not one we know."""
    global _refused
    if _refused:
        return False
    if not vllm_is(SUPPORTED_VLLM):
        logger.warning(
            "vllm-orthrus works with vLLM %s and found %s: method 'orthrus' is not available, everything else is "
            "unchanged. Install a supported vLLM, or a vllm-orthrus for this one.",
            SUPPORTED_VLLM,
            installed_vllm() or "none",
        )
        _refused = True
        return False
    refused = apply_all(PATCHES)
    if refused:
        logger.warning(
            "vllm-orthrus does not recognise this vLLM %s (%s): method 'orthrus' is not available, everything else "
            "is unchanged. `vllm-orthrus doctor` shows the details.",
            installed_vllm(),
            "; ".join(f"{patch.target}: {patch.problem}" for patch in refused),
        )
        _refused = True
        return False
    models.register()
    return True


def install_in_worker() -> None:
    """A model runner that is not recognised drafts all the same, only without what the patch was to give it."""
    for patch in WORKER_PATCHES:
        if apply_all([patch]):
            logger.warning("vllm-orthrus leaves %s as it is (%s): %s", patch.target, patch.problem, patch.why)
