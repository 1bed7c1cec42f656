"""The engine with every kernel of ours in the form that a GPU runs, interpreted."""

import os
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any, NamedTuple

import pytest

from tests.engine.conftest import Checkpoints, StartEngine, one_pass
from tests.engine.harness import Counts, Engine, prompts
from tests.rehearsal.counted_steps import join_as_on_a_gpu
from tests.rehearsal.launches import Launch, Recorder
from vllm_orthrus.engine.attention.kernel import KernelAttention
from vllm_orthrus.engine.onepass import pairs
from vllm_orthrus.engine.speculator import OrthrusSpeculator
from vllm_orthrus.kernels import choose
from vllm_orthrus.kernels.forms import SETTING

ROWS = {"orthrus_block_size": 5, "num_speculative_tokens": 4, "orthrus_hypotheses": 3, "orthrus_rows": 96}
GIVEN = prompts(5, shortest=9)


class Told(NamedTuple):
    """All that an engine says and counts, from its start."""

    tokens: list[list[int]]
    counts: Counts
    accepted_at: dict[int, int]
    one_pass: dict[str, int]


def tell(engine: Engine, given: list[list[int]], length: int, **sampling: Any) -> Told:
    run = engine.run(given, length, **sampling)
    return Told(run.tokens, run.counts, dict(engine.accepted_at), dict(engine.one_pass))


def greedily(engine: Engine) -> Told:
    return tell(engine, GIVEN, 12)


def sampling(engine: Engine) -> Told:
    return tell(engine, GIVEN[:4], 8, temperature=0.8, seed=3)


@pytest.fixture
def form() -> Iterator[None]:
    yield
    os.environ.pop(SETTING, None)


StartForm = Callable[..., Engine]


@pytest.fixture
def start_form(form: None, start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> StartForm:
    """An engine whose kernels have this form, and that drafts in so many passes. Once: all that a GPU joins, joined."""

    def start_it(form: str, passes: str, vocabulary: str = "auto") -> Engine:
        os.environ[SETTING] = form
        if vocabulary == "once":
            join_as_on_a_gpu(monkeypatch)
        told = one_pass(tiny.block_head, orthrus_passes=passes, orthrus_vocabulary=vocabulary, **ROWS)
        engine = start(told, max_num_seqs=5)
        attention = type(engine.runner.speculator.draft_pass.attention).__name__
        assert attention == {"torch": "GatherAttention", "triton": "KernelAttention"}[form]
        return engine

    return start_it


def paired(engine: Engine) -> bool:
    view = engine.runner.speculator.model
    attentions = zip(view.layers, (layer.self_attn for layer in view.target.model.layers), strict=True)
    return all(
        pairs.side_by_side(getattr(target, name), getattr(diffusion, name)) is not None
        for diffusion, target in attentions
        for name in pairs.PROJECTIONS
    )


@pytest.mark.parametrize(
    ("passes", "vocabulary"),
    [("one", "once"), pytest.param("one", "twice", marks=pytest.mark.slow), ("two", "auto")],
)
def test_tells_what_the_twins_tell(
    passes: str, vocabulary: str, start_form: StartForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of up to five requests: the text, and every counter of acceptance and of foreseen outcomes."""
    twins = start_form("torch", passes, "auto")
    expected = greedily(twins), sampling(twins)
    interpreted = start_form("triton", passes, vocabulary)
    assert (greedily(interpreted), sampling(interpreted)) == expected
    assert expected[0].counts.accepted > 0
    if passes == "two":
        return
    drafting = interpreted.runner.speculator.drafting
    # Where weights have a CPU's own form, they stay apart whatever would be quicker.
    assert bool(drafting.logits.requests) == paired(interpreted) == (vocabulary == "once")
    assert drafting.paired
    assert expected[1].one_pass["hits"] > 0
    assert expected[1].one_pass["bonus_missed"] > 0

    # A planted fault: the anchors, which are a column of the blocks' rows, read as if they stood side by side.
    launch = choose.launch

    def packed(drafted: choose.Drafted, *others: Any) -> None:
        launch(drafted._replace(anchor=drafted.anchor.as_strided(drafted.anchor.shape, (1,))), *others)

    monkeypatch.setattr(choose, "launch", packed)
    faulty = greedily(start_form("triton", passes, vocabulary))
    assert faulty.tokens == expected[0].tokens, "drafts never change the text"
    assert faulty.one_pass != expected[0].one_pass


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("verification", ["backend", "fused"])
def test_the_kernel_path_has_twins_too(
    verification: str, start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen by name, and then told to do without Triton: to find out whether a kernel is to blame."""
    os.environ[SETTING] = "torch"
    settings = ROWS | {"orthrus_attention": "kernel", "orthrus_verification": verification}
    expected = greedily(start(one_pass(tiny.block_head, orthrus_attention="gather", **ROWS), max_num_seqs=5))
    with Recorder().recording(monkeypatch) as recorder:
        engine = start(one_pass(tiny.block_head, **settings), max_num_seqs=5)
        attention = engine.runner.speculator.draft_pass.attention
        assert isinstance(attention, KernelAttention)
        assert not attention.supports_graphs
        assert greedily(engine) == expected
    assert not recorder.take()


@pytest.mark.usefixtures("form")
def test_every_step_launches_what_was_warmed_up(
    start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every number of requests and of drafts, so that none waits for a compiler."""
    os.environ[SETTING] = "triton"
    join_as_on_a_gpu(monkeypatch)
    recorder, warm, warm_up = Recorder(), set[Launch](), OrthrusSpeculator._warm_up

    def remember(speculator: OrthrusSpeculator, *arguments: Any) -> None:
        recorder.take()
        warm_up(speculator, *arguments)
        warm.update(recorder.take())

    monkeypatch.setattr(OrthrusSpeculator, "_warm_up", remember)
    with recorder.recording(monkeypatch):
        told = one_pass(tiny.block_head, **ROWS, orthrus_modes=[0, 1, 3, 4], orthrus_vocabulary="once")
        engine = start(told, max_num_seqs=5)
        turns = cycle([4, 4, 3, 4, 1, 0])
        scheduler: Any = engine.llm.llm_engine.engine_core.engine_core.scheduler
        monkeypatch.setattr(scheduler.dynamic_sd_lookup.policy, "choose", lambda requests, context: next(turns))
        for count in (1, 2, 3, 4, 5):
            engine.run(prompts(count, shortest=7), 8)
    launched = recorder.take()
    assert {launch.kernel for launch in launched} >= {
        "_attend_kernel",
        "_choose_kernel",
        "_scan_kernel",
        "_take_rows_kernel",
        "_take_up_kernel",
        "_merge_scans_kernel",
        "_prepare_blocks_kernel",
        "_prepare_hypotheses_kernel",
    }
    assert launched <= warm, sorted(launched - warm)
