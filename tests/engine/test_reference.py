"""Oracle 2: the engine's block rows equal the dense PyTorch reference, and every gate notices a planted fault."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from tests.engine.conftest import Checkpoints, StartEngine
from tests.engine.harness import Engine, Run, prompts
from vllm_orthrus.engine.draft_rows import DraftRows
from vllm_orthrus.engine.speculator import OrthrusSpeculator
from vllm_orthrus.engine.view import DiffusionAttention
from vllm_orthrus.training.reference import Reference


class DraftPass(NamedTuple):
    """One row of one draft pass, as the engine ran it."""

    request: str
    prefix: int
    anchor: int
    hidden: torch.Tensor  # [block, hidden]


class Recorder:
    """Watches the draft passes of an engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self.passes: list[DraftPass] = []
        self.runner = engine.runner
        self.speculator: OrthrusSpeculator = self.runner.speculator
        self.hook = self.speculator.model.register_forward_hook(self._record)

    def _record(self, view: Any, inputs: Any, hidden: torch.Tensor) -> None:
        by_slot = {slot: request for request, slot in self.runner.req_states.req_id_to_index.items()}
        speculator = self.speculator
        rows = hidden.view(-1, speculator.shape.block, hidden.shape[-1])
        for row, states in enumerate(rows):
            request = by_slot.get(int(speculator.rows.slots[row, 0]))
            if request is not None:
                prefix, anchor = int(speculator.rows.positions[row, 0]), int(speculator.rows.input_ids[row, 0])
                self.passes.append(DraftPass(request, prefix, anchor, states.clone()))

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.hook.remove()


def worst_difference(reference: Reference, run: Run, passes: list[DraftPass], block: int) -> float:
    """Largest difference between a recorded pass and the reference's block behind the same tokens."""
    assert passes
    worst = 0.0
    for output in run.outputs:
        sequence = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]])
        positions = torch.arange(sequence.shape[1])[None]
        cache = reference.new_cache(1, sequence.shape[1])
        reference.autoregressive(sequence, positions, cache)
        for drafted in passes:
            if drafted.request.split("-")[0] != output.request_id.split("-")[0]:
                continue
            if drafted.prefix >= sequence.shape[1]:
                # The last block of a request stands behind its final token, unless the position is wrong.
                if drafted.prefix > sequence.shape[1]:
                    return float("inf")
                continue
            if sequence[0, drafted.prefix] != drafted.anchor:
                return float("inf")
            anchors, prefix = torch.tensor([drafted.anchor]), torch.tensor([drafted.prefix])
            expected = reference.diffusion(anchors, prefix, cache, block)[0]
            worst = max(worst, float((expected - drafted.hidden).abs().max()))
    return worst


@pytest.fixture(scope="module")
def reference(tiny: Checkpoints) -> Reference:
    return Reference.from_pretrained(tiny.base, tiny.block_head)


@pytest.fixture(scope="module")
def drafting(start: StartEngine, tiny: Checkpoints, path: str) -> Engine:
    """Blocks of eight rows from a head that drafts badly, so that most drafts are rejected."""
    settings = {"model": str(tiny.block_head), "num_speculative_tokens": 5, "orthrus_attention": path}
    settings |= {"orthrus_passes": "two"}
    return start({"method": "orthrus"} | settings)


@torch.inference_mode()
def matches_reference(engine: Engine, reference: Reference, count: int = 4) -> bool:
    with Recorder(engine) as recorder:
        run = engine.run(prompts(count), 20, temperature=0.7, seed=5)
    assert 0 < run.counts.accepted < run.counts.drafted, "without rejections this proves little"
    return worst_difference(reference, run, recorder.passes, block=8) < 2e-3


def every_draft_accepted(engine: Engine) -> bool:
    counts = engine.run(prompts(4), 16).counts
    return 0 < counts.drafted == counts.accepted


def test_block_rows_equal_the_reference(drafting: Engine, reference: Reference) -> None:
    assert matches_reference(drafting, reference)


def test_tokens_per_cycle_equal_the_reference(drafting: Engine, reference: Reference) -> None:
    """Greedy, the engine accepts exactly what the reference loop accepts."""
    given = prompts(6)
    run = drafting.run(given, 32)
    expected = reference.generate(given, 32, num_drafts=5, width=8, drafting="greedy")
    assert run.tokens == [generation.tokens for generation in expected]
    cycles = sum(len(generation.cycles) for generation in expected)
    assert run.counts.steps == cycles


# Planted faults: each must turn the gate it is listed with red.


def _prefix(by: int) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        prepare = DraftRows.prepare

        def faulty(self: DraftRows, rows: torch.Tensor, *rest: Any) -> None:
            prepare(self, rows, *rest)
            self.prefix_lengths[: len(rows)] += by

        patch.setattr(DraftRows, "prepare", faulty)

    return plant


def _rejections_ignored(patch: pytest.MonkeyPatch) -> None:
    prepare = DraftRows.prepare

    def faulty(self: DraftRows, rows: Any, batch: Any, sampled: Any) -> None:
        prepare(self, rows, batch, sampled._replace(num_rejected=torch.zeros_like(sampled.num_rejected)))

    patch.setattr(DraftRows, "prepare", faulty)


def _block_keys_zeroed(patch: pytest.MonkeyPatch) -> None:
    forward = DiffusionAttention.forward

    def faulty(self: Any, positions: Any, x: Any, rotary: Any, attend: Any, layer: int) -> Any:
        def attend_nothing_fresh(layer: int, q: Any, k: Any, v: Any) -> Any:
            return attend(layer, q, torch.zeros_like(k), torch.zeros_like(v))

        return forward(self, positions, x, rotary, attend_nothing_fresh, layer)

    patch.setattr(DiffusionAttention, "forward", faulty)


def _positions_shifted(patch: pytest.MonkeyPatch) -> None:
    forward = DiffusionAttention.forward

    def faulty(self: Any, positions: torch.Tensor, *rest: Any) -> Any:
        return forward(self, positions + 1, *rest)

    patch.setattr(DiffusionAttention, "forward", faulty)


def _drafts_rotated(patch: pytest.MonkeyPatch) -> None:
    sample = OrthrusSpeculator.sample_draft

    def faulty(self: Any, *arguments: Any, **options: Any) -> Any:
        return sample(self, *arguments, **options).roll(1)

    patch.setattr(OrthrusSpeculator, "sample_draft", faulty)


FAULTS = {
    "prefix one too long": _prefix(+1),
    "prefix one too short": _prefix(-1),
    "block keys and values zeroed": _block_keys_zeroed,
    "positions shifted": _positions_shifted,
    "drafts rotated": _drafts_rotated,
}


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("fault", FAULTS)
def test_acceptance_notices(fault: str, oracle: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        assert not every_draft_accepted(oracle)
    assert every_draft_accepted(oracle)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("fault", ["rejections ignored", *list(FAULTS)[:-1]])
def test_reference_notices(fault: str, drafting: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        (FAULTS | {"rejections ignored": _rejections_ignored})[fault](patch)
        assert not matches_reference(drafting, reference)
