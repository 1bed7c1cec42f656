"""The shipped tiny model, as tests of features use it: text that drafts foresee, in blocks of sixteen rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.engine.harness import Engine, Run

TINY = Path(__file__).parents[2] / "examples" / "tiny-orthrus"
OPTIONS: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_batched_tokens": 1024,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": False,
}


def trained_head(passes: str, **settings: Any) -> dict[str, Any]:
    """All drafts in every step, so that what is kept of them can be compared."""
    few = {"orthrus_hypotheses": 4, "orthrus_rows": 1024, "orthrus_modes": []}
    return {"method": "orthrus", "model": str(TINY / "head"), "orthrus_passes": passes} | few | settings


def questions(each: int = 1, first: int = 0) -> list[str]:
    """So many of every class."""
    lines = [json.loads(line) for line in (TINY / "heldout.jsonl").read_text().splitlines()]
    kinds = dict.fromkeys(line["class"] for line in lines)
    return [one["prompt"] for kind in kinds for one in [x for x in lines if x["class"] == kind][first : first + each]]


def chat(engine: Engine, *turns: str) -> list[int]:
    """Turns of the user's and the model's, the user's first, as tokens."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)]
    tokens: list[int] = engine.llm.get_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return tokens


class Trained(NamedTuple):
    """Two engines: one that drafts, and what it must agree with."""

    plain: Engine
    drafting: Engine
    answers: dict[str, Run]  # the plain engine's, kept for the session

    def prompts(self, each: int = 1, first: int = 0) -> list[list[int]]:
        return [chat(self.plain, question) for question in questions(each, first)]

    def plainly(self, prompts: Sequence[Sequence[int]], max_tokens: int = 48, **sampling: Any) -> Run:
        asked = repr((prompts, max_tokens, sampling))
        if asked not in self.answers:
            self.answers[asked] = self.plain.run(prompts, max_tokens, **sampling)
        return self.answers[asked]

    def both(self, prompts: Sequence[Sequence[int]], max_tokens: int = 48, **sampling: Any) -> tuple[Run, Run]:
        """With drafts and without; drafts must have been kept."""
        drafted = self.drafting.run(prompts, max_tokens, **sampling)
        assert 0 < drafted.counts.accepted <= drafted.counts.drafted
        return drafted, self.plainly(prompts, max_tokens, **sampling)


def texts(run: Run) -> list[tuple[str, str, Any]]:
    """What each answer says, and why it ends."""
    return [(one.text, one.finish_reason, one.stop_reason) for output in run.outputs for one in output.outputs]


def cut(run: Run) -> int:
    """Tokens that were verified, and thrown away because the answer had ended: its end lay inside a block."""
    verified = len(run.outputs) + run.counts.steps + run.counts.accepted  # each prompt gives one token, too
    return verified - sum(len(one.token_ids) for output in run.outputs for one in output.outputs)


def tokens_per_cycle(run: Run) -> float:
    return 1 + run.counts.accepted / run.counts.steps
