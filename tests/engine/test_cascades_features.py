"""Cascades beside what else a request may ask for: forms, bans, logprobs, and what is counted and refused."""

import json
from typing import Any

import jsonschema
import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.conftest import THOROUGH, StartEngine
from tests.engine.harness import Engine, listen
from tests.engine.test_features import SCHEMA
from tests.engine.trained import OPTIONS, TINY, chat, questions, trained_head
from vllm_orthrus.cascades.rules import RULES
from vllm_orthrus.patches.metrics import CASCADE_METRICS

pytestmark = pytest.mark.slow

ASKED: dict[str, dict[str, Any]] = {
    "chow": {"rule": "chow", "alpha": 0.5},
    "diff": {"rule": "diff", "alpha": 0.3},
    "opt": {"rule": "opt", "alpha": 0.5},
    "token_v1": {"rule": "token_v1", "alpha": 0.5},
    "token_v2": {"rule": "token_v2", "alpha": 0.5},
    "token_v3": {"rule": "token_v3", "alpha": 0.9},
    "relaxed": {"rule": "relaxed", "k": 5, "ratio": 0.05},
}
NO_BLANKS = {"backend": "xgrammar", "disable_any_whitespace": True}  # which a model as small writes for ever
ALL_TO_THE_DRAFT = {"rule": "chow", "alpha": 1.0}


@pytest.fixture(scope="module", params=["two", "one"])
def drafting(start: StartEngine, request: pytest.FixtureRequest) -> Engine:
    settings = trained_head(request.param, draft_sample_method="probabilistic", num_speculative_tokens=7)
    return start(settings, model=TINY / "base", **OPTIONS, max_num_seqs=16, structured_outputs_config=NO_BLANKS)


def write(engine: Engine, prompts: list[list[int]], asked: list[Any], **sampling: Any) -> list[Any]:
    common = {"temperature": 0.0, "max_tokens": 48, "ignore_eos": True} | sampling
    params = [
        SamplingParams(extra_args=None if one is None else {"orthrus_cascade": one}, seed=index, **common)
        for index, one in enumerate(asked)
    ]
    return list(engine.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False))


def prompts(engine: Engine, count: int) -> list[list[int]]:
    return [chat(engine, question) for question in questions(each=count)][:count]


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_forms_stay_valid_under_every_rule(drafting: Engine) -> None:
    """208 requests bound to a schema, or a quarter of them, greedy and sampled: what it forbids is never accepted."""
    rules = [*ASKED.values(), ALL_TO_THE_DRAFT]
    form = StructuredOutputsParams(json=SCHEMA)
    valid = 0
    for temperature in (0.0, 0.9):
        asked = [rules[index % len(rules)] for index in range(104 if THOROUGH else 26)]
        given = (prompts(drafting, 13) * 8)[: len(asked)]
        sampling = {"temperature": temperature, "structured_outputs": form, "ignore_eos": False, "max_tokens": 96}
        before = drafting._counts
        for output in write(drafting, given, asked, **sampling):
            (answer,) = output.outputs
            assert answer.finish_reason == "stop", answer.text
            jsonschema.validate(json.loads(answer.text), SCHEMA)
            valid += 1
        assert (drafting._counts - before).accepted > 0
    assert valid == (208 if THOROUGH else 52)


def test_what_is_banned_stays_banned(drafting: Engine) -> None:
    """By a list of tokens, with a rule that leaves all that it may to the draft."""
    given = prompts(drafting, 8)
    free = tokens(write(drafting, given, [ALL_TO_THE_DRAFT] * 8))
    allowed = sorted({token for text in free for token in text})[::2]
    for temperature in (0.0, 1.0):
        bound = tokens(
            write(drafting, given, [ALL_TO_THE_DRAFT] * 8, temperature=temperature, allowed_token_ids=allowed)
        )
        assert {token for text in bound for token in text} <= set(allowed)


