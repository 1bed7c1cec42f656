"""Ways to decode without servers: vLLM's engine, in a process each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from vllm_orthrus.bench.process import AnsweringProcess, ProcessError
from vllm_orthrus.bench.prompts import Prompt
from vllm_orthrus.bench.settings import Settings
from vllm_orthrus.bench.texts import Texts
from vllm_orthrus.bench.turns import Drafts, Turn
from vllm_orthrus.bench.ways import Way
from vllm_orthrus.errors import UserError

VARIABLES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}


class Engine:
    """One way, in its process."""

    def __init__(self, process: AnsweringProcess, settings: Settings) -> None:
        self.process, self.settings = process, settings

    def ask(self, prompts: Sequence[Prompt], at_once: int, **sampling: Any) -> dict[str, Any]:
        sampling |= {"ignore_eos": self.settings.ignore_eos}
        return self.process.ask([prompt.tokens for prompt in prompts], at_once, sampling)

    def answers(self, prompts: Sequence[Prompt], tokens: int) -> Texts:
        said: Texts = self.ask(prompts, 1, temperature=0, max_tokens=tokens)["said"]
        return said

    def turn(self, prompts: Sequence[Prompt], at_once: int) -> Turn:
        sampling = {"temperature": self.settings.temperature, "max_tokens": self.settings.tokens}
        found = self.ask(prompts, at_once, **sampling)
        return Turn(sum(map(len, found["said"])), found["seconds"], drafts_of(found["counted"]), {})


def drafts_of(counted: Mapping[str, int]) -> Drafts:
    names = ("drafts", "draft_tokens", "accepted_tokens")
    return Drafts(*(counted.get(f"vllm:spec_decode_num_{name}", 0) for name in names))


@contextmanager
def starting(settings: Settings, ways: Sequence[Way]) -> Iterator[Mapping[str, Engine]]:
    """One after the other, as each looks how much memory is left before it takes its share."""
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for way in ways:
            options = ["--model", settings.model, *settings.serve_options(len(ways))]
            if way.speculative is not None:
                options += ["--speculative-config", json.dumps(way.speculative)]
            log = settings.logs / f"{way.name}.log"
            process = AnsweringProcess(
                "vllm_orthrus.bench.engine", options, settings.variables | way.variables | VARIABLES, log
            )
            stack.enter_context(closing(process))
            try:
                process.ready()
            except ProcessError as error:
                raise UserError(
                    f"{error}\n{way.name} did not come up. If it was for lack of memory: --one-at-a-time gives each "
                    "way all of it."
                ) from error
            engines[way.name] = Engine(process, settings)
        yield engines
