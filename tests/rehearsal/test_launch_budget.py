"""No more is launched for a layer and for a step than is known and accounted for; docs/one-pass.md says what."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.evidence import FOLDER
from tests.engine.conftest import Checkpoints, StartEngine
from tests.engine.harness import Engine, prompts
from tests.rehearsal.counted_steps import (
    AROUND,
    BEFORE,
    BESIDE_OUTCOME,
    DRAFT_LAYER,
    DRAFT_REST,
    KINDS,
    LAYER,
    LOGITS,
    OUTCOME,
    REST,
    as_on_a_gpu,
    count,
    settings,
)
from tests.rehearsal.launch_count import LaunchCount
from vllm_orthrus.engine.view import DiffusionAttention
from vllm_orthrus.policy.cost import PAIRED

# In one pass, in one pass with fused verification, in two.
BUDGET: dict[str, tuple[int | None, int | None, int | None]] = {
    LAYER: (11, 10, None),
    REST: (6, 6, None),
    DRAFT_LAYER: (10, 10, 10),
    DRAFT_REST: (3, 3, 7),
    BEFORE: (1, 3, None),
    LOGITS: (2, 2, None),
    OUTCOME: (11, 11, None),
    BESIDE_OUTCOME: (8, 8, None),
    AROUND: (31, 31, 6),
}

StartKind = Callable[[int], Engine]


@pytest.fixture
def start_kind(start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> StartKind:
    as_on_a_gpu(monkeypatch)

    def start_it(kind: int) -> Engine:
        engine = start(settings(kind, tiny.block_head), max_num_seqs=3)
        engine.run(prompts(1), 2)  # the first step launches all that others may
        return engine

    return start_it


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
    more = {what: most + (what == DRAFT_LAYER) for what, most in allowed(kind).items()}
    assert count(engine, monkeypatch) == more


def test_the_page_says_so() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "one-pass.md").read_text()
    for what, budget in BUDGET.items():
        cells = " | ".join("-" if most is None else str(most) for most in budget)
        assert f"| {what} | {cells} |" in page


def test_evidence_is_of_this_budget() -> None:
    """benchmarks/evidence/launches-beside.json, where vLLM's own drafters stand beside it."""
    ours = json.loads((FOLDER / "launches-beside.json").read_text())["ours"]
    assert list(ours.values()) == [allowed(kind) for kind in range(len(KINDS))]


def test_what_the_host_computes_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, lengths = LaunchCount(), torch.tensor([3, 5])
    counted.of_host.append(lengths)
    with counted.counting(monkeypatch):
        assert lengths[:2].max().item() == 5
        torch.ones(2).add_(lengths)
    assert counted.launches == ["aten.ones.default", "aten.add_.Tensor"]
