"""One pass replayed from tables is one pass, and rows are spent as they are said to be."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.known_blocks import Blocks, Sight, draft_everywhere, read_blocks
from benchmarks.replayed_pass import Way, replay, whole_blocks
from benchmarks.row_choice import Outlook, by_rank, fill
from tests.unit.conftest import TINY, make_base, make_reference
from vllm_orthrus.kernels.chances import Drafts
from vllm_orthrus.kernels.hypotheses import NONE
from vllm_orthrus.training.evaluate import first_per_class, read_prompts
from vllm_orthrus.training.reference import Reference
from vllm_orthrus.training.simulator import OnePass

LIMIT, STOP = 32, [2]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    return [prompt.tokens for prompt in first_per_class(read_prompts(TINY / "heldout.jsonl", tokenizer), 1)][::2]


@pytest.fixture(scope="module")
def blocks(tiny: Reference, prompts: list[list[int]]) -> Blocks:
    answers = [run.tokens for run in tiny.generate(prompts, LIMIT + 34)]
    [found] = read_blocks(tiny, prompts, answers, LIMIT, STOP, (4, 8, 16))
    return found


@pytest.mark.parametrize(("hypotheses", "width"), [(4, 16), (1, 16), (6, 4)])
def test_a_replay_takes_the_steps_of_one_pass(
    tiny: Reference, prompts: list[list[int]], blocks: Blocks, hypotheses: int, width: int
) -> None:
    expected = OnePass(tiny, hypotheses, width=width).generate(prompts, LIMIT, STOP)
    assert replay(blocks, Way("equal", hypotheses * width, (width,) * hypotheses)) == [run.steps for run in expected]


def test_whole_blocks_alone_are_filled_as_an_engine_chooses_them(blocks: Blocks) -> None:
    whole = blocks._replace(widths=(16,), tokens=blocks.tokens[2:], probability=blocks.probability[2:])
    assert replay(whole, Way("filled", 64)) == replay(blocks, Way("equal", 64, (16,) * 4))


def test_who_is_told_takes_fewer_steps(blocks: Blocks) -> None:
    """Known lengths must be worth something, or widths are not what decides."""
    counts = {
        how: sum(map(len, replay(blocks, Way("filled", 48, (), how))))  # type: ignore[arg-type]
        for how in ("fixed", "told")
    }
    assert counts["told"] < counts["fixed"]
    assert whole_blocks(blocks).max() > 4


def outlook(lengths: list[int]) -> Outlook:
    """One request with three drafts; after the outcome a, blocks yield lengths[a] drafts and no more."""
    bonus = torch.tensor([0.6, 0.3]).expand(1, 4, 2)
    drafts = Drafts(
        torch.tensor([[11, 12, 13]]),
        torch.tensor([3]),
        torch.tensor([0]),
        torch.tensor([[0.5, 0.5, 0.5]]),
        torch.arange(20, 28).view(1, 4, 2),
        bonus,
    )
    yields = torch.arange(16).minimum(torch.tensor(lengths)[:, None]) + torch.arange(16) / 1000
    outcome = torch.tensor([[0.4, 0.1, 0.1, 0.4]])
    return Outlook(outcome, bonus, drafts, torch.tensor([10]), torch.tensor([16]), yields[None])


def test_rows_go_where_drafts_are_kept() -> None:
    chosen = fill(outlook([2, 2, 2, 12]), 40, (2, 4, 8, 16))
    assert int(chosen.width.sum()) <= 40
    width = {
        (int(accepted), int(token)): int(rows)
        for accepted, token, rows in zip(chosen.accepted[0], chosen.token[0], chosen.width[0], strict=True)
        if accepted != NONE
    }
    assert width[0, 20] == 2  # likely, but nothing is kept behind the second row
    assert width[3, 26] == 16  # as likely, and long


def test_widths_by_rank_are_given_in_the_order_of_choice() -> None:
    chosen = by_rank(outlook([9, 9, 9, 9]), (16, 8, 4), 16)
    assert chosen.width.tolist() == [[16, 8, 4]]
    assert chosen.accepted.shape == (1, 3)


@pytest.mark.parametrize("sight", [Sight(), Sight(0, 4), Sight(2, 3)])
def test_blocks_see_what_they_are_said_to_see(sight: Sight) -> None:
    reference = make_reference(make_base(), noise=0.02)
    text, places = torch.randint(0, 128, (14,), generator=torch.Generator().manual_seed(0)), torch.tensor([10, 12])

    def drafted(changed: list[int], seen: Sight = sight) -> torch.Tensor:
        cache = reference.new_cache(1, len(text))
        with torch.inference_mode():
            reference.autoregressive(text[None], torch.arange(len(text))[None], cache)
            for side in (*cache.keys, *cache.values):
                side[:, :, changed] += 1
        return draft_everywhere(reference, cache, text, places, 8, seen)

    known = drafted([])
    for position in range(len(text)):
        differs = ((drafted([position]) - known).abs().amax((1, 2)) > 1e-4).tolist()
        last = len(text) if sight.last is None else sight.last
        assert differs == [
            position < place and (position < sight.first or position >= place - last) for place in places.tolist()
        ]
    if sight.last is None:
        cache = reference.new_cache(2, len(text))
        with torch.inference_mode():
            reference.autoregressive(text.expand(2, -1), torch.arange(len(text)).expand(2, -1), cache)
            torch.testing.assert_close(known, reference.diffusion(text[places], places, cache, 8), atol=1e-5, rtol=1e-5)
