"""The demonstration: the same prompts to plain vLLM and to vLLM with a head, and what that saved."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
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
ONE_PASS: Mapping[str, object] = {"method": "orthrus"}
TWO_PASS: Mapping[str, object] = {"method": "orthrus", "orthrus_passes": "two"}


class Answers(NamedTuple):
    texts: list[str]
    tokens: int
    counters: DraftCounters  # of these answers alone


def demonstrate(example: Path, per_class: int) -> bool:
    """Ask both servers the same held-out questions; whether their answers were identical."""
    questions = read_questions(example / "heldout.jsonl", per_class)
    folder = Path(tempfile.mkdtemp(prefix="vllm-orthrus-"))  # stays: the servers' logs are in it
    name_head(example, folder)
    with starting("1/3  vLLM as it is", example / "base", folder / "plain.log", None) as server:
        plain = ask(server, questions)
    with starting(titled("2/3", TWO_PASS), example / "base", folder / "two-pass.log", TWO_PASS) as server:
        two_pass = ask(server, questions)
    with starting(titled("3/3", ONE_PASS), example / "base", folder / "one-pass.log", ONE_PASS) as server:
        print(f"\n> {questions[0]}")
        for piece in stream(server, questions[0]):
            print(piece, end="", flush=True)
        print("\n")
        one_pass = ask(server, questions)
    print(comparison(plain, two_pass, one_pass))
    return plain.texts == two_pass.texts == one_pass.texts


def titled(place: str, speculative: Mapping[str, object]) -> str:
    return f"{place}  vLLM with --speculative-config '{json.dumps(dict(speculative))}'"


def serve(example: Path, port: int) -> None:
    """Become the server, until it is stopped."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-orthrus-"))
    name_head(example, folder)
    command = serve_command(example / "base", port, ONE_PASS, OPTIONS)
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
    texts, tokens = [], 0
    for question in questions:
        reply = client(server).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": question}], max_tokens=MAX_TOKENS, temperature=0
        )
        texts.append(reply.choices[0].message.content)
        tokens += reply.usage.completion_tokens
    return Answers(texts, tokens, server.draft_counters() - before)


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


def comparison(plain: Answers, two_pass: Answers, one_pass: Answers) -> str:
    """Requests came one at a time, so that each step of the engine is one forward, or two."""
    answers = len(plain.texts)
    columns = (plain, two_pass, one_pass)
    # The first token of an answer comes with its prompt.
    steps = (plain.tokens - answers, two_pass.counters.cycles, one_pass.counters.cycles)
    # With one pass, only the first block of an answer needs a pass of its own.
    forwards = (steps[0], 2 * steps[1], steps[2] + answers)
    produced = [column.tokens - answers for column in columns]
    same = ["", *("yes" if column.texts == plain.texts else "NO" for column in columns[1:])]

    def row(title: str, values: Sequence[object], form: str = "") -> str:
        return f"{title:<28}" + "".join(f"{value:>12{form}}" for value in values)

    lines = [
        row("", ("plain", "two passes", "one pass")),
        row("tokens", [column.tokens for column in columns]),
        row("decoding steps", steps),
        row("tokens per step", [made / count for made, count in zip(produced, steps, strict=True)], ".2f"),
        row("forwards of the model", forwards),
        row("tokens per forward", [made / count for made, count in zip(produced, forwards, strict=True)], ".2f"),
        row("same text as plain", same),
        "",
        "drafts accepted, by place in the block",
    ]
    for title, column in (("two passes", two_pass), ("one pass", one_pass)):
        shares = (f"{count / max(1, column.counters.cycles):.2f}" for count in column.counters.accepted_at)
        lines.append(f"{title:<12}" + " ".join(shares))
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
