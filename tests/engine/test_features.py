"""What people ask of a server besides text, with drafts as without: real text, of which many drafts are kept."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from tests.engine.conftest import StartEngine
from tests.engine.harness import Engine
from tests.engine.trained import OPTIONS, TINY, Trained, chat, cut, questions, texts, tokens_per_cycle, trained_head


@pytest.fixture(scope="session")
def plain_pair() -> Iterator[tuple[Engine, dict[str, Any]]]:
    engine = Engine(TINY / "base", None, **OPTIONS)
    yield engine, {}
    engine.close()


@pytest.fixture(scope="module", params=["one", "two"])
def trained(start: StartEngine, plain_pair: tuple[Engine, dict[str, Any]], request: pytest.FixtureRequest) -> Trained:
    return Trained(plain_pair[0], start(trained_head(request.param), TINY / "base", **OPTIONS), plain_pair[1])


# Where an answer ends


@pytest.mark.feature("stop strings inside a block")
def test_stop_strings(trained: Trained) -> None:
    """Found in the text, which comes a block at a time: what was drafted behind them must not be seen."""
    given, found = trained.prompts(), 0
    for stop in (["4", "e"], ["\n"], ["; ", "ar", '": "'], [" 1", "d"]):
        asked: dict[str, Any] = {"stop": stop, "detokenize": True, "ignore_eos": False}
        drafted, plain = trained.both(given, **asked)
        assert texts(drafted) == texts(plain)
        found += sum(isinstance(why, str) for *_, why in texts(plain))
    assert found > len(given)
    shown, _ = trained.both(given, **asked, include_stop_str_in_output=True)
    assert all(text.endswith(why) for text, _, why in texts(shown) if isinstance(why, str))


@pytest.mark.feature("stop tokens inside a block")
def test_stop_tokens(trained: Trained) -> None:
    given, thrown_away = trained.prompts(2), 0
    for place in (3, 9, 14, 22):
        stops = sorted({tokens[place] for tokens in trained.plainly(given).tokens})
        drafted, plain = trained.both(given, stop_token_ids=stops, ignore_eos=False)
        assert drafted.tokens == plain.tokens
        assert texts(drafted) == texts(plain)
        thrown_away += cut(drafted)
    assert thrown_away > 10, "no answer ended inside a block"


@pytest.mark.feature("max_tokens inside a block")
def test_max_tokens(trained: Trained) -> None:
    given, thrown_away = trained.prompts(), 0
    whole = trained.plainly(given).tokens
    for most in (1, 2, 3, 5, 8, 13, 21):
        drafted = trained.drafting.run(given, most)
        assert drafted.tokens == [tokens[:most] for tokens in whole]
        thrown_away += cut(drafted)
    assert thrown_away > 10, "no answer ended inside a block"


@pytest.mark.feature("max_model_len inside a block")
def test_context_limit(trained: Trained) -> None:
    """What is left of the context is less than a block, in every amount."""
    limit = OPTIONS["max_model_len"]
    question = trained.prompts()[0]
    long = [(question * (limit // len(question) + 1))[-(limit - left) :] for left in (1, 2, 3, 6, 11, 15, 16, 17, 24)]
    drafted, plain = trained.both(long, 64)
    assert drafted.tokens == plain.tokens
    assert [len(tokens) for tokens in plain.tokens] == [1, 2, 3, 6, 11, 15, 16, 17, 24]


@pytest.mark.feature("min_tokens")
def test_min_tokens(trained: Trained) -> None:
    """No end before so many tokens, counted inside a block, too."""
    given = trained.prompts(2)
    ended = trained.plainly(given, 64, ignore_eos=False).tokens
    drafted, plain = trained.both(given, 96, min_tokens=70, ignore_eos=False)
    assert drafted.tokens == plain.tokens
    assert min(map(len, ended)) < 64
    assert min(map(len, plain.tokens)) >= 70


# Sampling


@pytest.mark.feature("repetition, presence and frequency penalties")
def test_penalties(trained: Trained) -> None:
    """Each row of a verification is punished for the drafts before it, too."""
    given = trained.prompts()
    penalties = {"repetition_penalty": 1.05, "presence_penalty": 0.5, "frequency_penalty": 0.4}
    drafted, plain = trained.both(given, **penalties)
    assert drafted.tokens == plain.tokens
    assert plain.tokens != trained.plainly(given).tokens


@pytest.mark.feature("bad words")
def test_bad_words(trained: Trained) -> None:
    """Of several tokens, of which the first may be a draft and the last the bonus."""
    given = trained.prompts(2)
    tokenizer = trained.plain.llm.get_tokenizer()
    whole = trained.plainly(given).tokens
    words = [
        tokenizer.decode(tokens[at : at + length]) for tokens in whole for at, length in ((5, 1), (11, 2), (20, 3))
    ]
    drafted, plain = trained.both(given, bad_words=[word for word in words if word.strip()])
    assert drafted.tokens == plain.tokens
    assert all(mine != theirs for mine, theirs in zip(plain.tokens, whole, strict=True))


@pytest.mark.feature("allowed tokens")
def test_allowed_tokens(trained: Trained) -> None:
    given = trained.prompts(2)
    allowed = sorted({token for tokens in trained.plainly(given[:6]).tokens for token in tokens})
    drafted, plain = trained.both(given, allowed_token_ids=allowed)
    assert drafted.tokens == plain.tokens
    assert {token for tokens in drafted.tokens for token in tokens} <= set(allowed)


@pytest.mark.feature("seeds")
def test_seeds(trained: Trained) -> None:
    """Reproduce a text, whatever else runs beside it. In one pass only behind the same requests."""
    given = trained.prompts()
    first = trained.drafting.run(given, 32, temperature=1.0, seed=5).tokens
    if trained.drafting.runner.speculator.speculative_config.orthrus_passes == "two":
        assert trained.drafting.run(given[:2], 32, temperature=1.0, seed=5).tokens == first[:2]
        assert trained.drafting.run(given, 32, temperature=1.0, seed=5).tokens == first
    assert trained.drafting.run(given, 32, temperature=1.0, seed=55).tokens != first


@pytest.mark.feature("n > 1")
def test_several_answers(trained: Trained) -> None:
    given = trained.prompts()

    def answers(engine: Engine, **sampling: Any) -> list[list[list[int]]]:
        run = engine.run(given, 24, n=3, **sampling)
        return [[list(one.token_ids) for one in output.outputs] for output in run.outputs]

    nearly_greedy = {"temperature": 5e-4, "seed": 1}  # vLLM takes no more than one answer that is
    assert answers(trained.drafting, **nearly_greedy) == answers(trained.plain, **nearly_greedy)
    sampled = answers(trained.drafting, temperature=1.2, seed=3)
    assert all(len(each) == 3 for each in sampled)
    assert sum(len({tuple(one) for one in each}) for each in sampled) > len(given), "all of them are the same"


@pytest.mark.feature("beam search")
def test_beam_search(trained: Trained) -> None:
    given: list[Any] = [{"prompt_token_ids": tokens} for tokens in trained.prompts()[:4]]
    wanted = BeamSearchParams(beam_width=3, max_tokens=10)
    found = [engine.llm.beam_search(given, wanted) for engine in (trained.drafting, trained.plain)]
    mine, plain = [[beam for output in outputs for beam in output.sequences] for outputs in found]
    assert [beam.tokens for beam in mine] == [beam.tokens for beam in plain]
    assert [beam.cum_logprob for beam in mine] == pytest.approx([beam.cum_logprob for beam in plain], abs=1e-3)


def log_probabilities(run: Any) -> list[Any]:
    """By token and place, ranks as they are and values as far as float32 agrees across sizes of a batch."""
    every = [
        entry for output in run.outputs for entry in (*(output.prompt_logprobs or ()), *output.outputs[0].logprobs)
    ]
    return [
        entry and {token: (one.rank, pytest.approx(one.logprob, abs=2e-3)) for token, one in entry.items()}
        for entry in every
    ]


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({"logprobs": 3}, marks=pytest.mark.feature("logprobs")),
        pytest.param({"logprobs": 1, "prompt_logprobs": 2}, marks=pytest.mark.feature("prompt_logprobs")),
        pytest.param(
            {"logprobs": 3, "logprob_token_ids": [5, 9, 400]},
            marks=pytest.mark.feature("logprob_token_ids beside logprobs"),
        ),
        pytest.param({"logprob_token_ids": [5, 9, 400]}, marks=pytest.mark.feature("logprob_token_ids alone")),
    ],
    ids=lambda sampling: "-".join(sampling),
)
def test_log_probabilities(sampling: dict[str, Any], trained: Trained) -> None:
    """Of every token, whether it was a draft or a bonus."""
    drafted, plain = trained.both(trained.prompts(), 32, **sampling)
    assert drafted.tokens == plain.tokens
    assert all(len(output.outputs[0].logprobs) == 32 for output in drafted.outputs)
    assert log_probabilities(drafted) == log_probabilities(plain)


# Structured output

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 10, "maximum": 99},
        "colours": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 2, "maxItems": 2},
    },
    "required": ["city", "age", "colours"],
    "additionalProperties": False,
}
SUMS = 'root ::= line line line\nline ::= number " + " number " = " number "\\n"\nnumber ::= [1-9] [0-9]? [0-9]?\n'


@pytest.mark.parametrize(
    ("form", "valid"),
    [
        pytest.param(
            {"json": SCHEMA, "disable_any_whitespace": True},
            lambda text: jsonschema.validate(json.loads(text), SCHEMA),
            marks=pytest.mark.feature("structured output: JSON schema"),
        ),
        pytest.param(
            {"regex": "[0-9]{2} [+-] [0-9]{3} = [a-z]{4,9}\\."},
            None,
            marks=pytest.mark.feature("structured output: regex"),
        ),
        pytest.param(
            {"choice": ["The answer is 12570.", "The sum is 48.", "12:32:02"]},
            None,
            marks=pytest.mark.feature("structured output: choice"),
        ),
        pytest.param({"grammar": SUMS}, None, marks=pytest.mark.feature("structured output: grammar")),
    ],
    ids=["schema", "regex", "choice", "grammar"],
)
def test_structured_output(form: dict[str, Any], valid: Any, trained: Trained) -> None:
    """Drafts that the form forbids are dropped; those that it allows are kept where the model agrees."""
    given = trained.prompts(2)
    form = {"structured_outputs": StructuredOutputsParams(**form), "detokenize": True, "ignore_eos": False}
    drafted, plain = trained.both(given, 64, **form)
    assert drafted.tokens == plain.tokens
    assert texts(drafted) == texts(plain)
    for text, end, _ in texts(drafted):
        if valid and end == "stop":
            valid(text)


# Conversations


@pytest.mark.feature("chat of several turns")
def test_several_turns(trained: Trained) -> None:
    """Each answer becomes part of the next prompt."""
    asked = questions(3)[::3]
    turns = [[question] for question in asked]
    for follow_up in questions(3)[1::3], questions(3)[2::3]:
        given = [chat(trained.plain, *said) for said in turns]
        drafted, plain = trained.both(given, 40, detokenize=True, ignore_eos=False)
        assert drafted.tokens == plain.tokens
        for said, (text, *_), question in zip(turns, texts(drafted), follow_up, strict=True):
            said += [text, question]


@pytest.mark.feature("--enforce-eager")
def test_text_and_acceptance(trained: Trained) -> None:
    """What the others are measured by: every class of text, at the head's rate."""
    drafted, plain = trained.both(trained.prompts(2), 64)
    assert drafted.tokens == plain.tokens
    assert tokens_per_cycle(drafted) > 3


@pytest.mark.feature("sleep and wake (level 0, scheduling)")
def test_pause_in_the_middle(trained: Trained) -> None:
    """Requests that wait while the engine sleeps go on where they were."""
    engine = trained.drafting.llm.llm_engine
    given = trained.prompts()
    expected = trained.plainly(given).tokens
    greedy = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, detokenize=False)
    for index, tokens in enumerate(given):
        engine.add_request(f"sleeping-{index}", {"prompt_token_ids": tokens}, greedy)
    done: dict[str, list[int]] = {}
    for step in range(100):
        if step == 3:
            trained.drafting.llm.sleep(0, mode="keep")
            assert engine.is_sleeping()
            trained.drafting.llm.wake_up(["scheduling"])
        for output in engine.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        if len(done) == len(given):
            break
    assert [done[f"sleeping-{index}"] for index in range(len(given))] == expected
