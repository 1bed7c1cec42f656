"""The selector without an engine: on disk, in training, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.unit.conftest import make_base, make_head
from tests.unit.test_trainer import InterruptedTrainer, configure, metrics, settings
from vllm_orthrus.cli.main import main
from vllm_orthrus.heads import (
    SELECTOR_PARTS,
    HeadConfig,
    HeadError,
    SelectorShape,
    named_parts,
    open_head,
    open_selector,
    save_head,
    save_selector,
)
from vllm_orthrus.heads.convert import extract_head, merge_head, quantize_head
from vllm_orthrus.heads.files import read_json
from vllm_orthrus.heads.store_files import write_json
from vllm_orthrus.heads.tensors import check_tensors
from vllm_orthrus.training.config import ConfigError, TrainConfig
from vllm_orthrus.training.reference import Reference
from vllm_orthrus.training.trainer import Trainer

__all__ = ["settings"]  # pytest's way to a fixture of another module

SHAPE = SelectorShape(rank=4, candidates=8)


def parts(hidden: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {part: torch.randn(SHAPE.rank, hidden, generator=generator) for part in SELECTOR_PARTS}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, a head with a selector beside it, and the selector alone."""
    base = make_base("qwen3")
    base.save_pretrained(tmp_path / "base")
    config = HeadConfig.for_base(base.config.to_dict(), 8, 127, "test/base", "v1", selector=SHAPE)
    selector = parts(base.config.hidden_size)
    save_head(tmp_path / "head", make_head(base, 0.1).published() | named_parts(selector), config)
    save_selector(tmp_path / "selector", selector, SHAPE, base.config)
    return tmp_path / "base", tmp_path / "head", tmp_path / "selector"


# On disk


def test_it_goes_wherever_its_head_goes(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, head, alone = folders
    expected = dict(open_selector(alone).tensors())
    extract_head(open_head(head), tmp_path / "bf16", "some/base", None, torch.bfloat16)
    merge_head(open_head(tmp_path / "bf16"), base, tmp_path / "merged")
    quantize_head(open_head(tmp_path / "merged"), tmp_path / "fp8", "fp8")
    for folder in (head, tmp_path / "bf16", tmp_path / "merged", tmp_path / "fp8"):
        found = open_head(folder)
        found.check_complete()
        assert found.selector is not None and found.selector.shape == SHAPE == found.config.selector
        for part, tensor in found.selector.tensors():
            torch.testing.assert_close(tensor.float(), expected[part], rtol=1e-2, atol=1e-2)
        assert all("selector" not in name for name, _ in found.tensors()), "a head's own tensors are what they were"


def test_a_version_that_does_not_know_it_refuses_the_head(folders: tuple[Path, Path, Path]) -> None:
    """What versions before did with all tensors that have a head's mark."""
    _, head, _ = folders
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(head / "model.safetensors").items()}
    with pytest.raises(HeadError, match=r"model\.selector_diff\.\w+\.weight has no place in this base"):
        check_tensors(shapes, open_head(head).config.shape, str(head))


@pytest.mark.parametrize(
    "written",
    [
        {"form": "recurrent", "rank": 4, "candidates": 8},
        {"form": "embedded", "rank": 4},
        {"form": "embedded", "rank": 4.0, "candidates": 8},
        {"form": "embedded", "rank": True, "candidates": 8},
        {"form": "embedded", "rank": 0, "candidates": 8},
        {"form": "embedded", "rank": 4, "candidates": 65},
        "embedded",
        [],
    ],
)
def test_what_it_does_not_know_is_refused(folders: tuple[Path, Path, Path], written: Any) -> None:
    for folder in folders[1:]:
        write_json(folder / "config.json", read_json(folder / "config.json") | {"head_selector": written})
        with pytest.raises(HeadError, match=r"head_selector=.*Upgrade vllm-orthrus|a selector's (rank|candidates)="):
            open_head(folder) if folder.name == "head" else open_selector(folder)


