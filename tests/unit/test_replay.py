"""The policy of modes on devices and loads that are only described: a sample of benchmarks/mode_simulation.py."""

import json

import pytest

from benchmarks.mode_simulation import MODES, NEVER_SLOWER, Cell, Fixed, cells, fits, mode_of, simulate
from benchmarks.traces import FILE as TRACES
from vllm_orthrus.policy.clock import Clock, Step
from vllm_orthrus.policy.cost import Mode, Model
from vllm_orthrus.policy.devices import find_device
from vllm_orthrus.policy.replay import Always, Text, World, read_traces, replay

SAMPLE = [
    Cell("H200", 1, 1024, "log"),
    Cell("H200", 1, 65536, "prose"),
    Cell("H200", 16, 4096, "json"),
    Cell("H100", 256, 1024, "code"),
    Cell("A100", 4, 16384, "arithmetic"),
    Cell("A100", 64, 1024, "prose"),
    Cell("RTX 4090", 2, 4096, "code"),
    Cell("RTX 5090", 8, 1024, "counting"),
]
# Where drafts of one number are foretold by another's too high, and where plain decoding went on for long.
HARD = [
    Cell("A100", 32, 4096, "arithmetic"),
    Cell("H200", 128, 4096, "arithmetic"),
    Cell("RTX 5090", 16, 4096, "arithmetic"),
    Cell("H100", 1, 131072, "code"),
]


@pytest.fixture(scope="module")
def fixed() -> Fixed:
    return Fixed(read_traces(json.loads(TRACES.read_text())["text"]))


@pytest.mark.parametrize(
    "cell", SAMPLE + HARD, ids=lambda cell: f"{cell.device}-{cell.requests}-{cell.context}-{cell.kind}"
)
def test_never_slower_than_plain_and_close_to_the_best(fixed: Fixed, cell: Cell) -> None:
    found = simulate(cell, fixed, tokens=6000)
    assert found["auto"] >= NEVER_SLOWER
    assert found["of_best"] >= (0.92 if cell in HARD else 0.9), "a short run, with its noise"


def test_planted_fault_a_clock_that_takes_slow_for_fast(fixed: Fixed, monkeypatch: pytest.MonkeyPatch) -> None:
    observe = Clock.observe

    def inverted(clock: Clock, step: Step) -> None:
        observe(clock, step._replace(seconds=1e-5 / step.seconds))

    monkeypatch.setattr(Clock, "observe", inverted)
    assert simulate(Cell("A100", 64, 1024, "prose"), fixed, tokens=6000)["auto"] < 0.9


def test_cells_that_do_not_fit_are_left_out() -> None:
    assert fits(find_device("H200"), 1, 131072) and not fits(find_device("RTX 4090"), 64, 16384)
    assert {cell.context for cell in cells(["RTX 4090"], [64], [1024, 16384], ["log"])} <= {1024}


def test_a_fixed_mode_gives_what_its_text_and_time_say() -> None:
    text = Text([[2, 0, 0, 1, 0]], {1: 0.0}, {1: [0]})
    device = find_device("H200")
    world = World(device, Model(), lambda drafts, requests: Mode(drafts, drafts), noise=0.0)
    run = replay(Always(3), world, text, 1, 1000, 500)
    # Places 0 and 3 accept two drafts and one: five tokens in two steps.
    assert run.tokens_per_second * world.seconds(3, 3, 1, 1000) == pytest.approx(2.5, rel=0.01)
    assert set(run.modes) == {3}


def test_a_step_on_the_way_pays_for_both_modes() -> None:
    world = World(find_device("H200"), Model(), mode_of)
    plain, far = world.seconds(0, 0, 1, 1000), world.seconds(14, 14, 1, 1000)
    assert plain < world.seconds(0, 14, 1, 1000) < far
    assert plain < world.seconds(14, 0, 1, 1000) < far
    assert mode_of(MODES[-1], 1).hypotheses and not mode_of(MODES[-1], 64).hypotheses
