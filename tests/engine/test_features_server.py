"""The HTTP server under the client that people use: forms and tools, on two data-parallel ranks that draft."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jsonschema
import openai
import pytest

from tests.engine.trained import TINY, questions
from tests.serve.servers import FEW_BLANKS
from vllm_orthrus.demo.server import Server, free_port, serve_command

pytestmark = [pytest.mark.slow, pytest.mark.thorough]

SETTINGS: dict[str, Any] = {
    "method": "orthrus",
    "model": str(TINY / "head"),
    "orthrus_passes": "one",
    "orthrus_hypotheses": 2,
    "orthrus_rows": 1024,
}
OPTIONS = [
    *("--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "16"),
    *("--max-num-batched-tokens", "1024", "--kv-cache-memory-bytes", str(64 << 20)),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})),
]
DRAFTING = ["--data-parallel-size", "2", "--per-request-spec-decode-metrics", "summary"]


class Pair(NamedTuple):
    plain: Server
    drafting: Server


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("servers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        servers = []
        for name, speculative, more in (("plain", None, []), ("drafting", SETTINGS, DRAFTING)):
            port = free_port()
            command = serve_command(TINY / "base", port, speculative, [*OPTIONS, *more])
            servers.append(Server(command, port, folder / name, patience=900))
        try:
            for server in servers:
                server.begin()
            for server in servers:
                server.wait()
            yield Pair(*servers)
        finally:
            for server in servers:
                server.stop()


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 10, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["city", "age", "tags"],
    "additionalProperties": False,
}
PARAMETERS = {
    "add": {
        "type": "object",
        "properties": {
            "numbers": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 99},
                "minItems": 2,
                "maxItems": 3,
            }
        },
        "required": ["numbers"],
        "additionalProperties": False,
    },
    "note": {
        "type": "object",
        "properties": {"text": {"type": "string", "maxLength": 16}, "urgent": {"type": "boolean"}},
        "required": ["text", "urgent"],
        "additionalProperties": False,
    },
}


def tools(strict: bool) -> Any:
    """strict: hold arguments to their form, too, which vLLM does only if it is asked to."""
    return [
        {"type": "function", "function": {"name": name, "parameters": form, "strict": strict}}
        for name, form in PARAMETERS.items()
    ]


CALL = '<tool_call>\\n\\{"name": "add", "arguments": \\{"numbers": \\[[0-9]{1,2}, [0-9]{1,2}\\]\\}\\}\\n</tool_call>'

HOW: dict[str, dict[str, Any]] = {
    "schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    },
    # A model as small as this one calls nothing by itself, so what it writes is bound to the form of a call.
    "auto": {"tools": tools(False), "tool_choice": "auto", "extra_body": {"structured_outputs": {"regex": CALL}}},
    "required": {
        "tools": tools(True),
        "tool_choice": "required",
        "parallel_tool_calls": False,
        **FEW_BLANKS,
    },
    "named": {
        "tools": tools(True),
        "tool_choice": {"type": "function", "function": {"name": "note"}},
        **FEW_BLANKS,
    },
}


class Said(NamedTuple):
    content: str | None
    calls: list[tuple[str, str]]  # names and arguments
    end: str | None


def ask(server: Server, question: str, how: str, told: list[dict[str, Any]] | None = None) -> Said:
    """told: is given what the server says of the request's drafts."""
    answer = client(server).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=120, **HOW[how]
    )
    choice = answer.choices[0]
    if told is not None:
        told.append(answer.model_extra["metrics"]["speculative_decoding"])
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    return Said(choice.message.content or None, calls, choice.finish_reason)


def ask_streaming(server: Server, question: str, how: str) -> Said:
    parts = client(server).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=120,
        stream=True,
        **HOW[how],
    )
    content, calls, end = "", dict[int, tuple[str, str]](), None
    for part in parts:
        for choice in part.choices:
            end = choice.finish_reason or end
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                name, arguments = calls.get(call.index, ("", ""))
                calls[call.index] = name or call.function.name or "", arguments + (call.function.arguments or "")
    return Said(content or None, list(calls.values()), end)


