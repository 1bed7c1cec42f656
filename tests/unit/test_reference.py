"""The reference against transformers: the AR view, the diffusion view, and the two-pass loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.conftest import SHAPES, make_base, make_head, make_reference
from vllm_orthrus.errors import UserError
from vllm_orthrus.heads import HeadConfig, open_head, save_head
from vllm_orthrus.heads.convert import merge_head
from vllm_orthrus.training.reference import Reference

PROMPTS = [[5, 17, 3, 99, 41], [7, 8], [11, 54, 2, 2, 90, 61, 33, 120, 4]]


def ar_logits(reference: Reference, prompt: list[int]) -> torch.Tensor:
    cache = reference.new_cache(1, len(prompt))
    ids = torch.tensor([prompt])
    return reference.logits(reference.autoregressive(ids, torch.arange(len(prompt))[None], cache))[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_ar_view_is_transformers(shape: str) -> None:
    """Batch of two with padding: right-padded for us, left-padded for transformers, compared where tokens are real."""
    reference = make_reference(make_base(shape))
    short, long = PROMPTS[0], PROMPTS[2]
    padding = len(long) - len(short)
    positions = torch.arange(len(long)).expand(2, -1)
    with torch.no_grad():
        cache = reference.new_cache(2, len(long))
        ours = reference.logits(reference.autoregressive(torch.tensor([short + [0] * padding, long]), positions, cache))
        mask = torch.tensor([[0] * padding + [1] * len(short), [1] * len(long)])
        theirs = reference.base(
            input_ids=torch.tensor([[0] * padding + short, long]),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).logits
    torch.testing.assert_close(ours[0, : len(short)], theirs[0, padding:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_block_of_one_with_ar_weights_is_the_ar_view(shape: str) -> None:
    """Oracle 1: with diff = AR weights, the anchor's row is an ordinary next-token prediction."""
    reference = make_reference(make_base(shape), block_size=1, noise=0.0)
    with torch.no_grad():
        for prompt in PROMPTS:
            cache = reference.new_cache(1, len(prompt))
            reference.autoregressive(torch.tensor([prompt[:-1]]), torch.arange(len(prompt) - 1)[None], cache)
            prefix = torch.tensor([len(prompt) - 1])
            drafted = reference.logits(reference.diffusion(torch.tensor(prompt[-1:]), prefix, cache))[0, 0]
            torch.testing.assert_close(drafted, ar_logits(reference, prompt)[-1], atol=1e-5, rtol=1e-5)


def test_a_block_is_bidirectional_and_sees_only_its_prefix() -> None:
    reference = make_reference(make_base())
    anchors, prefix = torch.tensor([9]), torch.tensor([4])
    with torch.no_grad():
        cache = reference.new_cache(1, 32)
        reference.autoregressive(torch.randint(0, 128, (1, 20)), torch.arange(20)[None], cache)
        before = reference.diffusion(anchors, prefix, cache)
        for side in (*cache.keys, *cache.values):
            side[:, :, 4:] = 1e9  # nothing at or behind the anchor may be looked at
        torch.testing.assert_close(reference.diffusion(anchors, prefix, cache), before)
        narrower = reference.diffusion(anchors, prefix, cache, width=7)
        assert (before[:, :7] - narrower).abs().max() > 1e-3, "the last row must be visible to the rows before it"


@pytest.mark.parametrize("shape", ["qwen3", "llama", "qwen2", "mistral"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_greedy_is_transformers_greedy(shape: str, noise: float) -> None:
    reference = make_reference(make_base(shape), noise=noise)
    generations = reference.generate(PROMPTS, max_new_tokens=40)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        expected = reference.base.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert generation.tokens == expected
        assert all(cycle.proposed == 7 for cycle in generation.cycles)
    assert len({token for generation in generations for token in generation.tokens}) > 20, (
        "output too plain to prove much"
    )


def test_oracle_head_is_always_accepted_and_a_fault_is_seen() -> None:
    """Block 1 with diff = AR weights: acceptance is 1; shift the prefix by one and it collapses."""
    reference = make_reference(make_base(), block_size=1, noise=0.0)
    generations = reference.generate(PROMPTS, max_new_tokens=30)
    assert {generation.tokens_per_cycle for generation in generations} == {2.0}

    sound = reference.diffusion
    reference.diffusion = lambda anchors, prefix, cache, width=None: sound(anchors, prefix - 1, cache, width)  # type: ignore[method-assign]
    faulty = reference.generate(PROMPTS, max_new_tokens=30)
    assert [g.tokens for g in faulty] == [g.tokens for g in generations], "a broken drafter may never change the text"
    assert max(generation.tokens_per_cycle for generation in faulty) < 1.95


def test_cycles_account_for_every_token() -> None:
    reference = make_reference(make_base(), noise=0.02)
    for generation in reference.generate(PROMPTS, max_new_tokens=50, num_drafts=3):
        produced = 1 + sum(cycle.accepted + 1 for cycle in generation.cycles)
        assert produced - 4 < len(generation.tokens) <= produced
        assert all(0 <= cycle.accepted <= cycle.proposed == 3 for cycle in generation.cycles)
    assert any(cycle.accepted for cycle in generation.cycles), "nothing was accepted: the test proves little"


def test_stop_token_ends_a_sequence_and_is_kept() -> None:
    reference = make_reference(make_base())
    free = reference.generate(PROMPTS, max_new_tokens=40)
    stop = free[0].tokens[12]
    for before, after in zip(free, reference.generate(PROMPTS, max_new_tokens=40, stop=[stop]), strict=True):
        end = before.tokens.index(stop) + 1 if stop in before.tokens else 40
        assert after.tokens == before.tokens[:end]


def test_seed_reproduces_and_drafting_is_lossless_in_kind() -> None:
    reference = make_reference(make_base(), noise=0.05)

    def sample(drafting: str, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        drawn = reference.generate(PROMPTS, 30, 0.9, drafting=drafting, generator=generator)  # type: ignore[arg-type]
        return [generation.tokens for generation in drawn]

    for drafting in ("probabilistic", "greedy"):
        assert sample(drafting, 3) == sample(drafting, 3) != sample(drafting, 4)


def test_fp64_agrees_with_fp32() -> None:
    base = make_base()
    single = make_reference(base).generate(PROMPTS, 20)
    double = make_reference(base.double()).generate(PROMPTS, 20)
    assert [g.tokens for g in single] == [g.tokens for g in double]


def test_impossible_requests_are_refused() -> None:
    reference = make_reference(make_base())
    with pytest.raises(ValueError, match="no prompt may be empty"):
        reference.generate([[1], []])
    with pytest.raises(UserError, match="num_drafts=9 exceeds the block of 8"):
        reference.generate([[1]], num_drafts=9)


@pytest.mark.parametrize("layout", ["head-only", "merged"])
def test_from_pretrained_reads_both_layouts(layout: str, tmp_path: Path) -> None:
    base = make_base("qwen3")
    base.save_pretrained(tmp_path / "base")
    head = make_head(base, 0.1)
    config = HeadConfig.for_base(base.config.to_dict(), 8, 127, "test/base")
    save_head(tmp_path / "head", head.published(), config)
    if layout == "merged":
        merge_head(open_head(tmp_path / "head"), tmp_path / "base", tmp_path / "merged")
        loaded = Reference.from_pretrained(tmp_path / "merged")
    else:
        loaded = Reference.from_pretrained(tmp_path / "base", tmp_path / "head")
    expected = Reference(base, head, config).generate(PROMPTS, 20)
    assert loaded.generate(PROMPTS, 20) == expected
