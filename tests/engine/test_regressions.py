"""Bugs that other speculators shipped, planted here: each gate is green without, and red with the fault.

docs/regressions.md lists them all, with the tests that hold them off; those of the faults that other files plant are
named there, too.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.core.sched.scheduler import Scheduler

from tests.engine import checkpoints
from tests.engine.closures import DraftClosures
from tests.engine.conftest import Checkpoints, StartEngine
from tests.engine.harness import Engine, prompts
from tests.engine.subprocesses import result_of
from tests.engine.test_features_scheduling import FORM, SHARED, TIGHT, ask_with_a_shared_prefix, copying
from tests.engine.trained import OPTIONS, TINY, chat, questions, texts, tokens_per_cycle, trained_head
from vllm_orthrus.engine.draft_pass import DraftPass
from vllm_orthrus.engine.draft_rows import DraftRows
from vllm_orthrus.engine.speculator import OrthrusSpeculator
from vllm_orthrus.engine.vllm import CUDAGraphMode

Gate = Callable[[], bool]
Plant = Callable[[pytest.MonkeyPatch], None]


def notices(gate: Gate, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gate()
    with monkeypatch.context() as patch:
        plant(patch)
        assert not gate(), "the fault goes unnoticed"
    assert gate(), "the fault left something behind"


def _placeholders_kept(sampler: Any, patch: pytest.MonkeyPatch) -> None:
    """What pads the verification of a prompt's last token is taken for drafts that the target would have said."""
    verify = sampler._verify

    def faulty(logits: Any, draft_logits: Any, drafts: torch.Tensor, pos: Any, cu: Any, *rest: Any) -> Any:
        processed, sampled, num_sampled = verify(logits, draft_logits, drafts, pos, cu, *rest)
        starts = cu.tolist()
        for index, (first, end) in enumerate(pairwise(starts)):
            if end - first > 1 and bool((drafts[first + 1 : end] < 0).all()):
                sampled[index, : end - first] = 0
                num_sampled[index] = end - first
        return processed, sampled, num_sampled

    patch.setattr(sampler, "_verify", faulty)


def test_placeholders_behind_a_cached_prompt(
    start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(copying(tiny, draft_sample_method="probabilistic"), enable_prefix_caching=True)
    given = [[(3 * j + i) % 250 for j in range(2 * 32 + 1)] for i in range(4)]
    first = engine.run(given, 12, temperature=0.9, seed=7)

    def gate() -> bool:
        again = engine.run(given, 12, temperature=0.9, seed=7)
        assert again.cached_tokens == 4 * 64
        return again.tokens == first.tokens and again.counts.drafted - again.counts.accepted == len(given)

    notices(gate, partial(_placeholders_kept, engine.runner.rejection_sampler), monkeypatch)


def _limit_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DraftRows, "max_model_len", 1 << 20)