def is_valid(said: Said, how: str) -> bool:
    """As it was asked for, to the letter."""
    if how == "schema":
        jsonschema.validate(json.loads(said.content or ""), SCHEMA)
    else:
        for name, arguments in said.calls:
            jsonschema.validate(json.loads(arguments), PARAMETERS[name])
    return bool(said.calls) != (how == "schema")


def asked(count: int) -> list[str]:
    found = questions(-(-count // 6))
    return found[:: max(1, len(found) // count)][:count]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("auto", marks=pytest.mark.feature("tool calls: auto")),
        pytest.param("required", marks=pytest.mark.feature("tool calls: required")),
        pytest.param("named", marks=pytest.mark.feature("tool calls: named")),
    ],
)
@pytest.mark.feature("tool calls: streamed")
def test_tool_calls(how: str, pair: Pair) -> None:
    for question in asked(4):
        whole, plain = ask(pair.drafting, question, how), ask(pair.plain, question, how)
        assert whole == plain
        assert is_valid(whole, how)
        streamed = ask_streaming(pair.drafting, question, how)
        assert streamed == ask_streaming(pair.plain, question, how)
        assert [(name, json.loads(arguments)) for name, arguments in streamed.calls] == [
            (name, json.loads(arguments)) for name, arguments in whole.calls
        ]


@pytest.mark.feature("100 requests bound to schemas and tools")
@pytest.mark.feature("data parallelism")
@pytest.mark.feature("metrics of each rank and each request")
def test_a_hundred_at_once(pair: Pair) -> None:
    """All of them valid, and word for word what they are without drafts; and every rank's drafts are counted."""
    ways = ["schema", "required", "named", "auto"]
    work = [(question, ways[index % 4]) for index, question in enumerate(asked(100))]
    told, before = list[dict[str, Any]](), by_rank(pair.drafting)
    with ThreadPoolExecutor(16) as pool:
        drafted = list(pool.map(lambda one: ask(pair.drafting, *one, told), work))
        plain = list(pool.map(lambda one: ask(pair.plain, *one), work))
    assert len(work) == 100
    assert drafted == plain
    assert all(is_valid(said, how) for said, (_, how) in zip(drafted, work, strict=True))

    ranks = {rank: now - before[rank] for rank, now in by_rank(pair.drafting).items()}
    assert set(ranks) == {"0", "1"}
    of_requests = Counter[str]()
    for one in told:
        of_requests.update(cycles=one["num_spec_steps"], accepted=one["num_accepted_draft_tokens"])
    assert of_requests["accepted"] > 100
    assert ranks["0"] + ranks["1"] == of_requests
    assert min(ranks["0"]["cycles"], ranks["1"]["cycles"]) > 0, "one rank's counts alone would look complete"


METRICS = {
    "vllm:spec_decode_num_drafts_total": "cycles",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted",
}


def by_rank(server: Server) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for sample in server.metrics("vllm:spec_decode_"):
        if sample.name in METRICS:
            found.setdefault(sample.labels["engine"], Counter())[METRICS[sample.name]] += int(sample.value)
    return found


@pytest.mark.feature("echo")
def test_echo(pair: Pair) -> None:
    """The prompt comes back in front of the answer, with its log-probabilities."""

    def echoed(server: Server) -> Any:
        answer = client(server).completions.create(
            model="tiny", prompt="0 + 5 = 5\n5 + 4 =", echo=True, logprobs=1, temperature=0, max_tokens=24
        )
        return answer.choices[0]

    mine, plain = echoed(pair.drafting), echoed(pair.plain)
    assert mine.text == plain.text
    assert mine.text.startswith("0 + 5 = 5\n5 + 4 =")
    assert mine.logprobs.tokens == plain.logprobs.tokens
    assert mine.logprobs.token_logprobs[1:] == pytest.approx(plain.logprobs.token_logprobs[1:], abs=2e-3)


@pytest.mark.feature("chat of several turns")
def test_several_turns(pair: Pair) -> None:
    """Prefixes that are cached by the turn before, on either rank."""

    def talk(server: Server) -> list[str]:
        messages: list[Any] = []
        for question in asked(4):
            messages.append({"role": "user", "content": question[:60]})
            answer = client(server).chat.completions.create(
                model="tiny", messages=messages, temperature=0, max_tokens=32
            )
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        return [message["content"] for message in messages]

    assert talk(pair.drafting) == talk(pair.plain)
