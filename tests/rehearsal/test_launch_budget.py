"""No more is launched for a layer and for a step than is known and accounted for; docs/one-pass.md says what."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers import utils

from tests.engine.conftest import Checkpoints, StartEngine, one_pass
from tests.engine.harness import Engine, prompts
from tests.rehearsal.launch_count import LaunchCount, Part
from vllm_orthrus.engine.onepass import pairs
from vllm_orthrus.engine.onepass.drafting import OnePassDrafting
from vllm_orthrus.engine.view import DiffusionAttention
from vllm_orthrus.kernels import dual_view_plan
from vllm_orthrus.kernels.dual_view_plan import Target
from vllm_orthrus.kernels.forms import SETTING
from vllm_orthrus.policy.cost import PAIRED
from vllm_orthrus.policy.devices import DEVICES

# Our attention is two launches wherever it cuts prefixes into splits; here a GPU so small that it can be interpreted.
GPU = Target(False, 99 * 1024, 24)

# In one pass, in one pass with fused verification, in two.
LAYER = "a layer of a verification with hypotheses"
BUDGET: dict[str, tuple[int | None, int | None, int | None]] = {
    LAYER: (11, 10, None),
    "that forward, besides its layers": (6, 6, None),
    "a layer of a draft pass": (10, 10, 10),
    "that pass, besides its layers": (3, 3, 7),
    "before a verification: the hypotheses' rows": (1, 3, None),
    "beside the product of a verification's logits": (2, 2, None),
    "behind a verification: taking up its outcome": (11, 11, None),
    "behind a verification, besides that": (8, 8, None),
    "around a draft pass": (31, 31, 6),
}
ONCE = {"orthrus_vocabulary": "once"}  # as on a GPU
KINDS: tuple[dict[str, Any], ...] = (ONCE, ONCE | {"orthrus_verification": "fused"}, {"orthrus_passes": "two"})


def leave_as_loaded(layer: Any, remove_weight: bool) -> None:
    """As a GPU does, where a CPU has its products in a form of their own."""
    layer.cpu_linear = torch.nn.functional.linear


StartKind = Callable[[int], Engine]


@pytest.fixture
def start_kind(start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> StartKind:
    monkeypatch.setenv(SETTING, "triton")
    monkeypatch.setattr(dual_view_plan, "target_of", lambda device: GPU)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", leave_as_loaded)
    monkeypatch.setattr(pairs, "device_of", lambda: DEVICES["H200"])

    def start_it(kind: int) -> Engine:
        settings = {"orthrus_block_size": 5, "num_speculative_tokens": 4, "orthrus_hypotheses": 3, "orthrus_rows": 96}
        engine = start(one_pass(tiny.block_head, **settings, **KINDS[kind]), max_num_seqs=3)
        engine.run(prompts(1), 2)  # the first step launches all that others may
        return engine

    return start_it


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
        yield "that forward, besides its layers", same(len(part.launches) - sum(part.layers) for part in forwards)
        yield "before a verification: the hypotheses' rows", max(len(part.launches) for part in parts["prepare"])
        # Others are the product alone, or have more of it, once, for blocks that came of a draft pass.
        products = [len(part.launches) for part in parts["compute_logits"]]
        yield "beside the product of a verification's logits", min(count for count in products if count > 1) - 1
        yield "behind a verification: taking up its outcome", outcome
        yield "behind a verification, besides that", same(proposals[len(drafts) :]) - outcome
    itself = same(len(part.launches) for part in drafts)
    yield "a layer of a draft pass", same(n for part in drafts for n in part.layers)
    yield "that pass, besides its layers", itself - sum(drafts[0].layers)
    yield "around a draft pass", same(proposals[: len(drafts)]) - itself


def same(numbers: Iterable[int]) -> int:
    """In every layer, or in every step."""
    (number,) = set(numbers)
    return number


def allowed(kind: int) -> dict[str, int]:
    return {what: most for what, budget in BUDGET.items() if (most := budget[kind]) is not None}


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_budget(kind: int, start_kind: StartKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly: whoever launches less lowers the budget with it."""
    engine = start_kind(kind)
    assert count(engine, monkeypatch) == allowed(kind)
    if KINDS[kind].get("orthrus_passes") != "two":
        # Where rows are so many, or weights such, that each view has products of its own.
        engine.runner.speculator.drafting.one_pass.attention.paired = frozenset()
        more = {what: most + PAIRED * (what == LAYER) for what, most in allowed(kind).items()}
        assert count(engine, monkeypatch) == more
        return

    # A planted fault: a copy that nothing needs, in every layer.
    project = DiffusionAttention.project

    def copied(view: DiffusionAttention, positions: torch.Tensor, x: torch.Tensor, rotary: Any) -> Any:
        return project(view, positions, x.clone(), rotary)

    monkeypatch.setattr(DiffusionAttention, "project", copied)
    more = {what: most + (what == "a layer of a draft pass") for what, most in allowed(kind).items()}
    assert count(engine, monkeypatch) == more


def test_the_page_says_so() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "one-pass.md").read_text()
    for what, budget in BUDGET.items():
        cells = " | ".join("-" if most is None else str(most) for most in budget)
        assert f"| {what} | {cells} |" in page
