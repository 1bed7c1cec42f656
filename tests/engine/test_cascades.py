"""Speculative cascades in the engine: text follows pi exactly, where it is asked for and nowhere else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.engine.checkpoints import write_with_vocabulary
from tests.engine.conftest import THOROUGH, StartEngine
from tests.engine.harness import Engine
from vllm_orthrus.cascades import verify
from vllm_orthrus.cascades.choice import Cascade
from vllm_orthrus.cascades.rules import Judged, Knobs, judge, target
from vllm_orthrus.engine.cascades import Cascades
from vllm_orthrus.engine.onepass.drafting import OnePassDrafting
from vllm_orthrus.training.reference import Reference

pytestmark = pytest.mark.slow

VOCAB, BLOCK, DRAFTS = 16, 6, 4
PROMPT = [1, 5, 3, 7]
LENGTH, TEMPERATURE = 24, 1.3
DRAWS = 20_000 if THOROUGH else 2_400  # of each rule, the tokens of DRAWS / LENGTH requests
AT_ONCE, HYPOTHESES = 64, 12  # so that not everything is a tail

CASCADES = {
    "chow": Cascade("chow", 0.6),
    "diff": Cascade("diff", 0.1),
    "opt": Cascade("opt", 0.3),
    "token_v1": Cascade("token_v1", 0.25),
    "token_v2": Cascade("token_v2", 0.25),
    "token_v3": Cascade("token_v3", 0.9),
    "relaxed": Cascade("relaxed", k=6, ratio=0.1),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_with_vocabulary(VOCAB, BLOCK, tmp_path_factory.mktemp("small-vocabulary"))


@pytest.fixture(scope="module")
def reference(small: tuple[Path, Path]) -> Reference:
    return Reference.from_pretrained(*small)


def settings(head: Path, passes: str, **more: Any) -> dict[str, Any]:
    room = {"orthrus_rows": ROWS, "orthrus_hypotheses": HYPOTHESES}
    drafts = {"num_speculative_tokens": DRAFTS, "draft_sample_method": "probabilistic", "orthrus_passes": passes}
    return {"method": "orthrus", "model": str(head)} | room | drafts | more


ROWS = AT_ONCE * (DRAFTS + 1 + HYPOTHESES * BLOCK)
ROOM = {"max_num_seqs": AT_ONCE, "max_num_batched_tokens": ROWS}


@pytest.fixture(scope="module", params=["two", "one"])
def engine(start: StartEngine, small: tuple[Path, Path], request: pytest.FixtureRequest) -> Engine:
    return start(settings(small[1], request.param), model=small[0], **ROOM)


def said(cascade: Cascade) -> dict[str, Any]:
    names = ("k", "ratio") if cascade.rule == "relaxed" else ("alpha",)
    return {"rule": cascade.rule} | {name: getattr(cascade, name) for name in names}


def write(engine: Engine, asked: list[Cascade | None], **sampling: Any) -> list[Any]:
    """One output for each, all in the same batches."""
    common = {"temperature": TEMPERATURE, "max_tokens": LENGTH, "ignore_eos": True, "detokenize": False} | sampling
    params = [
        SamplingParams(
            seed=1000 + index,
            extra_args=None if cascade is None else {"orthrus_cascade": said(cascade)},
            **common,
        )
        for index, cascade in enumerate(asked)
    ]
    return list(engine.llm.generate([{"prompt_token_ids": PROMPT}] * len(params), params, use_tqdm=False))


class Verification(NamedTuple):
    yielded: int  # tokens, before any that are beyond the request's last
    informed: list[bool]  # of each draft: its row knew the token before the first


class Recorder:
    """Notes what each request's verifications were about."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self.of: dict[str, list[Verification]] = {}
        runner = engine.runner
        rejection, drafting = runner.rejection_sampler, runner.speculator.drafting
        judged = rejection._verify

        def watch(*arguments: Any) -> Any:
            _, _, _, _, starts, _, of, slots, places, *_ = arguments
            known = drafting.informed(slots.numpy(), slots, places)
            found = judged(*arguments)
            names = {slot: name.split("-")[0] for name, slot in runner.req_states.req_id_to_index.items()}
            for row, slot in enumerate(of.tolist()):
                rows = slice(int(starts[row]), int(starts[row + 1]) - 1)
                if rows.start == rows.stop:  # a prompt has been read, among others' verifications
                    continue
                informed = [True] * DRAFTS if known is None else known[rows].tolist()
                self.of.setdefault(names[slot], []).append(Verification(int(found[2][row]), informed))
            return found

        patch.setattr(rejection, "_verify", watch)


