"""Mixed requests in an open loop: they come when they come, whether or not the server is done with the others."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import openai

from tests.serve.servers import MODEL, TINY
from vllm_orthrus.training.samples import read_jsonl

RATES = {  # shares of what comes
    "short": 6,
    "long": 3,
    "stop": 1,
    "json": 2,
    "regex": 1,
    "choice": 1,
    "penalties": 1,
    "logprobs": 1,
    "sampled": 3,
    "seeded": 1,
    "several": 1,
}
LEAVING = 0.15  # share of requests whose client goes away in the middle
STREAMING = 0.5
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
REGEX = r"[0-9]{1,3} \+ [0-9]{1,3} = [0-9]{1,4}"
CHOICES = ["yes", "no", "it depends"]


class Request(NamedTuple):
    kind: str
    body: Mapping[str, Any]  # of a chat
    stream: bool
    leaves_after: float | None = None  # seconds or, of a stream, pieces

    @property
    def greedy(self) -> bool:
        return self.body["temperature"] == 0

    @property
    def key(self) -> str:
        """The same for all whose greedy answers must be the same."""
        return json.dumps(self.body, sort_keys=True)


class Answer(NamedTuple):
    text: str
    finish: str | None  # none: the client left
    tokens: int
    prompt_tokens: int


@dataclass
class Outcome:
    request: Request
    begun: float
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    left: bool = False
    error: str | None = None

    @property
    def whole(self) -> bool:
        return self.error is None and not self.left


class Pool:
    """Few enough that they come again and again, as prompts do; many enough that they don't all fit into the cache."""

    def __init__(self, seed: int = 0) -> None:
        self.choose = random.Random(seed)
        self.records = [record for record in read_jsonl(TINY / "heldout.jsonl") if len(record["prompt"]) < 400]
        self.long = [self._conversation() for _ in range(40)]

    def _conversation(self) -> list[dict[str, str]]:
        """Some hundred tokens that end in a question; several begin alike, so that their blocks are shared."""
        first = self.choose.choice(self.records[:4])
        turns = [first, *self.choose.sample(self.records, 3)]
        said: list[dict[str, str]] = []
        for record in turns:
            said += [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["answer"][:200]},
            ]
        return [*said, {"role": "user", "content": self.choose.choice(self.records)["prompt"]}]

    def requests(self) -> Iterator[Request]:
        kinds, shares = list(RATES), list(RATES.values())
        while True:
            yield self.request(self.choose.choices(kinds, shares)[0])

    def request(self, kind: str) -> Request:
        draw = self.choose
        few = kind != "short" or draw.random() < 0.3
        prompt = draw.choice(self.records[:: len(self.records) // 30 if few else 1])["prompt"]
        messages = draw.choice(self.long) if kind == "long" else [{"role": "user", "content": prompt}]
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": messages,
            "temperature": 0,
            "max_tokens": 24 + 8 * (len(str(messages)) % 11),  # by the prompt, so that the same comes again
        }
        match kind:
            case "stop":
                body["stop"] = ["\n"]
            case "json":
                schema = {"name": "item", "schema": SCHEMA, "strict": True}
                body |= {"response_format": {"type": "json_schema", "json_schema": schema}, "max_tokens": 64}
            case "regex":
                body["extra_body"] = {"structured_outputs": {"regex": REGEX}}
            case "choice":
                body["extra_body"] = {"structured_outputs": {"choice": CHOICES}}
            case "penalties":
                body |= {"presence_penalty": 0.4, "extra_body": {"repetition_penalty": 1.2}}
            case "logprobs":
                body |= {"logprobs": True, "top_logprobs": 2}
            case "sampled":
                body |= {"temperature": 0.8, "top_p": 0.95}
            case "seeded":
                body |= {"temperature": 1.0, "seed": draw.randrange(8)}
            case "several":
                body |= {"temperature": 0.7, "n": 2}
        stream = draw.random() < STREAMING
        if draw.random() >= LEAVING:
            return Request(kind, body, stream)
        return Request(kind, body, stream, draw.randrange(1, 12) if stream else draw.uniform(0.05, 0.6))


def client(url: str, timeout: float = 120) -> openai.AsyncOpenAI:
    """One that tells what happened at once, instead of trying again."""
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=timeout)


