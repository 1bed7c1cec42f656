"""The demonstration: the same prompts to plain vLLM and to vLLM with a head, and what that saved."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vllm_orthrus.demo.server import DraftCounters, Server, serve_command, serving
from vllm_orthrus.heads import HEAD_MAP_VARIABLE
from vllm_orthrus.training.samples import read_jsonl

MAX_TOKENS = 128
OPTIONS = (
    *("--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(256 << 20)),
)
AUTO: Mapping[str, object] = {"method": "orthrus"}
WAYS: Mapping[str, Mapping[str, object] | None] = {
    "plain": None,
    "two passes": {**AUTO, "orthrus_passes": "two"},
    "one pass": {**AUTO, "orthrus_passes": "one"},
    "auto": AUTO,
}


class Answers(NamedTuple):
    texts: list[str]
    tokens: int
    seconds: float
    counters: DraftCounters  # of these answers alone


def demonstrate(example: Path, per_class: int) -> bool:
    """Ask a server for each way the same held-out questions; whether their answers were identical."""
    questions = read_questions(example / "heldout.jsonl", per_class)
    folder = Path(tempfile.mkdtemp(prefix="vllm-orthrus-"))  # stays: the servers' logs are in it
    name_head(example, folder)
    answers: dict[str, Answers] = {}
    for number, (way, speculative) in enumerate(WAYS.items(), start=1):
        log = folder / f"{way.replace(' ', '-')}.log"
        with starting(titled(f"{number}/{len(WAYS)}", speculative), example / "base", log, speculative) as server:
            if way == "auto":
                print(f"\n> {questions[0]}")
                for piece in stream(server, questions[0]):
                    print(piece, end="", flush=True)
                print("\n")
            answers[way] = ask(server, questions)
    print(comparison(answers))
    return all(found.texts == answers["plain"].texts for found in answers.values())


def titled(place: str, speculative: Mapping[str, object] | None) -> str:
    if speculative is None:
        return f"{place}  vLLM as it is"
    return f"{place}  vLLM with --speculative-config '{json.dumps(dict(speculative))}'"


def serve(example: Path, port: int) -> None:
    """Become the server, until it is stopped."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-orthrus-"))
    name_head(example, folder)
    command = serve_command(example / "base", port, AUTO, OPTIONS)
    print(" ".join(command), flush=True)
    os.execv(command[0], command)


def name_head(example: Path, folder: Path) -> None:
    """Add the example's head to the head map, so that the method's name alone is enough, as for the published heads."""
    path = folder / "heads.json"
    path.write_text(json.dumps({str(example / "base"): str(example / "head")}))
    os.environ[HEAD_MAP_VARIABLE] = str(path)


def read_questions(path: Path, per_class: int) -> list[str]:
    by_class: dict[str, list[str]] = {}
    for record in read_jsonl(path):
        by_class.setdefault(record["class"], []).append(record["prompt"])
    return [question for questions in by_class.values() for question in questions[:per_class]]


def client(server: Server) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


def ask(server: Server, questions: list[str]) -> Answers:
    """Greedy answers to all questions, one at a time, and what the server counted meanwhile."""
    before = server.draft_counters()
    texts, tokens, started = [], 0, time.monotonic()
    for question in questions:
        reply = client(server).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": question}], max_tokens=MAX_TOKENS, temperature=0
        )
        texts.append(reply.choices[0].message.content)
        tokens += reply.usage.completion_tokens
    return Answers(texts, tokens, time.monotonic() - started, server.draft_counters() - before)


def stream(server: Server, question: str) -> Iterator[str]:
    pieces = client(server).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": question}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
    )
    for piece in pieces:
        yield piece.choices[0].delta.content or ""


def comparison(answers: Mapping[str, Answers]) -> str:
    """Requests came one at a time, so that each step of the engine is one forward, or two.

    "auto" mixes steps of several kinds, which vLLM does not count apart.
    """
    plain = answers["plain"]
    asked = len(plain.texts)
    # The first token of an answer comes with its prompt.
    steps = {"plain": plain.tokens - asked}
    steps |= {way: answers[way].counters.cycles for way in ("two passes", "one pass")}
    # With one pass, only the first block of an answer needs a pass of its own.
    forwards = steps | {"two passes": 2 * steps["two passes"], "one pass": steps["one pass"] + asked}
    same = {way: "yes" if found.texts == plain.texts else "NO" for way, found in answers.items() if way != "plain"}

    def row(title: str, values: Mapping[str, object], form: str = "") -> str:
        cells = (f"{values[way]:>12{form}}" if way in values else f"{'':>12}" for way in answers)
        return f"{title:<28}" + "".join(cells).rstrip()

    def produced_per(counts: Mapping[str, int]) -> dict[str, float]:
        return {way: (answers[way].tokens - asked) / count for way, count in counts.items()}

    lines = [
        row("", {way: way for way in answers}),
        row("tokens", {way: found.tokens for way, found in answers.items()}),
        row("seconds", {way: found.seconds for way, found in answers.items()}, ".1f"),
        row("decoding steps", steps),
        row("tokens per step", produced_per(steps), ".2f"),
        row("forwards of the model", forwards),
        row("tokens per forward", produced_per(forwards), ".2f"),
        row("same text as plain", same),
        "",
        "drafts accepted, by place in the block",
    ]
    for way in ("two passes", "one pass"):
        counters = answers[way].counters
        shares = (f"{count / max(1, counters.cycles):.2f}" for count in counters.accepted_at)
        lines.append(f"{way:<12}" + " ".join(shares))
    return "\n".join(lines)


@contextmanager
def starting(what: str, base: Path, log: Path, speculative: Mapping[str, object] | None) -> Iterator[Server]:
    """A server for the length of the block, with a line that grows until it is ready."""
    print(what, end=" ", flush=True)
    waiting = threading.Event()

    def dots() -> None:
        while not waiting.wait(1.0):
            print(".", end="", flush=True)

    threading.Thread(target=dots, daemon=True).start()
    with ExitStack() as stack:
        try:
            server = stack.enter_context(serving(base, log, speculative, OPTIONS))
        finally:
            waiting.set()
        print(" ready", flush=True)
        yield server