Logits = Callable[[torch.Tensor], torch.Tensor]


class Text(NamedTuple):
    tokens: torch.Tensor  # [n, LENGTH]
    verifications: list[list[Verification]]


def texts(engine: Engine, patch: pytest.MonkeyPatch, rules: list[str | None] | None = None) -> dict[str | None, Text]:
    """Of these rules, where None is none, mixed in each batch."""
    rules = [None, *CASCADES] if rules is None else rules
    with patch.context() as watching:
        recorder = Recorder(engine, watching)
        asked = rules * (DRAWS // LENGTH)
        outputs = write(engine, [CASCADES.get(str(rule)) for rule in asked])
    found = {}
    for rule in rules:
        own = [output for output, one in zip(outputs, asked, strict=True) if one == rule]
        tokens = torch.tensor([list(output.outputs[0].token_ids) for output in own])
        found[rule] = Text(tokens, [recorder.of[output.request_id] for output in own])
    return found


def pi(cascade: Cascade | None, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    if cascade is None:
        return p
    knobs = Knobs(*(torch.tensor([float(value)]) for value in cascade[1:]))
    return target(p, judge(cascade.rule, p, q, knobs))


@torch.inference_mode()
def laws(
    reference: Reference, text: Text, cascade: Cascade | None, drawn_by: Logits
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token but the first was drawn from [n, LENGTH, 16], by the reference; and whether a row that knew its
    block's anchor has drafted it [n, LENGTH]. drawn_by: what becomes of a row's logits before a draft is drawn."""
    count, behind = len(text.tokens), len(PROMPT)
    ids = torch.cat((torch.tensor(PROMPT).expand(count, -1), text.tokens), dim=1)
    cache = reference.new_cache(count, ids.shape[1])
    states = reference.autoregressive(ids, torch.arange(ids.shape[1]).expand_as(ids), cache)
    p = (reference.logits(states) / TEMPERATURE).softmax(-1)[:, behind - 1 : -1]  # of each token
    law, drafted = p.clone(), torch.zeros(p.shape[:2], dtype=torch.bool)
    written = torch.ones(count, dtype=torch.long)  # tokens before the verification
    for step in range(max(map(len, text.verifications))):
        anchor_at = (written - 1).clamp(max=LENGTH - 1)
        anchors = text.tokens.gather(1, anchor_at[:, None]).squeeze(1)
        block = reference.diffusion(anchors, behind + anchor_at, cache, BLOCK)
        q = (drawn_by(reference.logits(block)) / TEMPERATURE).softmax(-1)
        by = [
            (row, int(written[row]) + place, place)
            for row, steps in enumerate(text.verifications)
            for place in range(min(steps[step].yielded, DRAFTS) if step < len(steps) else 0)
            if written[row] + place < LENGTH and steps[step].informed[place]
        ]
        rows, at, places = torch.tensor(by).T if by else torch.zeros(3, 0, dtype=torch.long)
        law[rows, at], drafted[rows, at] = pi(cascade, p[rows, at], q[rows, places]), torch.tensor(True)
        written += torch.tensor([steps[step].yielded if step < len(steps) else 0 for steps in text.verifications])
    return law, drafted


def chance(text: Text, law: torch.Tensor, chosen: torch.Tensor) -> float:
    """How likely counts of tokens behind tokens would be as far off what the laws of those chosen lead to expect.

    Of unlike draws a sum varies less than of like ones, so this errs towards "as expected".
    """
    before, tokens = text.tokens[:, :-1][chosen[:, 1:]], text.tokens[:, 1:][chosen[:, 1:]]
    counts = torch.bincount(before * VOCAB + tokens, minlength=VOCAB**2).double()
    expected = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    expected.index_add_(0, before, law[:, 1:][chosen[:, 1:]].double())
    expected = expected.flatten()
    if counts[expected < 1e-9].any():
        return 0.0
    rare = expected < 5
    counts, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, expected))
    seen = expected > 1e-9
    return float(stats.chi2.sf(float(((counts - expected)[seen] ** 2 / expected[seen]).sum()), int(seen.sum()) - 1))


def chances(
    reference: Reference, text: Text, cascade: Cascade | None, of: Cascade | None, drawn_by: Logits = lambda x: x
) -> dict[str, float]:
    """Of text by a cascade, if it were by `of`: of tokens that an informed row has drafted, and of all others."""
    _, drafted = laws(reference, text, cascade, drawn_by)
    law, _ = laws(reference, text, of, drawn_by)
    return {"drafted": chance(text, law, drafted), "others": chance(text, law, ~drafted)}


def test_text_follows_pi(engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule's and no rule's, in the same batches."""
    for rule, text in texts(engine, monkeypatch).items():
        cascade = CASCADES.get(str(rule))
        found = chances(reference, text, cascade, cascade)
        assert min(found.values()) > 0.0005, (rule, found)
        if cascade is not None:
            without = chances(reference, text, cascade, None)
            assert without["drafted"] < 1e-4, f"{rule}: pi is too near p to tell them apart"


# Planted faults: each must turn the test above red.


def _swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verify, "judge", lambda rule, p, q, knobs: judge(rule, q, p, knobs))


def _asked_and_kept_swapped(patch: pytest.MonkeyPatch) -> None:
    def faulty(rule: str, p: torch.Tensor, q: torch.Tensor, knobs: Knobs) -> Judged:
        judged = judge(rule, p, q, knobs)
        return Judged(judged.q, ~judged.kept & (p > 0))

    patch.setattr(verify, "judge", faulty)


def _mixture_not_normalised(patch: pytest.MonkeyPatch) -> None:
    """What is resampled lacks the AR view's part."""
    patch.setattr(verify, "target", lambda p, judged: torch.where(judged.kept, judged.q, 0))


def _token_before_judged(patch: pytest.MonkeyPatch) -> None:
    judge = Cascades.judge

    def faulty(self: Cascades, logits: torch.Tensor, q_logits: Any, chunk: Any, drafting: Any) -> None:
        judge(self, logits, q_logits, chunk._replace(drafts=chunk.drafts.roll(1)), drafting)

    patch.setattr(Cascades, "judge", faulty)


def _another_temperature(patch: pytest.MonkeyPatch) -> None:
    add = Cascades.add_request

    def faulty(self: Cascades, slot: int, params: Any) -> None:
        add(self, slot, params)
        self.temperature[slot] = 0.4

    patch.setattr(Cascades, "add_request", faulty)


FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "p and q swapped": ("token_v2", _swapped),
    "asked and kept swapped": ("token_v3", _asked_and_kept_swapped),
    "mixture not normalised": ("token_v2", _mixture_not_normalised),
    "the token before judged": ("diff", _token_before_judged),
    "another temperature": ("token_v1", _another_temperature),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault: str, engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, plant = FAULTS[fault]
    with monkeypatch.context() as patch:
        plant(patch)
        text = texts(engine, patch, [rule])[rule]
    assert min(chances(reference, text, CASCADES[rule], CASCADES[rule]).values()) < 1e-4


def test_uninformed_drafts_are_judged_by_the_model_alone(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the test notices if they are not. In two passes there are none."""
    drafting = engine.runner.speculator.drafting
    if not isinstance(drafting, OnePassDrafting):
        assert drafting.informed(np.zeros(3, dtype=np.int64), torch.zeros(3), torch.zeros(3)) is None
        return
    text = texts(engine, monkeypatch, ["diff"])["diff"]
    tails = sum(not all(one.informed) for steps in text.verifications for one in steps)
    hits = sum(all(one.informed) for steps in text.verifications for one in steps[1:])
    assert tails > 100 and hits > 100, "this tells nothing of one of them"
    with monkeypatch.context() as patch:
        recorded = drafting.informed
        # The recorder, which looks first, is told the truth; the cascade that every draft knew its anchor.
        turn = [0]

        def faulty(*arguments: Any) -> Any:
            turn[0] += 1
            return recorded(*arguments) if turn[0] % 2 else None

        patch.setattr(drafting, "informed", faulty)
        text = texts(engine, patch, ["diff"])["diff"]
    assert chances(reference, text, CASCADES["diff"], CASCADES["diff"])["others"] < 1e-4


# Beside others, and greedy


def test_lossless_requests_are_as_if_alone(engine: Engine) -> None:
    """Greedy and sampled, to the last token, in batches with lossy ones; also those that ask for what is lossless."""
    greedy = [CASCADES["token_v2"]._replace(alpha=0.0), CASCADES["token_v3"]._replace(alpha=0.0)]
    greedy.append(CASCADES["relaxed"]._replace(k=1))
    free, count = CASCADES["chow"]._replace(alpha=0.0), 2 * len(CASCADES)
    mixed = [one for cascade in CASCADES.values() for one in (None, cascade)]
    # In one pass, sampled text depends on what was learnt of those before.
    one_pass = isinstance(engine.runner.speculator.drafting, OnePassDrafting)
    for temperature in (0.0,) if one_pass else (0.0, 1.0):
        asks_for_nothing = [free, *(greedy if temperature == 0 else [])] * count
        alone, asking, beside = (
            tokens(write(engine, asked, temperature=temperature))
            for asked in ([None] * count, asks_for_nothing[:count], mixed)
        )
        assert asking == alone
        assert beside[::2] == alone[::2]
        assert beside[1::2] != alone[1::2], "no rule has changed anything"


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_how_it_is_cut_up_changes_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM verifies large batches a few requests at a time, and rows are worked on a few at a time."""
    if isinstance(engine.runner.speculator.drafting, OnePassDrafting):
        pytest.skip("what is foreseen in one pass, and so which drafts a tail has made, depends on what went before")
    asked: list[Cascade | None] = [None, *CASCADES.values()] * 3
    whole = tokens(write(engine, asked))
    monkeypatch.setattr("vllm.v1.worker.gpu.spec_decode.rejection_sampler.get_max_chunk_logits", lambda size: 13)
    chunks = tokens(write(engine, asked))
    monkeypatch.setattr("vllm_orthrus.engine.cascades.PIECE", 3 * VOCAB)
    assert whole == chunks == tokens(write(engine, asked))


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_logprobs_are_those_of_the_model(
    mode: str, engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.runner.sampler, "logprobs_mode", mode)
    outputs = write(engine, [CASCADES["diff"], CASCADES["token_v2"], None] * 4, logprobs=1)
    ids = torch.tensor([[*PROMPT, *text] for text in tokens(outputs)])
    cache = reference.new_cache(*ids.shape)
    states = reference.autoregressive(ids, torch.arange(ids.shape[1]).expand_as(ids), cache)
    logits = reference.logits(states)[:, len(PROMPT) - 1 : -1].detach()
    own = (logits / (TEMPERATURE if mode == "processed_logprobs" else 1)).log_softmax(-1)
    for row, output in enumerate(outputs):
        for place, said in enumerate(output.outputs[0].logprobs):
            token = output.outputs[0].token_ids[place]
            assert said[token].logprob == pytest.approx(float(own[row, place, token]), abs=2e-3)


def test_greedy_drafts(
    start: StartEngine, small: tuple[Path, Path], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where distributions of drafts are not kept, q is all on the draft: for rules that look at p alone."""
    engine = start(settings(small[1], "two", draft_sample_method="greedy"), model=small[0], **ROOM)

    def sure(logits: torch.Tensor) -> torch.Tensor:
        return torch.where(logits == logits.amax(-1, keepdim=True), logits, -torch.inf)

    with pytest.raises(
        VLLMValidationError, match=r"draft_sample_method='greedy' does not keep\. Start with 'probabilistic'"
    ):
        write(engine, [CASCADES["chow"]])
    for rule, text in texts(engine, monkeypatch, [None, "token_v2", "token_v3", "relaxed"]).items():
        cascade = CASCADES.get(str(rule))
        found = chances(reference, text, cascade, cascade, sure)
        assert min(found.values()) > 0.0005, (rule, found)
        if cascade is not None:
            assert chances(reference, text, cascade, None, sure)["drafted"] < 1e-4
