"""A widened model is the same function: both views, through the cache, and in the choice of every token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from vllm_orthrus.heads import HeadError, named_parts, open_head, open_selector, save_head, widen
from vllm_orthrus.training.evaluate import first_per_class, read_prompts
from vllm_orthrus.training.reference import Reference

TINY = Path(__file__).parents[2] / "examples" / "tiny-orthrus"
WIDER: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 512,
    "intermediate_size": 1152,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 128,
    "vocab_size": 1500,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    return [prompt.tokens for prompt in first_per_class(read_prompts(TINY / "heldout.jsonl", tokenizer), 1)]


@pytest.fixture(scope="module")
def trained() -> Reference:
    return Reference.from_pretrained(TINY / "base", TINY / "head")


def widened(folder: Path) -> Reference:
    widening = widen.widen_base(TINY / "base", WIDER, folder / "base", torch.float32)
    widen.widen_head(TINY / "head", widening, folder / "head")
    return Reference.from_pretrained(folder / "base", folder / "head")


@torch.inference_mode()
def both_views(reference: Reference, prompts: list[list[int]]) -> list[Tensor]:
    """Logits of every prompt, and of the block behind it."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        cache = reference.new_cache(1, len(prompt))
        found.append(reference.logits(reference.autoregressive(ids, torch.arange(len(prompt))[None], cache))[0])
        prefix = torch.tensor([len(prompt) - 1])  # the last token is the anchor
        found.append(reference.logits(reference.diffusion(ids[:, -1], prefix, cache))[0])
    return found


def distance(trained: Reference, wide: Reference, prompts: list[list[int]]) -> float:
    """Between the logits of both, over all tokens that both have."""
    pairs = zip(both_views(trained, prompts), both_views(wide, prompts), strict=True)
    return max(float((theirs[:, : mine.shape[1]] - mine).abs().max()) for mine, theirs in pairs)


def test_the_same_logits_in_both_views(tmp_path: Path, trained: Reference, prompts: list[list[int]]) -> None:
    wide = widened(tmp_path)
    assert distance(trained, wide, prompts) < 2e-4
    known = trained.shape.vocab_size
    for logits in both_views(wide, prompts):
        assert logits[:, known:].max() < logits[:, :known].min() - 100, "tokens that were added could be chosen"


def test_the_same_text_and_acceptance(tmp_path: Path, trained: Reference, prompts: list[list[int]]) -> None:
    wide = widened(tmp_path)
    assert wide.generate(prompts, 24, drafting="greedy") == trained.generate(prompts, 24, drafting="greedy")


def test_a_selector_is_widened_with_its_head(tmp_path: Path, prompts: list[list[int]]) -> None:
    head, selector = open_head(TINY / "head"), open_selector(TINY / "selector")
    tensors = dict(head.stored()) | named_parts(dict(selector.tensors()))
    save_head(tmp_path / "small", tensors, replace(head.config, selector=selector.shape))
    widening = widen.widen_base(TINY / "base", WIDER, tmp_path / "base", torch.float32)
    widen.widen_head(tmp_path / "small", widening, tmp_path / "head")
    small = Reference.from_pretrained(TINY / "base", tmp_path / "small")
    wide = Reference.from_pretrained(tmp_path / "base", tmp_path / "head")
    assert wide.selector is not None
    cycles = [run.cycles for run in small.generate(prompts, 24)]
    assert [run.cycles for run in wide.generate(prompts, 24)] == cycles
    widen.widen_selector(TINY / "selector", widening, tmp_path / "selector")
    widen.widen_head(TINY / "head", widening, tmp_path / "alone")
    beside = Reference.from_pretrained(tmp_path / "base", tmp_path / "alone", selector=str(tmp_path / "selector"))
    assert [run.cycles for run in beside.generate(prompts, 24)] == cycles


@pytest.mark.parametrize("forgotten", ["scale", "places", "groups"])
def test_what_zeros_change_is_noticed(
    forgotten: str, tmp_path: Path, trained: Reference, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms as they were, values away from their rotary frequency, and query heads that read another's keys."""
    if forgotten == "scale":
        monkeypatch.setattr(widen.Widening, "scale", lambda self, part: 1.0)
    elif forgotten == "places":
        right = widen.Widening.places
        monkeypatch.setattr(
            widen.Widening, "places", lambda self, axis: torch.arange(64) if axis == "dim" else right(self, axis)
        )
    else:
        monkeypatch.setattr(widen.Shape, "group", 2)
    assert distance(trained, widened(tmp_path), prompts) > 1e-2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": 256}, "less of: hidden"),
        ({"num_attention_heads": 3}, "query heads per head"),
        ({"num_hidden_layers": 3}, "less of: layers"),
        ({"head_dim": 96}, "multiple"),
        ({"hidden_size": 320}, "to spare"),
        ({"model_type": "llama"}, "only Qwen3"),
    ],
)
def test_what_is_refused(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=problem):
        widen.widen_base(TINY / "base", WIDER | change, tmp_path / "base", torch.float32)


@pytest.mark.parametrize(("like", "layers", "hidden"), [("Qwen3-8B", 36, 4096), ("28x1280", 28, 1280)])
def test_shapes_by_name(like: str, layers: int, hidden: int) -> None:
    trained = widen.read_config(TINY / "base")
    shape = widen.shape_like(like, trained)
    widening = widen.Widening(trained, shape, torch.bfloat16)  # refuses what cannot be widened
    assert (widening.new.base.num_layers, widening.new.base.hidden_size) == (layers, hidden)


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(HeadError, match=r"--like Qwen4.*LAYERSxHIDDEN.*Qwen3-8B"):
        widen.shape_like("Qwen4", {})