async def ask(to: openai.AsyncOpenAI, request: Request) -> Outcome:
    outcome = Outcome(request, time.monotonic())
    try:
        if request.stream:
            await _stream(to, request, outcome)
        else:
            try:
                reply = await asyncio.wait_for(to.chat.completions.create(**request.body), request.leaves_after)
                used = reply.usage
                for choice in reply.choices:
                    alone = len(reply.choices) == 1
                    finish = choice.finish_reason
                    told = (used.completion_tokens, used.prompt_tokens) if alone else (0, 0)
                    outcome.answers.append(Answer(choice.message.content or "", finish, *told))
            except TimeoutError:
                outcome.left = True
    except openai.APIError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.seconds = time.monotonic() - outcome.begun
    return outcome


async def _stream(to: openai.AsyncOpenAI, request: Request, outcome: Outcome) -> None:
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    used = None
    pieces = 0
    stream = await to.chat.completions.create(**request.body, stream=True, stream_options={"include_usage": True})
    async with stream:
        async for piece in stream:
            used = piece.usage or used
            for choice in piece.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
                if choice.finish_reason:
                    finishes[choice.index] = choice.finish_reason
                pieces += bool(choice.delta.content)
            if request.leaves_after is not None and pieces >= request.leaves_after:
                outcome.left = True
                break
    if not outcome.left and len(finishes) < request.body.get("n", 1):
        outcome.error = "the stream ended before the answer did"
    told = (used.completion_tokens, used.prompt_tokens) if used and len(texts) == 1 else (0, 0)
    for index, text in sorted(texts.items()):
        outcome.answers.append(Answer(text, finishes.get(index), *told))


@dataclass
class Traffic:
    """What came of it."""

    outcomes: list[Outcome] = field(default_factory=list)
    withheld: int = 0  # as too many were under way, so that the loop was not open for once


async def send(
    url: str,
    requests: Iterator[Request],
    rate: float,
    seconds: float,
    most: int = 64,
    seed: int = 0,
    seen: Callable[[Outcome], None] = lambda _: None,
) -> Traffic:
    """So many a second, at random times, for so long; and then until the last is answered."""
    traffic, draw, under_way = Traffic(), random.Random(seed), set[asyncio.Task[None]]()
    async with client(url) as to:

        async def one(request: Request) -> None:
            outcome = await ask(to, request)
            traffic.outcomes.append(outcome)
            seen(outcome)

        started = due = time.monotonic()
        while (due := due + draw.expovariate(rate)) < started + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if len(under_way) >= most:
                traffic.withheld += 1
                continue
            task = asyncio.create_task(one(next(requests)))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)
    return traffic


async def answer_all(url: str, requests: Sequence[Request], at_once: int = 8) -> dict[str, Outcome]:
    """One answer to each that differs, whole and not streamed, by its key."""
    turn = asyncio.Semaphore(at_once)
    async with client(url) as to:

        async def one(request: Request) -> Outcome:
            async with turn:
                return await ask(to, Request(request.kind, request.body, stream=False))

        different = {request.key: request for request in requests}
        found = await asyncio.gather(*(one(request) for request in different.values()))
    return dict(zip(different, found, strict=True))


def difference(mine: Outcome, expected: Outcome) -> str | None:
    """How an answer differs from the one it must be, or begin."""
    if expected.error:
        return f"plain vLLM: {expected.error}"
    wanted = expected.answers[0]
    if not mine.answers:
        return None if mine.left else "no answer"
    found = mine.answers[0]
    if mine.left and wanted.text.startswith(found.text):
        return None
    if not mine.left and found == wanted:
        return None
    return f"{mine.request.kind}: {found} instead of {wanted}, to {mine.request.key}"


def misshapen(outcome: Outcome) -> str | None:
    """What is wrong with an answer that must have a shape, and was allowed to end."""
    for answer in outcome.answers:
        if not outcome.whole or answer.finish != "stop":
            continue
        text = answer.text
        match outcome.request.kind:
            case "json":
                found = json.loads(text)
                right = set(found) == {"name", "count"} and isinstance(found["count"], int)
            case "regex":
                right = re.fullmatch(REGEX, text) is not None
            case "choice":
                right = text in CHOICES
            case _:
                right = True
        if not right:
            return f"{outcome.request.kind}: {text!r}"
    return None
