"""One pass: hypothesis rows inside the verification are what a separate draft pass would have computed."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.engine.conftest import Checkpoints, StartEngine, one_pass
from tests.engine.harness import UNDER_PRESSURE, Engine, prompts, says_the_same_under_pressure
from vllm_orthrus.engine.attention.blocks import Blocks, CachedLayer
from vllm_orthrus.engine.attention.gather import GatherAttention
from vllm_orthrus.engine.onepass.forward import HypothesisRows, OnePass
from vllm_orthrus.engine.speculator import OrthrusSpeculator
from vllm_orthrus.kernels import choose
from vllm_orthrus.kernels.hypotheses import Hypotheses

Plant = Callable[[pytest.MonkeyPatch], None]


class Comparer:
    """Runs a draft pass of its own for every hypothesis of every step, right after the forward that carried it."""

    def __init__(self) -> None:
        self.worst, self.blocks = 0.0, 0

    def compare(self, speculator: OrthrusSpeculator, rows: HypothesisRows, longest: int) -> None:
        size = speculator.block_tables.block_sizes[0]
        attention = GatherAttention([CachedLayer(attn, 0, size) for attn in speculator.model.target_attention()])
        prefixes = rows.blocks.prefix_lengths  # [n, H]
        n, count = prefixes.shape
        positions = rows.positions.view(n, count, -1)
        carried = rows.hidden.view(n, count, speculator.shape.block, -1)
        for which in range(count):
            attention.begin(
                Blocks(positions[:, which], prefixes[:, which : which + 1], rows.blocks.block_tables, longest)
            )
            ids = rows.input_ids.view(n, count, -1)[:, which].flatten()
            hidden = speculator.model(ids, positions[:, which].flatten(), attention).view(n, speculator.shape.block, -1)
            real = prefixes[:, which] >= 0
            if real.any():
                self.worst = max(self.worst, float((hidden - carried[:, which])[real].abs().max()))
                self.blocks += int(real.sum())


@pytest.fixture
def comparer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Comparer]:
    comparer, propose = Comparer(), OrthrusSpeculator.propose

    @torch.inference_mode()
    def compare_and_propose(self: OrthrusSpeculator, *rest: Any, **named: Any) -> Any:
        if not named.get("dummy_run") and self.drafting.carried:
            batch = rest[0]
            rows = self.drafting.buffers.rows_for(batch.num_reqs)
            comparer.compare(self, rows, int(batch.seq_lens_cpu_upper_bound[: batch.num_reqs].max()))
        return propose(self, *rest, **named)

    monkeypatch.setattr(OrthrusSpeculator, "propose", compare_and_propose)
    yield comparer


def carries_exact_blocks(engine: Engine, comparer: Comparer, count: int = 8, **sampling: Any) -> bool:
    run = engine.run(prompts(count, shortest=20), 40, **sampling)
    assert 0 < run.counts.accepted < run.counts.drafted
    assert comparer.blocks > 5 * count, "hardly any hypotheses were carried"
    return comparer.worst <= 1e-5


@pytest.fixture(scope="module", params=["gather", "kernel"])
def drafting(start: StartEngine, tiny: Checkpoints, request: pytest.FixtureRequest) -> Engine:
    return start(one_pass(tiny.block_head, orthrus_attention=request.param), max_num_batched_tokens=512)


def test_blocks_are_those_of_a_separate_pass(drafting: Engine, plain: Engine, comparer: Comparer) -> None:
    attention = drafting.runner.speculator.drafting.one_pass.attention.blocks
    count = 8 if isinstance(attention, GatherAttention) else 2  # interpreted kernels take their time
    assert carries_exact_blocks(drafting, comparer, count)
    given = prompts(count, shortest=20)
    assert drafting.run(given, 40).tokens == plain.run(given, 40).tokens


def test_with_sampling(drafting: Engine, comparer: Comparer) -> None:
    assert carries_exact_blocks(drafting, comparer, 2, temperature=0.8, seed=3)


@pytest.mark.feature("chunked prefill")
@pytest.mark.feature("prefix caching")
@pytest.mark.feature("preemption")
def test_chunked_prefill_preemption_and_prefix_hits(
    start: StartEngine, tiny: Checkpoints, plain: Engine, comparer: Comparer
) -> None:
    engine = start(
        one_pass(tiny.block_head, orthrus_rows=4096, orthrus_block_size=5, orthrus_hypotheses=2),
        **UNDER_PRESSURE,
    )
    says_the_same_under_pressure(engine, plain)
    assert comparer.blocks > 50
    assert comparer.worst <= 1e-5


@pytest.mark.feature("asynchronous scheduling")
@pytest.mark.feature("asynchronous scheduling with preemption")
@pytest.mark.usefixtures("asynchronous")
def test_asynchronous_scheduling(start: StartEngine, tiny: Checkpoints, plain: Engine, comparer: Comparer) -> None:
    engine = start(one_pass(tiny.block_head), max_num_batched_tokens=512, num_gpu_blocks_override=18)
    given = prompts(8, shortest=20)
    run = engine.run(given, 60)
    assert run.tokens == plain.run(given, 60).tokens
    assert run.preemptions > 0
    assert comparer.blocks > 50
    assert comparer.worst <= 1e-5


def test_context_limit(drafting: Engine, plain: Engine, comparer: Comparer) -> None:
    long = [[(5 * j) % 250 for j in range(240)], [(3 * j) % 250 for j in range(247)]]
    assert drafting.run(long, 64).tokens == plain.run(long, 64).tokens
    assert comparer.blocks > 0
    assert comparer.worst <= 1e-5


def test_more_requests_than_rows_allow(start: StartEngine, tiny: Checkpoints, plain: Engine) -> None:
    """Few requests get many hypotheses, more get fewer, and beyond that drafts come from a pass of their own."""
    engine = start(one_pass(tiny.block_head, orthrus_rows=100))
    counts = [engine.runner.speculator.shape.num_hypotheses(count) for count in (1, 2, 4, 7, 8)]
    assert counts == [4, 4, 2, 0, 0], "one alone is not worth a ride"
    given = prompts(8)
    # Different lengths, so that requests leave one by one and the batch passes through all of these.
    tokens = [engine.run(given[: count + 1], 8 + 6 * count).tokens for count in range(8)]
    assert tokens == [plain.run(given[: count + 1], 8 + 6 * count).tokens for count in range(8)]
    carried = engine.runner.speculator.drafting.memory.counters[0]
    assert carried > 0


def all_tokens_at_hand(*arguments: Any) -> Hypotheses:
    """Instead of likely outcomes: a block behind the anchor and behind each draft."""
    drafts, anchors = arguments[3:5]
    tokens = torch.cat([anchors[:, None], drafts], dim=1)  # [R, K + 1]
    return Hypotheses(torch.arange(-1, drafts.shape[1]).expand_as(tokens).clone(), tokens)


def says_what_the_target_says(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Oracle 1: with the base's own weights, a block of one row is the verification row of the same token."""
    propose, worst, blocks = OrthrusSpeculator.propose, [0.0], [0]

    @torch.inference_mode()
    def compare_and_propose(self: OrthrusSpeculator, batch: Any, *rest: Any, **named: Any) -> Any:
        hidden = rest[2]
        if self.drafting.carried:
            rows = self.drafting.buffers.rows_for(batch.num_reqs)
            prefixes = rows.blocks.prefix_lengths  # [n, K + 1]
            verified = batch.query_start_loc[: batch.num_reqs, None].long() + torch.arange(prefixes.shape[1])
            difference = (rows.hidden.view(*prefixes.shape, -1) - hidden[verified]).abs().amax(-1)
            worst[0] = max(worst[0], float(torch.where(prefixes >= 0, difference, 0).max()))
            blocks[0] += int((prefixes >= 0).sum())
        return propose(self, batch, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(OrthrusSpeculator, "propose", compare_and_propose)
        patch.setattr(choose, "choose_hypotheses", all_tokens_at_hand)
        engine.run(prompts(8), 24)
    assert blocks[0] > 50, "hardly any hypotheses were carried"
    return worst[0] < 1e-3


@pytest.fixture(scope="module")
def copying(start: StartEngine, tiny: Checkpoints) -> Engine:
    return start(one_pass(tiny.copy_head, num_speculative_tokens=1, orthrus_hypotheses=2))


def test_blocks_of_a_copied_head(copying: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert says_what_the_target_says(copying, monkeypatch)


def _prefix(by: int) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        prepare = OnePass.prepare

        def faulty(self: OnePass, batch: Any) -> Any:
            rows = prepare(self, batch)
            if rows is not None:
                lengths = rows.blocks.prefix_lengths
                lengths += by * (lengths > 0).int()
            return rows

        patch.setattr(OnePass, "prepare", faulty)

    return plant


def _hypotheses_permuted(patch: pytest.MonkeyPatch) -> None:
    forward = OnePass.forward_with_rows

    def faulty(self: OnePass, ids: Any, positions: Any, embedded: Any, rows: HypothesisRows) -> torch.Tensor:
        verified = forward(self, ids, positions, embedded, rows)
        n, count = rows.blocks.prefix_lengths.shape
        rows.hidden.copy_(rows.hidden.view(n, count, -1).roll(1, dims=1).reshape(rows.hidden.shape))
        return verified

    patch.setattr(OnePass, "forward_with_rows", faulty)


FAULTS = {"prefix too long": _prefix(+1), "prefix too short": _prefix(-1), "permuted": _hypotheses_permuted}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_copied_head_notices(fault: str, copying: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        assert not says_what_the_target_says(copying, monkeypatch)
    assert says_what_the_target_says(copying, monkeypatch)


def test_graphs_find_their_rows_where_they_were_captured(drafting: Engine) -> None:
    """A captured forward reads fixed addresses: those of the rows that later batches prepare."""
    one = drafting.runner.speculator.drafting.one_pass
    if isinstance(one.attention.blocks, GatherAttention):
        assert one.dummy(2, 2 * one.shape.verified) is None, "it takes sizes from the host, which no graph can"
        return
    for num_reqs in (1, 2, 5, 8):
        captured = one.dummy(num_reqs, num_reqs * one.shape.verified)
        prepared = one.buffers.rows_for(num_reqs, 17)
        assert captured is not None
        for mine, theirs in (
            (captured.input_ids, prepared.input_ids),
            (captured.positions, prepared.positions),
            (captured.blocks.prefix_lengths, prepared.blocks.prefix_lengths),
            (captured.hidden, prepared.hidden),
            (captured.blocks.block_tables[0], prepared.blocks.block_tables[0]),
        ):
            assert mine.data_ptr() == theirs.data_ptr()
            assert mine.shape == theirs.shape
    assert one.dummy(3, 3 * one.shape.verified + 1) is None, "a ragged batch has no graph with rows"


@pytest.mark.feature("compiled models")
@pytest.mark.slow
def test_beside_a_compiled_target(start: StartEngine, tiny: Checkpoints, plain: Engine, comparer: Comparer) -> None:
    """Prompts go through the compiled model, verifications with hypotheses past it, and both know the same cache."""
    engine = start(one_pass(tiny.block_head), max_num_batched_tokens=512, enforce_eager=False)
    assert not engine.runner.model.model.do_not_compile
    given = prompts(4, shortest=20)
    assert engine.run(given, 24).tokens == plain.run(given, 24).tokens
    assert comparer.blocks > 20
    assert comparer.worst <= 1e-5
