"""Steps that read prompts, as benchmarks/mixed_batches.py simulates them."""

import json
from pathlib import Path

import pytest

from benchmarks.evidence import FOLDER
from benchmarks.mixed_batches import MODEL, WAYS, Beside, Cell, Engine, seconds_beside, simulate, table
from benchmarks.traces import FILE
from vllm_orthrus.policy.cost import Device, Forward, forward_seconds
from vllm_orthrus.policy.devices import DEVICES
from vllm_orthrus.policy.replay import Text, read_traces

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "one-pass.md").read_text()
TEXTS = read_traces(json.loads(FILE.read_text())["text"])


@pytest.mark.parametrize("blocks", [0, 3])
def test_without_a_prompt_a_forward_is_one_of_the_cost_model(blocks: int) -> None:
    device = DEVICES["RTX 5090"]  # on which each view always has products of its own, at this size
    forward = Forward(3, 1024, 16, 16 * blocks, 16)
    found = seconds_beside(device, Beside(0, 0, 3, 1024, 16, blocks))
    assert found == pytest.approx(forward_seconds(device, MODEL, forward))
    assert seconds_beside(device, Beside(512, 0, 3, 1024, 16, blocks)) > 1.5 * found


def test_a_prompt_that_fits_into_a_step_has_nothing_between() -> None:
    times = simulate(Cell("H200", 3, 64, "log"), TEXTS, 2000)["times_apart"]
    assert times["between"] == times["plain"] == 1
    assert times["carried"] < 1


def test_riding_wins_where_it_should() -> None:
    """Outcomes that are always foreseen, and arithmetic that costs nothing: a draft pass is read for nothing."""
    known = DEVICES["H200"]
    device = Device(known.name, known.memory, 1e18, 1e18, known.launch, known.step, known.sharpness)
    foreseen = Text(TEXTS["log"].answers, dict.fromkeys((1, 2, 3, 4), 1.0), {number: [0] for number in (1, 2, 3, 4)})
    rates = {way: Engine(device, foreseen, 3, 16384, way).run(2000).tokens_per_second for way in WAYS}
    assert rates["carried"] > 1.02 * rates["apart"]
    assert rates["between"] > 1.01 * rates["apart"]


def test_the_page_has_the_table() -> None:
    found = json.loads((FOLDER / "mixed-batches.json").read_text())["cells"]
    assert "\n".join(table(found)) in PAGE, "python -m benchmarks.mixed_batches"
