"""`orthrus_vocabulary: once`: one product for the logits of a verification and of its blocks drafts what two draft."""

from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from benchmarks.kernel_launches import RELEASED
from tests.engine.conftest import Checkpoints, StartEngine, one_pass
from tests.engine.harness import UNDER_PRESSURE, Counts, Engine, says_the_same_under_pressure
from tests.engine.trained import OPTIONS, TINY, chat, questions, trained_head
from vllm_orthrus.engine.onepass import logits
from vllm_orthrus.engine.onepass.logits import JoinedLogits
from vllm_orthrus.engine.speculator import OrthrusSpeculator
from vllm_orthrus.kernels import choose
from vllm_orthrus.kernels.hypotheses import NONE, Hypotheses
from vllm_orthrus.policy.cost import Model
from vllm_orthrus.policy.devices import find_device

LENGTHS = [110, 10, 45, 80]  # requests leave one by one
SOME = frozenset({1, 3})  # with these numbers of requests once, with others twice
WAYS = ("once", "twice", "some")


class Told(NamedTuple):
    """All that an engine says and counts in a run."""

    tokens: list[list[int]]
    counts: Counts
    accepted_at: dict[int, int]
    one_pass: dict[str, int]


def tell(engine: Engine, given: list[list[int]], length: int | list[int], **sampling: Any) -> Told:
    """From what was learnt of no step yet."""
    for part in engine.runner.speculator.drafting.memory.slots.calibration:
        part.zero_()
    engine.accepted_at.clear()
    engine.one_pass.clear()
    run = engine.run(given, length, **sampling)
    return Told(run.tokens, run.counts, dict(engine.accepted_at), dict(engine.one_pass))


@pytest.fixture(scope="module", params=["greedy", "probabilistic"])
def engines(start: StartEngine, request: pytest.FixtureRequest) -> dict[str, Engine]:
    """By how often they read the vocabulary, with drafts that are taken or drawn."""
    found = {}
    for way in WAYS:
        with pytest.MonkeyPatch.context() as patch:
            if way == "some":
                patch.setattr(logits, "requests_joined", lambda *given: SOME)
            settings = {} if way == "some" else {"orthrus_vocabulary": way}
            head = trained_head("one", orthrus_hypotheses=2, draft_sample_method=request.param, **settings)
            found[way] = start(head, TINY / "base", **OPTIONS, max_num_seqs=4)
    carrying = frozenset(range(1, 5))
    joined = {way: joined_logits(engine).requests for way, engine in found.items()}
    assert joined == {"once": carrying, "twice": frozenset(), "some": SOME}
    return found


def joined_logits(engine: Engine) -> JoinedLogits:
    found: JoinedLogits = engine.runner.speculator.drafting.logits
    return found


