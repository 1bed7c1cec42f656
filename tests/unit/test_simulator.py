"""One pass against the two-pass loop: the same text, the same blocks, and never better than an oracle would allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.unit.conftest import TINY, make_base, make_reference
from tests.unit.test_rejection import chi_square
from vllm_orthrus.errors import UserError
from vllm_orthrus.kernels.hypotheses import NONE, Hypotheses
from vllm_orthrus.training import simulator
from vllm_orthrus.training.evaluate import first_per_class, read_prompts
from vllm_orthrus.training.reference import Cache, Generation, Reference, tokens_per_cycle
from vllm_orthrus.training.simulator import OnePass, Run, Sequences, figures, forward

PROMPTS = [[5, 17, 3, 99, 41], [7, 8], [11, 54, 2, 2, 90, 61, 33, 120, 4]]
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    return [prompt.tokens for prompt in first_per_class(read_prompts(TINY / "heldout.jsonl", tokenizer), 2)]


@pytest.fixture(scope="module")
def two_pass(tiny: Reference, prompts: list[list[int]]) -> list[Generation]:
    return tiny.generate(prompts, NEW_TOKENS)


def ratio(runs: list[Run], two_pass: list[Generation]) -> float:
    cycles = [cycle for generation in two_pass for cycle in generation.cycles]
    return figures(runs).tokens_per_forward / (tokens_per_cycle(cycles) / 2)


# The forward


def test_a_block_that_rides_along_is_the_block_of_a_separate_pass() -> None:
    """Every place from the anchor to behind the last draft, right and wrong tokens alike."""
    reference = make_reference(make_base())
    drafts, prefix = 4, torch.tensor([len(prompt) for prompt in PROMPTS])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128, (3, drafts + 1), generator=generator)
    positions = prefix[:, None] + torch.arange(drafts + 1)
    places = torch.tensor([-1, *range(drafts + 1), NONE]).expand(3, -1)
    hypotheses = Hypotheses(places, torch.randint(0, 128, places.shape, generator=generator))
    with torch.no_grad():
        fused, separate = (read(reference) for _ in range(2))
        verified, blocks = forward(reference, fused, ids, positions, hypotheses, prefix, width=8)
        expected = reference.autoregressive(ids, positions, separate)
        torch.testing.assert_close(verified, expected, atol=1e-5, rtol=1e-5)
        for mine, theirs in zip((*fused.keys, *fused.values), (*separate.keys, *separate.values), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        for h in range(drafts + 2):
            block = reference.diffusion(hypotheses.token[:, h], prefix + places[:, h] + 1, separate, 8)
            torch.testing.assert_close(blocks[:, h], block, atol=1e-5, rtol=1e-5)
            wrong = reference.diffusion(hypotheses.token[:, h], prefix + places[:, h], separate, 8)
            assert (blocks[:, h] - wrong).abs().max() > 1e-3, "the check cannot see a prefix that is off by one"


def read(reference: Reference) -> Cache:
    cache = reference.new_cache(len(PROMPTS), 32)
    ids = torch.tensor([prompt + [0] * (9 - len(prompt)) for prompt in PROMPTS])
    reference.autoregressive(ids, torch.arange(9).expand_as(ids), cache)
    return cache


# The text


@pytest.mark.parametrize(("hypotheses", "drafts", "carry_all"), [(1, None, False), (3, 3, True), (5, 7, False)])
def test_greedy_is_the_two_pass_text(hypotheses: int, drafts: int | None, carry_all: bool) -> None:
    reference = make_reference(make_base(), noise=0.02)
    expected = reference.generate(PROMPTS, 40)
    stop = [expected[0].tokens[25]]
    for ends in ([], stop):
        loop = OnePass(reference, hypotheses, num_drafts=drafts, carry_all=carry_all)
        runs = loop.generate(PROMPTS, 40, ends)
        assert [run.tokens for run in runs] == [g.tokens for g in reference.generate(PROMPTS, 40, stop=ends)]
        for run in runs:
            produced = 1 + sum(step.accepted + 1 for step in run.steps)
            assert produced - 8 < len(run.tokens) <= produced
            assert all(0 <= step.accepted <= loop.num_drafts for step in run.steps)  # fillers may be right, too


def test_carrying_all_blocks_changes_nothing(tiny: Reference, prompts: list[list[int]]) -> None:
    some = prompts[::2]
    assert OnePass(tiny, 4, carry_all=True).generate(some, 32) == OnePass(tiny, 4).generate(some, 32)


def test_a_hit_drafts_what_a_separate_pass_would(tiny: Reference, prompts: list[list[int]]) -> None:
    """After every step, blocks that claim to know the bonus are compared with blocks behind a prefix read afresh."""

    class Watched(OnePass):
        hits = 0

        def _step(self, now: Sequences, cache: Cache) -> Any:
            result = super()._step(now, cache)
            after = result[-1]
            for row in (after.offset == 0).nonzero()[:, 0].tolist():
                Watched.hits += 1
                position = int(after.prefix[row])
                text = self.text[int(after.prompt[row])]
                step = result[2][row]
                text += [*result[1][row, : step.accepted].tolist(), int(after.anchors[row])]
                committed = torch.tensor([text[:position]])
                fresh = self.reference.new_cache(1, position)
                self.reference.autoregressive(committed, torch.arange(position)[None], fresh)
                anchor, prefix = after.anchors[row : row + 1], after.prefix[row : row + 1]
                expected = self.reference.logits(self.reference.diffusion(anchor, prefix, fresh))[0]
                torch.testing.assert_close(after.logits[row], expected, atol=1e-3, rtol=1e-3)
                del text[position + 1 :]
            for row in (after.offset != 0).nonzero()[:, 0].tolist():
                step = result[2][row]
                self.text[int(after.prompt[row])] += [
                    *result[1][row, : step.accepted].tolist(),
                    int(after.anchors[row]),
                ]
            return result

        def _read(self, prompts: Any, max_new_tokens: int) -> Any:
            sequences, cache = super()._read(prompts, max_new_tokens)
            self.text = [[*prompt, token] for prompt, token in zip(prompts, sequences.anchors.tolist(), strict=True)]
            return sequences, cache

    Watched(tiny, 8).generate(prompts[::2], 32)
    assert Watched.hits > 20


# The figures


def test_all_outcomes_covered_leave_one_forward_per_cycle(
    tiny: Reference, prompts: list[list[int]], two_pass: list[Generation]
) -> None:
    def everything(outcome: torch.Tensor, *others: Any) -> Hypotheses:
        places, vocab = outcome.shape[1], 1024
        accepted = torch.arange(places).repeat_interleave(vocab).expand(len(outcome), -1)
        return Hypotheses(accepted, torch.arange(vocab).repeat(places).expand(len(outcome), -1))

    loop = OnePass(tiny, 1)
    loop.choose = everything
    for run, generation in zip(loop.generate(prompts, NEW_TOKENS), two_pass, strict=True):
        assert [step.accepted for step in run.steps] == [cycle.accepted for cycle in generation.cycles]
        assert all(step.hit for step in run.steps)
        assert run.forwards == len(generation.cycles) + 1


def test_more_hypotheses_take_fewer_forwards(
    tiny: Reference, prompts: list[list[int]], two_pass: list[Generation]
) -> None:
    found = {}
    for count in (1, 8):
        runs = OnePass(tiny, count).generate(prompts, NEW_TOKENS)
        assert [run.tokens for run in runs] == [generation.tokens for generation in two_pass]
        found[count] = ratio(runs, two_pass)
        result = figures(runs)
        assert result.hit + result.count_missed + result.bonus_missed == pytest.approx(1)
    assert found[1] > 1.1
    assert found[8] > 1.4
    assert found[8] < 2


def test_permuted_hypotheses_are_seen(
    tiny: Reference, prompts: list[list[int]], two_pass: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known-red: each hypothesis gets another one's rows. The text stays, the gain doesn't."""

    def permuted(*arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        verified, blocks = forward(*arguments, **named)
        return verified, blocks.roll(1, dims=1)

    some, expected = prompts[::2], two_pass[::2]
    sound = OnePass(tiny, 4, carry_all=True).generate(some, NEW_TOKENS)
    monkeypatch.setattr(simulator, "forward", permuted)
    faulty = OnePass(tiny, 4, carry_all=True).generate(some, NEW_TOKENS)
    assert [run.tokens for run in faulty] == [run.tokens for run in sound] == [g.tokens for g in expected]
    assert ratio(sound, expected) > 1.25
    assert ratio(faulty, expected) < 0.75 * ratio(sound, expected)


def test_a_block_of_one_with_ar_weights_never_misses_a_draft() -> None:
    """Oracle 1: whenever the block at hand knew the bonus, its one draft is the AR view's token."""
    reference = make_reference(make_base(), block_size=1, noise=0.0)
    runs = OnePass(reference, 2).generate(PROMPTS, 30)
    exact = [step for run in runs for step in run.steps if step.offset == 0]
    assert len(exact) >= 3
    assert all(step.accepted == 1 for step in exact)


def test_no_hypotheses_are_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        OnePass(make_reference(make_base()), 0)


# The distribution


DRAWS, VOCAB = 12_000, 16


def sampled(plant: bool = False) -> torch.Tensor:
    """[DRAWS, 4] tokens from a model of 16 tokens, with blocks that are short enough for hits, tails and no drafts."""
    reference = make_reference(make_base(vocab_size=VOCAB, num_hidden_layers=2, initializer_range=0.15), 3, noise=0.1)
    loop = OnePass(reference, 8, temperature=0.8, generator=torch.Generator().manual_seed(3))
    if plant:
        judge = loop._verify
        loop._verify = lambda drafts, q, logits: judge(drafts, q.roll(1, dims=1), logits)  # type: ignore[method-assign]
    runs = [run for _ in range(DRAWS // 4000) for run in loop.generate([[3, 9, 1]] * 4000, 4)]
    steps = [step for run in runs for step in run.steps]
    assert sum(step.hit for step in steps) > DRAWS / 10, "hardly any hits: their drafts go untested"
    assert sum(step.offset > 0 and step.proposed > 0 for step in steps) > DRAWS / 20, "hardly any tails"
    return torch.tensor([run.tokens for run in runs])


@pytest.mark.parametrize("plant", [False, True])
def test_sampled_text_follows_the_model(plant: bool) -> None:
    tokens = sampled(plant)
    reference = make_reference(make_base(vocab_size=VOCAB, num_hidden_layers=2, initializer_range=0.15), 3, noise=0.1)
    expected = exact_distribution(reference.base, [3, 9, 1], 0.8)  # [16, 16, 16, 16]
    first = tokens[:, 0] * VOCAB + tokens[:, 1]
    middle = tokens[:, 1] * VOCAB + tokens[:, 2]
    last = tokens[:, 2] * VOCAB + tokens[:, 3]
    values = [
        chi_square(first, expected.sum((2, 3)).flatten()),
        chi_square(middle, expected.sum((0, 3)).flatten()),
        chi_square(last, expected.sum((0, 1)).flatten()),
        chi_square(first * VOCAB + tokens[:, 2], expected.sum(3).flatten()),
    ]
    if plant:
        assert min(values) < 1e-6, "a q that isn't the draft's own must show"
    else:
        assert min(values) > 0.001


def exact_distribution(base: Any, prompt: list[int], temperature: float) -> torch.Tensor:
    """P(x1, .., x4 | prompt) by running the model on all 4,096 continuations of three tokens."""
    every = torch.cartesian_prod(*[torch.arange(VOCAB)] * 3)
    ids = torch.cat((torch.tensor(prompt).expand(len(every), -1), every), 1)
    with torch.no_grad():
        p = torch.softmax(base(input_ids=ids).logits[:, len(prompt) - 1 :].double() / temperature, -1)
    p = p.view(VOCAB, VOCAB, VOCAB, 4, VOCAB)
    one, two, three, four = p[0, 0, 0, 0], p[:, 0, 0, 1], p[:, :, 0, 2], p[:, :, :, 3]
    return one[:, None, None, None] * two[:, :, None, None] * three[..., None] * four
