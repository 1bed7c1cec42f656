"""Which attention blocks get: as the settings say, and as the target's cache allows."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_orthrus.engine.attention.blocks import BlockAttention, CachedLayer
from vllm_orthrus.engine.attention.gather import GatherAttention, ungatherable
from vllm_orthrus.engine.attention.kernel import KernelAttention, make_workspace, unreadable
from vllm_orthrus.engine.attention.write_through import CheckedAttention, WriteThroughAttention
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.kernels.forms import runs_triton

logger = init_logger("vllm.orthrus")


def wanted_path(config: Any, device: torch.device) -> str:
    """ "kernel", "gather" or "write_through"; whether a cache can be read that way is another question."""
    wanted: str = config.orthrus_attention
    if wanted == "auto":
        wanted = "kernel" if runs_triton(device) else "gather"
    return wanted


def workspace_for(config: Any, shape: DraftShape, attn: Any, device: torch.device) -> torch.Tensor | None:
    """Memory that the kernel needs, if it is wanted: taken before vLLM measures what is left for its cache."""
    if wanted_path(config, device) != "kernel":
        return None
    verified = shape.verified if config.orthrus_verification == "fused" else 0

    def passes() -> Iterator[tuple[int, int]]:
        """Requests, and rows of each, in every pass that the kernel may attend in."""
        for num_reqs in range(1, shape.at_once + 1):
            yield from ((num_reqs, width) for width in shape.widths)
        if config.orthrus_passes == "one":
            for num_reqs in range(1, shape.most_carried + 1):
                yield num_reqs, verified + shape.block * shape.num_hypotheses(num_reqs)

    return make_workspace(attn, passes(), device)


def choose_attention(
    config: Any,
    layers: list[CachedLayer],
    workspace: torch.Tensor | None,
    write_through: Callable[[], WriteThroughAttention],
    device: torch.device,
) -> BlockAttention:
    wanted = wanted_path(config, device)
    reads = {"kernel": unreadable, "gather": ungatherable}.get(wanted)
    problem = None if reads is None else next(filter(None, map(reads, layers)), None)
    if problem is not None and config.orthrus_attention != "auto":
        raise ValueError(
            f"orthrus_attention={wanted!r} cannot read this cache: {problem}. Leave orthrus_attention at 'auto'."
        )
    if problem is not None:
        logger.info("Orthrus drafts through the target's own attention layers: %s.", problem)
        wanted = "write_through"
    if wanted == "write_through":
        return write_through()
    path: BlockAttention
    if wanted == "kernel":
        assert workspace is not None
        path = KernelAttention(layers, workspace)
    else:
        path = GatherAttention(layers)
    return CheckedAttention(path, write_through()) if config.orthrus_check_attention else path