@pytest.mark.parametrize(
    ("device", "how", "joined"),
    [
        ("H200", "auto", {1, 2, 3, 4}),
        ("RTX 4090", "auto", {1, 2, 3, 4}),
        ("RTX 5090", "auto", {1, 2, 4}),
        ("CPU", "auto", set()),
        ("CPU", "once", {1, 2, 3, 4}),
        ("H200", "twice", set()),
    ],
)
def test_the_cost_model_decides(device: str, how: str, joined: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """For the released heads with default settings."""
    monkeypatch.setattr(logits, "device_of", lambda: find_device(device))
    monkeypatch.setattr(logits, "model_of", lambda config: Model())
    parallel = SimpleNamespace(enable_batch_sharded_sampling=False)
    config: Any = SimpleNamespace(speculative_config=SimpleNamespace(orthrus_vocabulary=how), parallel_config=parallel)
    assert logits.requests_joined(RELEASED, config) == joined
    parallel.enable_batch_sharded_sampling = True
    assert not logits.requests_joined(RELEASED, config)


def ask(engine: Engine, num_reqs: int, first: int = 0) -> list[list[int]]:
    return [chat(engine, question) for question in questions(1, first)[:num_reqs]]


SAMPLING = [{}, {"temperature": 0.8, "seed": 3}]


@pytest.mark.parametrize("sampling", SAMPLING, ids=["greedy", "sampled"])
def test_says_and_counts_the_same(engines: dict[str, Engine], sampling: dict[str, Any]) -> None:
    """One request, and batches that lose their requests one by one: text, acceptance, hits, misses by cause."""
    told: dict[str, list[Told]] = {}
    for way, engine in engines.items():
        alone = [tell(engine, ask(engine, 1, first), 40, **sampling) for first in (0, 1)]
        shrinking = [tell(engine, ask(engine, 4, first), LENGTHS, **sampling) for first in (2, 3)]
        told[way] = [*alone, *shrinking]
    assert told["once"] == told["twice"]
    assert told["some"] == told["twice"]
    assert all(one.counts.accepted > 10 for one in told["once"])
    for name in ("hits", "accepted_count_missed", "bonus_missed"):
        assert sum(one.one_pass.get(name, 0) for one in told["once"]) > 5, name


class Step(NamedTuple):
    requests: int  # 0: no blocks were carried
    products: list[int]  # rows of each


@pytest.fixture
def steps(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Step]]]:
    """Products with the vocabulary, from one proposal of drafts to the next."""
    found: dict[str, list[Step]] = {}
    hooks, propose = [], OrthrusSpeculator.propose
    for way, engine in engines.items():
        products: list[int] = []

        def note(module: Any, given: Any, out: Any, products: list[int] = products) -> None:
            products.append(len(given[1]))

        hooks.append(engine.runner.model.logits_processor.register_forward_hook(note))
        mine = found.setdefault(way, [])

        def noted(
            batch: Any, *rest: Any, own: Any = engine, mine: Any = mine, products: Any = products, **named: Any
        ) -> Any:
            speculator = own.runner.speculator
            carried = batch.num_reqs if speculator.drafting.carried else 0
            out = propose(speculator, batch, *rest, **named)
            mine.append(Step(carried, products[:]))
            products.clear()
            return out

        monkeypatch.setattr(engine.runner.speculator, "propose", noted)
    yield found
    for hook in hooks:
        hook.remove()