def test_damage_is_named(folders: tuple[Path, Path, Path]) -> None:
    base, head, alone = folders
    tensors = load_file(alone / "model.safetensors")
    hidden = open_head(head).config.shape.hidden_size
    gate = "model.selector_diff.gate.weight"
    for damaged, says in (
        ({name: tensor for name, tensor in tensors.items() if name != gate}, f"the selector lacks {gate}"),
        (
            tensors | {gate: tensors[gate][:, :-1].contiguous()},
            rf"{gate} is \(4, {hidden - 1}\).*needs \(4, {hidden}\)",
        ),
        (tensors | {gate: tensors[gate].to(torch.int8)}, f"{gate} is I8"),
        (
            tensors | {"model.selector_diff.more.weight": tensors[gate].clone()},
            "more.weight has no place in a",
        ),
    ):
        save_file(damaged, alone / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(HeadError, match=says):
            open_selector(alone).check_fits(read_json(base / "config.json"), hidden, "base")
    facts = read_json(head / "config.json")
    facts.pop("head_selector")
    write_json(head / "config.json", facts)
    with pytest.raises(HeadError, match=r"holds model\.selector_diff\.candidate\.weight, and its config\.json has no"):
        open_head(head)
    with pytest.raises(HeadError, match="holds no selector"):
        open_selector(base)


def test_another_base_is_a_warning(folders: tuple[Path, Path, Path]) -> None:
    base, head, alone = folders
    config, hidden = read_json(base / "config.json"), open_head(head).config.shape.hidden_size
    assert open_selector(alone).check_fits(config, hidden, "base") == []
    (warning,) = open_selector(alone).check_fits(config | {"rms_norm_eps": 1e-3}, hidden, "base")
    assert "isn't the base" in warning


# In training


@pytest.fixture
def trained_head(settings: dict[str, Any], tmp_path: Path) -> Path:
    return Trainer(configure(settings, output=str(tmp_path / "head-run"), run__max_steps=6)).run()


def selector_only(settings: dict[str, Any], head: Path, **changes: Any) -> TrainConfig:
    fixed = {"train": "selector", "head__initial": str(head), "selector__rank": 4, "selector__candidates": 8}
    return configure(settings, **(fixed | changes))


def test_resume_is_the_uninterrupted_run_bit_for_bit(
    settings: dict[str, Any], trained_head: Path, tmp_path: Path
) -> None:
    whole = selector_only(settings, trained_head)
    made = Trainer(whole).run()
    parts = selector_only(settings, trained_head, output=str(tmp_path / "parts"))
    with pytest.raises(KeyboardInterrupt):
        InterruptedTrainer(parts).run()
    again = Trainer(parts, resume=True).run()
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (made, again))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert metrics(parts) == metrics(whole)


@pytest.mark.parametrize(("loss", "steps", "left"), [("ce", 30, 0.8), ("ce_tv", 120, 0.99), ("kl", 60, 0.99)])
def test_it_learns_and_leaves_the_head_alone(
    settings: dict[str, Any], trained_head: Path, loss: str, steps: int, left: float
) -> None:
    some = {"run__max_steps": steps, "run__checkpoint_every": 100, "optimizer__learning_rate": 3e-2}
    config = selector_only(settings, trained_head, selector__loss=loss, **some)
    trainer = Trainer(config)
    before = {name: tensor.clone() for name, tensor in trainer.head.published().items()}
    made = trainer.run()
    losses = [line["loss"] for line in metrics(trainer.config)]
    few = steps // 6
    assert sum(losses[-few:]) < left * sum(losses[:few])
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.head.published().items())
    prompt = [[5, 6, 7, 8, 9]]
    alone = Reference.from_pretrained(config.base, trained_head)
    selected = Reference.from_pretrained(config.base, trained_head, selector=str(made))
    assert alone.generate(prompt, 24)[0].tokens == selected.generate(prompt, 24)[0].tokens


def test_a_head_may_be_trained_with_it(settings: dict[str, Any]) -> None:
    config = configure(settings, train="both", selector__rank=4, selector__candidates=8)
    made = open_head(Trainer(config).run())
    made.check_complete()
    assert made.selector is not None and made.selector.shape == SHAPE
    assert any(tensor.any() for part, tensor in made.selector.tensors() if part == "candidate"), "it has learnt"
    Trainer(configure(settings, train="both", selector__rank=4, selector__candidates=8), resume=True)


def test_commands(
    settings: dict[str, Any], trained_head: Path, folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained_head.parent / "selector.yaml"
    config.write_text(yaml.safe_dump(settings))
    wanted = ["--set", "selector.rank=4", "--set", "selector.candidates=8", "--set", "run.max_steps=2"]
    assert main(["train", "--selector-only", "--head", str(trained_head), "--config", str(config), *wanted]) == 0
    made = Path(settings["output"]) / "selector"
    assert f"selector written to {made}" in capsys.readouterr().out
    assert open_selector(made).shape == SHAPE
    for head in folders[1], trained_head:
        assert main(["head", "inspect", str(head)]) == 0
    told = capsys.readouterr().out
    assert "rank 4, 8 candidates" in told and "selector:      none" in told


@pytest.mark.parametrize(("value", "said"), [(math.nan, "values that are not finite"), (0.0, "nothing but zeros")])
def test_nonsense_is_told(
    value: float, said: str, folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that it spoils draft as the head alone, so the head is of use all the same."""
    base, head, _ = folders
    tensors = load_file(head / "model.safetensors")
    tensors["model.selector_diff.gate.weight"].fill_(value)
    save_file(tensors, head / "model.safetensors")
    for tool in ["inspect", str(head)], ["verify", str(head), "--base", str(base)]:
        assert main(["head", *tool]) == 0
        assert f"its selector has {said} in 1 of its 3 tensors, the first of them gate" in capsys.readouterr().out


def test_what_cannot_be_trained(settings: dict[str, Any], folders: tuple[Path, Path, Path], trained_head: Path) -> None:
    with pytest.raises(ValueError, match=r"train=selector .* head\.initial names none"):
        configure(settings, train="selector")
    with pytest.raises(ConfigError, match=r"selector\.rank=5, and selector\.initial=.* has rank 4"):
        Trainer(selector_only(settings, trained_head, selector__rank=5, selector__initial=str(folders[2])))