def test_logprobs_are_the_models(drafting: Engine) -> None:
    """Of each token of lossy text, what the model says of it behind the same text."""
    given = prompts(drafting, 4)
    outputs = write(drafting, given, [ASKED["diff"], ALL_TO_THE_DRAFT] * 2, logprobs=2, max_tokens=24)
    texts = tokens(outputs)
    again = drafting.llm.generate(
        [{"prompt_token_ids": [*prompt, *text]} for prompt, text in zip(given, texts, strict=True)],
        SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2),
        use_tqdm=False,
    )
    unlikely = 0
    for prompt, text, output, read in zip(given, texts, outputs, again, strict=True):
        for token, said, model in zip(
            text, output.outputs[0].logprobs, read.prompt_logprobs[len(prompt) :], strict=True
        ):
            assert said[token].logprob == pytest.approx(model[token].logprob, abs=2e-3)
            unlikely += said[token].rank != 1
    assert unlikely, "no token was left to a draft"


def test_everything_to_the_draft(drafting: Engine) -> None:
    """Whatever is drafted is kept, where its row knew the anchor: in two passes, all of it."""
    drafting.run([[1, 2, 3]], 2)
    before = drafting._counts
    write(drafting, prompts(drafting, 6), [ALL_TO_THE_DRAFT] * 6)
    counts = drafting._counts - before
    lossless = drafting.run(prompts(drafting, 6), 48).counts
    if drafting.runner.speculator.drafting.counts() is None:
        assert counts.accepted == counts.drafted > 0
    assert counts.steps < lossless.steps


def exposed(engine: Engine) -> dict[str, int]:
    cascades = [one for one in engine.llm.get_metrics() if one.name.startswith("vllm:orthrus_cascade")]
    found = {(one.name, one.labels["rule"]): one.value for one in cascades}
    return {name: int(found.get((metric.name, metric.rule), 0)) for name, metric in CASCADE_METRICS.items()}


def test_tokens_left_to_drafts_are_counted(drafting: Engine) -> None:
    given = prompts(drafting, len(RULES))
    before, lossless = exposed(drafting), tokens(write(drafting, given, [None] * len(RULES)))
    drafting.run([[1, 2, 3]], 20)  # counts of a step are told with the next one
    assert exposed(drafting) == before
    outputs = tokens(write(drafting, given, [ASKED[rule] for rule in RULES]))
    drafting.run([[1, 2, 3]], 20)
    new = {name: count - before[name] for name, count in exposed(drafting).items()}
    for rule, text, free in zip(RULES, outputs, lossless, strict=True):
        taken, departed = new[f"cascade_taken_{rule}"], new[f"cascade_departed_{rule}"]
        assert 0 <= departed <= taken <= len(text) + 7, "those behind the end of an answer count, too"
        assert taken > 0
        assert departed or text == free, f"{rule} wrote another text, and no token that says so"
    assert sum(new[f"cascade_departed_{rule}"] for rule in RULES) > 0


def test_a_line_in_the_log(drafting: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, said = listen(drafting, monkeypatch)
    write(drafting, prompts(drafting, 2), [ASKED["diff"]] * 2)
    logger.log()
    assert [line for line in said if "LOSSY" in line and "left to drafts (diff " in line]
    said.clear()
    drafting.run(prompts(drafting, 2), 8)
    logger.log()
    assert not [line for line in said if "LOSSY" in line]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"rule": "tokenv3", "alpha": 0.1}, "It may be one of chow, diff"),
        ({"rule": "chow", "alpha": 2}, "It must be a number from 0 to 1"),
        ("yes", "neither 'off' nor JSON"),
    ],
)
def test_a_wrong_request_is_refused_before_it_is_queued(asked: Any, says: str, drafting: Engine) -> None:
    with pytest.raises(VLLMValidationError, match=says):
        write(drafting, [[1, 2, 3]], [asked])
    assert not drafting.llm.llm_engine.has_unfinished_requests()
    assert len(tokens(write(drafting, [[1, 2, 3]], [None]))[0]) == 48