def test_each_verification_reads_the_vocabulary_once(engines: dict[str, Engine], steps: dict[str, list[Step]]) -> None:
    for engine in engines.values():
        tell(engine, ask(engine, 4, 2), LENGTHS)
    shape = engines["once"].runner.speculator.shape
    for way, mine in steps.items():
        carrying = [step for step in mine if step.requests]
        assert {step.requests for step in carrying} >= {1, 2, 3, 4}
        for step in carrying:
            once = way == "once" or (way == "some" and step.requests in SOME)
            assert len(step.products) == (1 if once else 2)
        assert all(len(step.products) == 2 for step in mine if not step.requests), "of a prompt, and of a draft pass"

        # A block whose logits nobody has yet is one more of them, once.
        joined = [step for step in carrying if len(step.products) == 1]
        more = [
            step.products[0] - step.requests * (shape.verified + shape.block * shape.num_hypotheses(step.requests))
            for step in joined
        ]
        added = [rows // shape.block for rows in more if rows > 0]
        assert added == {"once": [4], "twice": [], "some": [3, 1]}[way]


Fault = Callable[[pytest.MonkeyPatch], None]


def rolled(blocks_of: Callable[[JoinedLogits, int], int]) -> Fault:
    """Logits of rows some blocks off."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        compute = JoinedLogits.compute_logits

        def faulty(self: JoinedLogits, hidden: torch.Tensor) -> Any:
            rows = self.awaited
            out = compute(self, hidden)
            if rows is not None:
                num_reqs = len(rows.blocks.prefix_lengths)
                mine = self.carried[: len(rows.hidden)]
                mine.copy_(mine.roll(self.shape.block * blocks_of(self, num_reqs), dims=0))
            return out

        patch.setattr(JoinedLogits, "compute_logits", faulty)

    return plant


def one_request(joined: JoinedLogits, num_reqs: int) -> int:
    return joined.shape.num_hypotheses(num_reqs)


def never_asked(patch: pytest.MonkeyPatch) -> None:
    """The rows of a block that a draft pass has given."""
    expect = JoinedLogits.expect

    def faulty(self: JoinedLogits, rows: Any, batch: Any) -> None:
        self.kept[self.memory.place[torch.from_numpy(np.flatnonzero(~self.known))]] = 0
        self.known[:] = True
        expect(self, rows, batch)

    patch.setattr(JoinedLogits, "expect", faulty)


def never_kept(patch: pytest.MonkeyPatch) -> None:
    """Those of a block that has come to hand."""
    take = JoinedLogits.take

    def faulty(self: JoinedLogits, *given: Any) -> torch.Tensor:
        out = take(self, *given)
        self.kept.zero_()
        return out

    patch.setattr(JoinedLogits, "take", faulty)


# What is planted, and how often there is a block instead of what is likely: 0: always what is likely.
FAULTS: dict[str, tuple[Fault, int]] = {
    "a block off": (rolled(lambda joined, num_reqs: 1), 0),
    "another request's": (rolled(one_request), 0),
    "never asked for": (never_asked, 10**6),
    "never kept": (never_kept, 2),
}


def every(other: int) -> Callable[..., Hypotheses]:
    """The anchor's block, every so many times, whose rest has to do until the next."""
    times = count(1)

    def chosen(*arguments: Any) -> Hypotheses:
        anchors, hypotheses = arguments[4], arguments[7]
        accepted = torch.full((len(anchors), hypotheses), NONE)
        if next(times) % other == 0:
            accepted[:, 0] = -1
        return Hypotheses(accepted, torch.where(accepted == -1, anchors[:, None], 0))

    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("engines", ["greedy"], indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_show(fault: str, engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """In what is accepted. The text stays: vLLM gets the logits of its own rows."""
    plant, other = FAULTS[fault]

    def told(way: str, *plants: Fault) -> list[Told]:
        found = []
        with monkeypatch.context() as patch:
            for one in plants:
                one(patch)
            for first in (0, 4, 5):
                if other:
                    patch.setattr(choose, "choose_hypotheses", every(other))
                found.append(tell(engines[way], ask(engines[way], 4, first), 32))
        return found

    def steps(runs: list[Told]) -> int:
        return sum(one.counts.steps for one in runs)

    expected, faulty = told("once"), told("once", plant)
    assert steps(faulty) > steps(expected)
    assert [one.accepted_at for one in faulty] != [one.accepted_at for one in expected]
    assert [one.tokens for one in faulty] == [one.tokens for one in expected]
    assert told("once") == expected == told("twice")


@pytest.mark.slow
@pytest.mark.feature("chunked prefill")
@pytest.mark.feature("prefix caching")
@pytest.mark.feature("preemption")
def test_chunked_prefill_preemption_and_prefix_hits(start: StartEngine, tiny: Checkpoints, plain: Engine) -> None:
    """Requests come, go and return, so that blocks from draft passes meet those that were carried."""
    under_pressure, counts = {"orthrus_rows": 4096, "orthrus_block_size": 5, "orthrus_hypotheses": 2}, []
    for way in ("once", "twice"):
        engine = start(one_pass(tiny.block_head, orthrus_vocabulary=way, **under_pressure), **UNDER_PRESSURE)
        says_the_same_under_pressure(engine, plain)
        counts.append((engine._counts, engine.one_pass))
    assert counts[0] == counts[1]


def test_graphs_find_logits_where_they_were_captured(engines: dict[str, Engine]) -> None:
    """A captured outcome reads fixed addresses, which every verification fills."""
    joined = joined_logits(engines["once"])
    at = joined.carried.data_ptr(), joined.kept.data_ptr()
    tell(engines["once"], ask(engines["once"], 3), 12)
    assert (joined.carried.data_ptr(), joined.kept.data_ptr()) == at
    assert joined.carried.abs().sum() > 0
