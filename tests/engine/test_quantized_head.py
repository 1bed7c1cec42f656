"""A head in fp8 in the engine: converted or rounded while loading it is the same head, and nearly as good a one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.engine.conftest import Checkpoints, StartEngine
from tests.engine.harness import Counts, Engine
from tests.engine.test_config import build, orthrus
from tests.engine.trained import OPTIONS, TINY, chat, questions, trained_head
from vllm_orthrus.engine.costs import model_of
from vllm_orthrus.heads import open_head, quantize
from vllm_orthrus.heads.convert import merge_head, quantize_head

FP8 = {"orthrus_head_quantization": "fp8"}


# Settings


def test_what_may_be_set(tiny: Checkpoints) -> None:
    assert build(tiny.base, orthrus(tiny.block_head)).speculative_config.orthrus_head_quantization is None
    assert build(tiny.base, orthrus(tiny.block_head, **FP8)).speculative_config.orthrus_head_quantization == "fp8"
    for wrong in ("int8", "", 8, True):
        with pytest.raises(ValueError, match=r"orthrus_head_quantization\s+Input should be 'fp8'"):
            build(tiny.base, orthrus(tiny.block_head, orthrus_head_quantization=wrong))
    with pytest.raises(ValueError, match=r"quantization='fp8' does not apply .*set orthrus_head_quantization"):
        build(tiny.base, orthrus(tiny.block_head, quantization="fp8"))


def test_a_checkpoint_says_how_it_is_stored(tiny: Checkpoints, tmp_path: Path) -> None:
    quantize_head(open_head(tiny.block_head), tmp_path / "fp8", "fp8")
    for settings in ({}, FP8):
        config = build(tiny.base, orthrus(tmp_path / "fp8", **settings)).speculative_config
        assert config.orthrus_head_quantization == "fp8"


def test_no_byte_is_saved_on_a_cpu(tiny: Checkpoints) -> None:
    """Nor does the cost model say so."""
    assert model_of(build(tiny.base, orthrus(tiny.block_head, **FP8))).head_weight_bytes == 4


# In the engine


class Told(NamedTuple):
    tokens: list[list[int]]
    counts: Counts
    accepted_at: dict[int, int]
    one_pass: dict[str, int]


def tell(engine: Engine) -> Told:
    """Of two questions of each class."""
    run = engine.run([chat(engine, question) for question in questions(2)], 64)
    return Told(run.tokens, run.counts, dict(engine.accepted_at), dict(engine.one_pass))


Tell = Callable[..., Told]


@pytest.fixture
def told(start: StartEngine) -> Tell:
    def tell_it(passes: str, base: Path = TINY / "base", **settings: Any) -> Told:
        return tell(start(trained_head(passes, **settings), base, **OPTIONS))

    return tell_it


@pytest.mark.feature("heads in fp8")
@pytest.mark.parametrize("passes", ["two", "one"])
def test_converted_is_rounded_while_loading(passes: str, told: Tell, tmp_path: Path) -> None:
    """Text and every counter, from a head of its own and from a merged checkpoint; and nearly what it was."""
    trained = open_head(TINY / "head")
    quantize_head(trained, tmp_path / "fp8", "fp8")
    merge_head(trained, TINY / "base", tmp_path / "merged", "fp8")
    as_trained, rounded = told(passes), told(passes, **FP8)
    assert told(passes, model=str(tmp_path / "fp8")) == rounded
    assert told(passes, tmp_path / "merged", model=str(tmp_path / "merged")) == rounded
    assert rounded.tokens == as_trained.tokens
    assert (rounded.counts, rounded.accepted_at) != (as_trained.counts, as_trained.accepted_at), "nothing was rounded"
    assert per_cycle(rounded) == pytest.approx(per_cycle(as_trained), rel=0.03)
    assert per_cycle(rounded) > 3


def per_cycle(told: Told) -> float:
    return 1 + told.counts.accepted / told.counts.steps


def without_scales(quantized: quantize.Quantized) -> torch.Tensor:
    return quantized.stored.float() * quantized.scale.mean()


def of_other_channels(quantized: quantize.Quantized) -> torch.Tensor:
    return quantized.stored.float() * quantized.scale.flip(0)


def of_inputs(quantized: quantize.Quantized) -> torch.Tensor:
    """Transposed, as far as there are as many."""
    stored, scale = quantized
    return stored.float() * scale.t().repeat(1, -(-stored.shape[1] // len(scale)))[:, : stored.shape[1]]


@pytest.mark.parametrize("fault", [without_scales, of_other_channels, of_inputs])
def test_planted_faults(
    fault: Callable[[quantize.Quantized], torch.Tensor], told: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong scales give no wrong text, and fewer drafts that are kept: the gate above would be red."""
    expected = told("two", **FP8)
    monkeypatch.setattr(quantize, "dequantize", fault)
    faulty = told("two", **FP8)
    assert faulty.tokens == expected.tokens
    assert per_cycle(faulty) < 0.97 * per_cycle(expected)
