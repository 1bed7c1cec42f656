"""The trainer: exact resume, what it leaves behind, several processes, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.unit.conftest import TINY, make_base, make_head
from vllm_orthrus.cli.main import main
from vllm_orthrus.heads import HeadConfig, open_head, save_head
from vllm_orthrus.training.config import ConfigError, TrainConfig
from vllm_orthrus.training.parts import choose_mask_token
from vllm_orthrus.training.reference import Reference
from vllm_orthrus.training.schedule import learning_rate, rows_of_step
from vllm_orthrus.training.trainer import Trainer


@pytest.fixture
def settings(tmp_path: Path, base_folder: Path, write_jsonl: Callable[..., Path]) -> dict[str, Any]:
    """A run of a few seconds: counting, in rows of 48."""
    lines = [
        {"class": "counting", "prompt": f"Count from {i}.", "answer": ", ".join(map(str, range(i, i + 12)))}
        for i in range(40)
    ]
    data = write_jsonl(*lines)
    return {
        "base": str(base_folder),
        "output": str(tmp_path / "run"),
        "data": {"source": str(data), "row_length": 48},
        "head": {"block_size": 4, "dtype": "fp32"},
        "objective": {"anchors_per_row": 4},
        "optimizer": {"learning_rate": 1e-2},
        "run": {
            "rows_per_step": 4,
            "rows_per_device": 2,
            "max_steps": 8,
            "checkpoint_every": 4,
            "log_every": 1,
            "precision": "fp32",
        },
    }


def configure(settings: dict[str, Any], **changes: Any) -> TrainConfig:
    """Changes are given as section__name=value."""
    settings = json.loads(json.dumps(settings))
    for key, value in changes.items():
        *sections, name = key.split("__")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return TrainConfig.model_validate(settings)


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return lines


class InterruptedTrainer(Trainer):
    """Stops dead in its sixth step: the checkpoint of step 4 is what is left."""

    def _step(self, step: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return super()._step(step)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_the_uninterrupted_run_bit_for_bit(settings: dict[str, Any], tmp_path: Path, precision: str) -> None:
    whole = configure(settings, run__precision=precision)
    Trainer(whole).run()
    parts = configure(settings, output=str(tmp_path / "parts"), run__precision=precision)
    with pytest.raises(KeyboardInterrupt):
        InterruptedTrainer(parts).run()
    Trainer(parts, resume=True).run()
    expected, resumed = (load_file(config.output / "head" / "model.safetensors") for config in (whole, parts))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert metrics(parts) == metrics(whole)
    a, b = (
        torch.load(c.output / "checkpoints" / "step-0000008" / "optimizer.pt", weights_only=True)
        for c in (whole, parts)
    )
    for name, state in a["state"].items():
        assert all(torch.equal(state[key], b["state"][name][key]) for key in state)


def test_training_learns_and_leaves_the_base_alone(settings: dict[str, Any], base_folder: Path) -> None:
    before = load_file(base_folder / "model.safetensors")
    trainer = Trainer(configure(settings, run__max_steps=30, run__checkpoint_every=100))
    trainer.run()
    losses = [line["loss"] for line in metrics(trainer.config)]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in trainer.base.parameters())
    after = {name: value for name, value in trainer.base.state_dict().items() if name in before}
    assert len(after) == len(before) and all(torch.equal(before[name], after[name].float()) for name in before)


@pytest.mark.parametrize("objective", ["kl", "ce"])
def test_checkpoints_and_export_load_as_heads(settings: dict[str, Any], base_folder: Path, objective: str) -> None:
    config = configure(settings, objective__kind=objective, head__dtype="bf16", run__keep_checkpoints=1)
    head = Trainer(config).run()
    assert [path.name for path in sorted((config.output / "checkpoints").iterdir())] == ["step-0000008"]
    for folder in (head, config.output / "checkpoints" / "step-0000008"):
        open_head(folder).check_complete()
        assert Reference.from_pretrained(base_folder, folder).generate([[5, 6, 7]], 10)[0].tokens
    assert {tensor.dtype for _, tensor in open_head(head).tensors()} == {torch.bfloat16}
    assert open_head(head).config.base.name == str(base_folder)


def test_interrupted_checkpoint_is_never_taken_for_one(settings: dict[str, Any]) -> None:
    config = configure(settings)
    Trainer(config).run()
    (config.output / "checkpoints" / ".step-0000099.tmp").mkdir()
    assert Trainer(config, resume=True).progress.step == 8


def test_initial_head_is_where_training_starts(settings: dict[str, Any], tmp_path: Path, base_folder: Path) -> None:
    first = Trainer(configure(settings)).run()
    again = Trainer(configure(settings, output=str(tmp_path / "second"), head__initial=str(first)))
    expected = load_file(first / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.head.published().items())


def test_evaluation_measures_real_tokens_per_cycle(settings: dict[str, Any], write_jsonl: Callable[..., Path]) -> None:
    held_out = write_jsonl({"class": "a", "prompt": "Count from 3."}, {"class": "b", "prompt": "x"}, name="held.jsonl")
    config = configure(settings, evaluation__prompts=str(held_out), evaluation__every=4, evaluation__max_new_tokens=12)
    Trainer(config).run()
    measured = [line["tokens_per_cycle"] for line in metrics(config) if "tokens_per_cycle" in line]
    assert len(measured) == 2 and all(set(line) == {"a", "b", "all"} for line in measured)
    assert all(1 <= value <= 4 for line in measured for value in line.values())


@pytest.mark.slow
def test_two_processes_train_as_one(settings: dict[str, Any], tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    """Data-parallel training takes the same steps as one process, up to the order of summation."""
    held_out = write_jsonl(*({"class": kind, "prompt": f"Count from {kind}."} for kind in "abc"), name="held.jsonl")
    settings["evaluation"] = {"prompts": str(held_out), "max_new_tokens": 8}
    alone = configure(settings)
    Trainer(alone).run()
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(json.loads(configure(settings, output=str(tmp_path / "two")).model_dump_json())))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "vllm_orthrus.cli.main",
        "train",
        "--config",
        str(path),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = (load_file(folder / "head" / "model.safetensors") for folder in (alone.output, tmp_path / "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=2e-3)
    measured = [line["tokens_per_cycle"] for line in metrics(configure(settings, output=str(tmp_path / "two")))
                if "tokens_per_cycle" in line]  # fmt: skip
    assert [set(line) for line in measured] == [{"a", "b", "c", "all"}], "each process decodes a share, once"


@pytest.mark.slow
def test_some_steps_of_the_shipped_recipe_improves_the_head(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    """The recipe of the tiny checkpoint, on a little of its kind of text: so many steps, however long one takes."""
    lines = [
        {"prompt": f"Count from {i} to {i + 24 * step} in steps of {step}.",
         "answer": ", ".join(map(str, range(i, i + 25 * step, step)))}
        for step in range(1, 6) for i in range(60)
    ]  # fmt: skip
    data = write_jsonl(*lines)
    overrides = [
        f"output={tmp_path / 'run'}",
        f"data.source={data}",
        f"base={TINY / 'base'}",
        "run.max_minutes=6",
        "run.max_steps=16",
        "run.log_every=1",
        "run.checkpoint_every=1000",
        "evaluation.prompts=null",
    ]
    config = TrainConfig.read(TINY / "train.yaml", overrides)
    Trainer(config).run()
    expected = [line["teacher_forced_tokens_per_cycle"] for line in metrics(config)]
    assert sum(expected[-3:]) > 1.2 * sum(expected[:3]), f"teacher-forced tokens per cycle: {expected}"


# Refusals


def test_a_used_output_is_not_overwritten(settings: dict[str, Any]) -> None:
    Trainer(configure(settings)).run()
    with pytest.raises(ConfigError, match=r"already holds step-0000008 .* --resume"):
        Trainer(configure(settings))


def test_resume_refuses_changed_settings(settings: dict[str, Any]) -> None:
    Trainer(configure(settings)).run()
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate \(0.01 -> 0.5\)"):
        Trainer(configure(settings, optimizer__learning_rate=0.5), resume=True)
    Trainer(configure(settings, run__checkpoint_every=3), resume=True)


def test_impossible_batches_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"run.rows_per_step=4 is not a multiple of run.rows_per_device=3"):
        Trainer(configure(settings, run__rows_per_device=3))


def test_initial_head_must_fit(settings: dict[str, Any], tmp_path: Path) -> None:
    other = make_base(num_hidden_layers=1)
    save_head(tmp_path / "other", make_head(other).published(), HeadConfig.for_base(other.config.to_dict(), 4, 5, None))
    with pytest.raises(ValueError, match=r"does not fit .*num_layers \(head 1, base 2\)"):
        Trainer(configure(settings, head__initial=str(tmp_path / "other")))


def test_sliding_windows_are_refused(settings: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    make_base("mistral", vocab_size=1024, sliding_window=16).save_pretrained(tmp_path / "windowed")
    tokenizer.save_pretrained(tmp_path / "windowed")
    with pytest.raises(ValueError, match=r"sliding_window=16.*Use a base with full attention"):
        Trainer(configure(settings, base=str(tmp_path / "windowed")))


def test_mask_token_is_the_tokenizers_or_a_spare_row(tokenizer: Any) -> None:
    import copy

    assert choose_mask_token(tokenizer, 1024) == tokenizer.mask_token_id
    bare = copy.deepcopy(tokenizer)
    bare.mask_token = None
    assert choose_mask_token(bare, len(bare) + 5) == len(bare)
    with pytest.raises(ConfigError, match=r"head.mask_token_id is not set.*Set head.mask_token_id"):
        choose_mask_token(bare, len(bare))


# The schedule


def test_every_epoch_sees_every_row_once() -> None:
    seen = [pair for step in range(5) for pair in rows_of_step(step, 6, 10, seed=1)]
    assert sorted(seen) == [(epoch, row) for epoch in range(3) for row in range(10)]
    assert [row for epoch, row in seen if epoch == 0] != [row for epoch, row in seen if epoch == 1]


def test_learning_rate_warms_up_and_ends_at_its_ratio() -> None:
    optimizer = TrainConfig(base="b", output=Path("o"), data={"source": "s"}).optimizer  # type: ignore[arg-type]
    rates = [learning_rate(step, 1000, optimizer) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-4 / 50) and max(rates) == pytest.approx(2e-4) == pytest.approx(rates[50])
    assert rates[-1] == pytest.approx(2e-5, rel=0.01)
    assert rates[50:] == sorted(rates[50:], reverse=True)


# The commands


def test_commands_end_to_end(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """train -> report -> head inspect, verify, convert, extract, as a user would type them."""
    path, run, base = tmp_path / "train.yaml", tmp_path / "run", settings["base"]
    path.write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(path), "--set", "run.max_steps=6"]) == 0
    assert main(["report", str(run)]) == 0 and (run / "report.png").stat().st_size > 10_000
    assert main(["head", "inspect", str(run / "head")]) == 0
    assert "complete" in capsys.readouterr().out
    prompts = tmp_path / "data.jsonl"
    verify = ["head", "verify", str(run / "head"), "--base", base, "--prompts", str(prompts), "--per-class", "3"]
    assert main([*verify, "--max-new-tokens", "10", "--drafts", "2", "--json", str(tmp_path / "figures.json")]) == 0
    assert "tok/cycle" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())["classes"]["counting"]
    assert 1 <= figures["tokens_per_cycle"] <= 3 and len(figures["accepted"]) == 2
    merged, again = str(tmp_path / "merged"), tmp_path / "again"
    assert main(["head", "convert", str(run / "head"), merged, "--base", base]) == 0
    assert main(["head", "extract", merged, str(again), "--base", base]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (run / "head", again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_commands_explain_what_is_wrong(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["head", "verify", settings["base"], "--base", settings["base"]]) == 2
    assert "holds no `_diff` tensors" in capsys.readouterr().err or "no block_size" in capsys.readouterr().err
    assert main(["train", "--config", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml is not a file" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2


def test_answers_are_the_bases_own(settings: dict[str, Any], tmp_path: Path) -> None:
    """Written in parts, continued, and equal to greedy decoding."""
    source, output = settings["data"]["source"], tmp_path / "answers.jsonl"
    arguments = [
        "answers",
        "--base",
        settings["base"],
        "--prompts",
        source,
        "--output",
        str(output),
        "--engine",
        "transformers",
    ]
    assert main([*arguments, "--max-new-tokens", "9", "--limit", "3", "--batch", "2"]) == 0
    assert main([*arguments, "--max-new-tokens", "9", "--limit", "5", "--batch", "2"]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [f"Count from {i}." for i in range(5)]
    reference = Reference.from_pretrained(settings["base"], _copy_head(settings["base"], tmp_path / "copy"))
    for line in lines:
        expected = reference.generate([line["prompt_token_ids"]], 9, stop=[2])[0].tokens
        assert line["answer_token_ids"] == expected


def _copy_head(base: str, folder: Path) -> Path:
    from vllm_orthrus.training.reference import load_base

    model = load_base(base, torch.float32)
    save_head(folder, make_head(model).published(), HeadConfig.for_base(model.config.to_dict(), 4, 3, base))
    return folder
