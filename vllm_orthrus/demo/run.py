"""The demonstration: the same prompts to plain vLLM and to vLLM with a head, and what that saved."""

from __future__ import annotations

import json
import os
import tempfile
import threading
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
SPECULATIVE: Mapping[str, object] = {"method": "orthrus"}


class Answers(NamedTuple):
    texts: list[str]
    tokens: int
    counters: DraftCounters  # of these answers alone


def demonstrate(example: Path, per_class: int) -> bool:
    """Ask both servers the same held-out questions; whether their answers were identical."""
    questions = read_questions(example / "heldout.jsonl", per_class)
    folder = Path(tempfile.mkdtemp(prefix="vllm-orthrus-"))  # stays: the servers' logs are in it
    name_head(example, folder)
    with starting("1/2  vLLM as it is", example / "base", folder / "plain.log", None) as server:
        plain = ask(server, questions)
    method = f"2/2  vLLM with --speculative-config '{json.dumps(dict(SPECULATIVE))}'"
    with starting(method, example / "base", folder / "orthrus.log", SPECULATIVE) as server:
        print(f"\n> {questions[0]}")
        for piece in stream(server, questions[0]):
            print(piece, end="", flush=True)
        print("\n")
        drafted = ask(server, questions)
    print(comparison(plain, drafted))
    return plain.texts == drafted.texts


def serve(example: Path, port: int) -> None:
    """Become the server, until it is stopped."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-orthrus-"))
    name_head(example, folder)
    command = serve_command(example / "base", port, SPECULATIVE, OPTIONS)
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


def comparison(plain: Answers, drafted: Answers) -> str:
    """Verification steps are what plain decoding would call steps; the first token of an answer is the prefill's."""
    cycles, counters = drafted.counters.cycles, drafted.counters
    plain_steps = plain.tokens - len(plain.texts)
    lines = [
        f"{'':<28}{'plain':>10}{'orthrus':>10}",
        f"{'tokens':<28}{plain.tokens:>10}{drafted.tokens:>10}",
        f"{'decoding steps':<28}{plain_steps:>10}{cycles:>10}",
        f"{'tokens per step':<28}{1:>10.2f}{counters.tokens_per_cycle:>10.2f}",
        f"{'passes through the model':<28}{plain_steps:>10}{2 * cycles:>10}   (an Orthrus step drafts, then verifies)",
        f"{'identical answers':<28}{'':>10}{'yes' if plain.texts == drafted.texts else 'NO':>10}",
        "",
        "accepted at draft position "
        + "  ".join(f"{place}: {count / max(1, cycles):.2f}" for place, count in enumerate(counters.accepted_at, 1)),
    ]
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
