"""Engines of ours, started as on a GPU, and what two requests have them launch: by part of a step, layer by layer."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from vllm.model_executor.layers import utils

from tests.engine.conftest import one_pass
from tests.engine.harness import Engine, prompts
from tests.rehearsal.launch_count import LaunchCount, Part
from vllm_orthrus.engine.onepass import pairs
from vllm_orthrus.engine.onepass.drafting import OnePassDrafting
from vllm_orthrus.kernels import dual_view_plan
from vllm_orthrus.kernels.dual_view_plan import Target
from vllm_orthrus.kernels.forms import SETTING
from vllm_orthrus.policy.devices import DEVICES

T = TypeVar("T")
# Our attention is two launches wherever it cuts prefixes into splits; here a GPU so small that it can be interpreted.
GPU = Target(False, 99 * 1024, 24)

LAYER, REST = "a layer of a verification with hypotheses", "that forward, besides its layers"
DRAFT_LAYER, DRAFT_REST = "a layer of a draft pass", "that pass, besides its layers"
BEFORE, LOGITS = "before a verification: the hypotheses' rows", "beside the product of a verification's logits"
OUTCOME, BESIDE_OUTCOME = "behind a verification: taking up its outcome", "behind a verification, besides that"
AROUND = "around a draft pass"
ONCE = {"orthrus_vocabulary": "once"}  # as on a GPU
# In one pass, in one pass with fused verification, in two.
KINDS: tuple[dict[str, Any], ...] = (ONCE, ONCE | {"orthrus_verification": "fused"}, {"orthrus_passes": "two"})


def leave_as_loaded(layer: Any, remove_weight: bool) -> None:
    """As a GPU does, where a CPU has its products in a form of their own."""
    layer.cpu_linear = torch.nn.functional.linear


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Engines that are started from now on."""
    patch.setenv(SETTING, "triton")
    patch.setattr(dual_view_plan, "target_of", lambda device: GPU)
    join_as_on_a_gpu(patch)


def join_as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Weights lie as they were loaded, and both views' beside each other."""
    patch.setattr(utils, "dispatch_cpu_unquantized_gemm", leave_as_loaded)
    patch.setattr(pairs, "device_of", lambda: DEVICES["H200"])


def settings(kind: int, head: Any) -> dict[str, Any]:
    few = {"orthrus_block_size": 5, "num_speculative_tokens": 4, "orthrus_hypotheses": 3, "orthrus_rows": 96}
    return one_pass(head, **few, **KINDS[kind])


def count(engine: Engine, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """What two requests have launched, from their prompts on."""
    speculator = engine.runner.speculator
    counted = LaunchCount(speculator.model.target)
    with patch.context() as noting:
        counted.note(noting, speculator, "propose")
        counted.note(noting, speculator.draft_pass, "compute")
        if isinstance(speculator.drafting, OnePassDrafting):
            counted.note(noting, speculator.drafting, "match_and_draft")
            counted.note(noting, speculator.drafting.logits, "compute_logits")
            for name in ("prepare", "forward_with_rows"):
                counted.note(noting, speculator.drafting.one_pass, name)
        with counted.counting(noting):
            engine.run(prompts(2, shortest=7), 4)
    return dict(summed_up(counted.parts))


def summed_up(parts: dict[str, list[Part]]) -> Iterator[tuple[str, int]]:
    forwards, drafts = parts.get("forward_with_rows"), parts["compute"]
    # A newer vLLM asks for no drafts in a step that it knows to be the last.
    proposals = [len(part.launches) for part in parts["propose"] if part.launches]
    if forwards:
        outcome = same(len(part.launches) for part in parts["match_and_draft"])
        yield LAYER, same(n for part in forwards for n in part.layers)
        yield REST, same(len(part.launches) - sum(part.layers) for part in forwards)
        yield BEFORE, max(len(part.launches) for part in parts["prepare"])
        # Others are the product alone, or have more of it, once, for blocks that came of a draft pass.
        products = [len(part.launches) for part in parts["compute_logits"]]
        yield LOGITS, min(count for count in products if count > 1) - 1
        yield OUTCOME, outcome
        yield BESIDE_OUTCOME, same(proposals[len(drafts) :]) - outcome
    itself = same(len(part.launches) for part in drafts)
    yield DRAFT_LAYER, same(n for part in drafts for n in part.layers)
    yield DRAFT_REST, itself - sum(drafts[0].layers)
    yield AROUND, same(proposals[: len(drafts)]) - itself


def same(numbers: Iterable[T]) -> T:
    """In every layer, or in every step."""
    (number,) = set(numbers)
    return number