def test_context_limit_inside_a_draft(start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block tables and rotary tables are no longer than the context, so no row may stand behind it."""
    engine = start({"method": "orthrus", "model": str(tiny.block_head), "orthrus_passes": "two", "orthrus_modes": []})
    limit, rows = 256, engine.runner.speculator.rows

    def gate() -> bool:
        rows.positions.zero_()
        engine.run([[(5 * j) % 250 for j in range(limit - left)] for left in (3, 9)], 16)
        return 0 < int(rows.positions.max()) < limit

    notices(gate, _limit_forgotten, monkeypatch)


def _positions_of_sixteen_bits(patch: pytest.MonkeyPatch) -> None:
    prepare = DraftRows.prepare

    def faulty(self: DraftRows, rows: torch.Tensor, *rest: Any) -> None:
        prepare(self, rows, *rest)
        # This model hardly minds where a row stands in so long a text, so what it sees of the text is as narrow.
        for x in (self.positions, self.prefix_lengths):
            x[: len(rows)] = x[: len(rows)].to(torch.int16).to(x.dtype).clamp(min=0)

    patch.setattr(DraftRows, "prepare", faulty)


@pytest.mark.slow
@pytest.mark.thorough
def test_position_32768(start: StartEngine, tiny: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checkpoints.CONFIG, "max_position_embeddings", 1 << 16)
    base = checkpoints.write_base(tmp_path / "base")
    options = {"max_model_len": 33_000, "max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 96 << 20}
    engine = start(copying(tiny), base, enable_prefix_caching=True, **options)
    long = [[(5 * j + j // 97) % 250 for j in range((1 << 15) - 12)]]

    def gate() -> bool:
        counts = engine.run(long, 32).counts
        return counts.drafted - counts.accepted <= 1  # of a prompt that is cached but for one token

    notices(gate, _positions_of_sixteen_bits, monkeypatch)


def _as_the_host_believes(patch: pytest.MonkeyPatch) -> None:
    """When it schedules ahead, the host knows only how long a request is if every draft was kept."""
    prepare = DraftRows.prepare

    def faulty(self: DraftRows, rows: torch.Tensor, batch: Any, sampled: Any) -> None:
        prepare(self, rows, batch, sampled)
        believed = batch.seq_lens_cpu_upper_bound[rows].to(self.prefix_lengths.dtype)
        self.prefix_lengths[: len(rows)] = believed.clamp(max=self.max_model_len)

    patch.setattr(DraftRows, "prepare", faulty)


def _drafts_of_those_before(patch: pytest.MonkeyPatch) -> None:
    """After a preemption a slot is another request's, but drafts are handed out as if nobody had moved."""
    propose = OrthrusSpeculator.propose

    def faulty(self: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        drafts = propose(self, batch, *rest, **named)
        if not named.get("dummy_run") and len(drafts) > 1:
            drafts.copy_(drafts.roll(1, 0))
        return drafts

    patch.setattr(OrthrusSpeculator, "propose", faulty)


@pytest.mark.usefixtures("asynchronous")
@pytest.mark.parametrize("plant", [_as_the_host_believes, _drafts_of_those_before])
def test_preemption_when_scheduled_ahead(plant: Plant, start: StartEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many drafts are kept as in an engine with room for all, which never stops a request."""
    calm = start(trained_head("two"), TINY / "base", **OPTIONS)
    tight = start(trained_head("two"), TINY / "base", **TIGHT)
    given = [chat(calm, question) for question in questions(2)]
    expected = calm.run(given, 96)

    def gate() -> bool:
        run = tight.run(given, 96)
        assert run.preemptions > 0
        return run.tokens == expected.tokens and tokens_per_cycle(run) > 0.95 * tokens_per_cycle(expected)

    notices(gate, plant, monkeypatch)


def _grammars_begin_anew(patch: pytest.MonkeyPatch) -> None:
    preempt = Scheduler._preempt_request

    def faulty(self: Any, request: Any, *rest: Any, **named: Any) -> Any:
        if request.structured_output_request is not None:
            request.structured_output_request.grammar.reset()
        return preempt(self, request, *rest, **named)

    patch.setattr(Scheduler, "_preempt_request", faulty)


def test_structured_output_and_preemption(start: StartEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(trained_head("two"), TINY / "base", **TIGHT)
    given = [chat(engine, question) for question in questions(2)]
    expected = texts(start(None, TINY / "base", **OPTIONS).run(given, 96, **FORM))

    def gate() -> bool:
        run = engine.run(given, 96, **FORM)
        assert run.preemptions > 0
        return texts(run) == expected

    notices(gate, _grammars_begin_anew, monkeypatch)


def _scores_of_the_row_before(patch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    scores = RejectionSampler._get_logprobs_tensors

    def faulty(self: Any, sampled: Any, num_sampled: Any, logits: torch.Tensor, *rest: Any) -> Any:
        return scores(self, sampled, num_sampled, logits.roll(1, 0), *rest)

    patch.setattr(RejectionSampler, "_get_logprobs_tensors", faulty)


def test_log_probabilities(start: StartEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's is that of the row that verified it."""
    engine, plain = start(trained_head("two"), TINY / "base", **OPTIONS), start(None, TINY / "base", **OPTIONS)
    given = [chat(engine, question) for question in questions(1)]

    def scores(which: Engine) -> list[float]:
        outputs = which.run(given, 24, logprobs=0).outputs
        answers = [output.outputs[0] for output in outputs]
        return [step[token].logprob for one in answers for token, step in zip(one.token_ids, one.logprobs, strict=True)]

    expected = scores(plain)
    notices(lambda: scores(engine) == pytest.approx(expected, abs=2e-3), _scores_of_the_row_before, monkeypatch)


RANK_WITH_ANOTHER_HEAD = """
import json, sys
from tests.engine.harness import Engine, prompts
from vllm.distributed import get_tensor_model_parallel_rank
from vllm_orthrus.engine.view import DiffusionView

base, speculative, options, faulty = map(json.loads, sys.argv[1:])
load = DiffusionView.load_weights

def load_in_another_order(self, tensors):
    load(self, tensors)
    if get_tensor_model_parallel_rank() == 1:
        for parameter in self.parameters():
            parameter.data = parameter.data.flip(0)

if faulty:
    DiffusionView.load_weights = load_in_another_order

if __name__ == "__main__":
    engine = Engine(base, speculative, **options)
    run = engine.run(prompts(4), 16)
    print("RESULT", json.dumps([run.tokens, run.counts.drafted, run.counts.accepted]))
    engine.close()
"""


@pytest.mark.slow
@pytest.mark.thorough
def test_a_rank_with_another_head(tiny: Checkpoints, tmp_path: Path) -> None:
    """The text stays right, so that only acceptance tells."""

    def run(faulty: bool) -> Any:
        options = {"tensor_parallel_size": 2}
        script = RANK_WITH_ANOTHER_HEAD
        return result_of(tmp_path, script, str(tiny.base), copying(tiny), options, faulty, multiprocessing=True)

    (right, drafted, accepted), (same, drafted_there, accepted_there) = run(False), run(True)
    assert right == same
    assert 0 < drafted == accepted
    assert accepted_there < drafted_there, "the fault goes unnoticed"


def _cached_prefix_unseen(patch: pytest.MonkeyPatch) -> None:
    """As of a drafter whose own cache was not filled for tokens that nobody read."""
    prepare = DraftRows.prepare

    def faulty(self: DraftRows, rows: torch.Tensor, *rest: Any) -> None:
        prepare(self, rows, *rest)
        for table in self.tables:
            table[: len(rows), : SHARED // 32] = 0

    patch.setattr(DraftRows, "prepare", faulty)


def test_shared_prefixes(start: StartEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    without = tokens_per_cycle(ask_with_a_shared_prefix(start, "two", caching=False))

    def gate() -> bool:
        rate = tokens_per_cycle(ask_with_a_shared_prefix(start, "two", caching=True))
        return rate == pytest.approx(without, rel=0.01)

    notices(gate, _cached_prefix_unseen, monkeypatch)


def test_batches_beyond_the_largest_graph(
    start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They draft in turns that have graphs, not silently without."""
    engine = start(copying(tiny), max_num_seqs=8)
    speculator = engine.runner.speculator
    speculator.draft_pass.at_once = 3
    graphs = speculator.graphs = DraftClosures(3, speculator.shape.block)
    speculator.capture()
    compute, eager = DraftPass.compute, [0]

    def watched(self: DraftPass, *arguments: Any) -> None:
        eager[0] += 1
        compute(self, *arguments)

    def run_fullgraph(self: Any, graph: Any) -> None:
        self.replayed.append(graph.num_reqs)
        with monkeypatch.context() as inside:
            inside.setattr(DraftPass, "compute", compute)
            self.graphs[graph](CUDAGraphMode.FULL)

    monkeypatch.setattr(DraftPass, "compute", watched)
    monkeypatch.setattr(DraftClosures, "run_fullgraph", run_fullgraph)

    def gate() -> bool:
        eager[0] = 0
        run = engine.run(prompts(8), 16)
        assert 0 < run.counts.drafted == run.counts.accepted
        assert graphs.replayed
        return eager[0] == 0

    notices(gate, lambda patch: patch.setattr(speculator.draft_pass, "at_once", 8), monkeypatch)
