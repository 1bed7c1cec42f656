"""What is foretold of hardware that is not at hand."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_orthrus.cli.main import main
from vllm_orthrus.policy.cost import Mode, Model
from vllm_orthrus.policy.devices import DEVICES
from vllm_orthrus.policy.plan import PUBLISHED, chance_of, choices, expected_tokens, fits, modes_for


@given(tokens=st.floats(1.01, 15.9), drafts=st.integers(15, 31))
def test_a_chance_gives_the_cycles_it_was_taken_from(tokens: float, drafts: int) -> None:
    assert expected_tokens(chance_of(tokens, drafts), drafts) == pytest.approx(tokens, rel=1e-6)


def test_what_an_engine_would_choose() -> None:
    """Few requests with easy text: far; many with short contexts: not at all, as rows are then what costs."""
    model, easy, hard = Model(), chance_of(12.7), chance_of(1.6)
    for device in DEVICES.values():
        best = choices(device, model, easy, 1, 2048)[0]
        assert best.mode.drafts == 15 and best.gain > 3, device.name
        assert choices(device, model, hard, 1, 2048)[0].gain < 1.5
        assert choices(device, model, hard, 64, 1024)[0].mode == Mode(0)
        for chance in (easy, hard):
            assert choices(device, model, chance, 64, 1024)[0].gain >= 1, "plain decoding is among them"


def test_modes_are_those_of_default_settings() -> None:
    assert modes_for(1)[-1] == Mode(15, 16, 4)
    assert [mode.drafts for mode in modes_for(8)] == [0, 3, 7, 15], "no room for hypotheses"


def test_memory() -> None:
    assert fits(DEVICES["RTX 4090"], Model(), 1, 2048)
    assert not fits(DEVICES["RTX 4090"], Model(), 64, 16384)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", "--base", "Qwen/Qwen3-8B", "--device", "H200", "rtx4090", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "does not fit" in said and "estimated, nothing was run" in said
    assert main(["plan", "--base", "Qwen/Qwen3-8B", "--device", "H200", "--head-quantization", "fp8"]) == 0
    in_fp8 = capsys.readouterr().out
    assert "base in bf16 and head in fp8" in in_fp8
    before, after = (float(re.findall(r"([\d.]+) GB of weights", text)[0]) for text in (said, in_fp8))
    assert before - after == pytest.approx(1.5, abs=0.11)
    found = json.loads(file.read_text())
    assert {one["text"] for one in found} == set(PUBLISHED["Qwen3-8B"])
    assert all(one["gain"] >= 1 for one in found)


def test_command_with_a_folder_and_measured_cycles(capsys: pytest.CaptureFixture[str]) -> None:
    base = Path(__file__).parents[2] / "examples" / "tiny-orthrus" / "base"
    assert main(["plan", "--base", str(base), "--tokens-per-cycle", "4.8", "--context", "512"]) == 0
    assert "4.8 a cycle" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--base", "my/model"], "neither a folder nor one of Qwen3-0.6B"),
        (["--base", "Qwen3-8B", "--device", "TPU"], "device 'TPU' is not known"),
        (["--base", "Qwen3-8B", "--tokens-per-cycle", "0.5"], "between 1 and 16"),
        (["--base", "Qwen3-8B", "--tensor-parallel-size", "3"], "must divide the model's 32 heads"),
        (["--base", "Qwen3-8B", "--context", "0"], "--context 0 must be at least 1"),
    ],
)
def test_what_is_refused(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *wrong]) == 2
    assert message in capsys.readouterr().err
