"""What cascades cost in text and bring in forwards: each rule over its settings, beside the same engine without.

One request at a time, each class of prompts for itself, and beside lossless decoding of the same prompts:

    tokens per forward    tokens behind the prompt / (steps + draft passes)
    seconds               of all answers, beside those of lossless decoding
    same                  answers that are lossless decoding's, to the last token
    departed              tokens that a rule left to the draft and that weren't the model's likeliest, of all tokens
    perplexity            of the text, by the model
    right                 answers that are right, where that can be told: see `answers.py`
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_orthrus.bench import plots
from vllm_orthrus.bench.answers import CHECKS, is_right
from vllm_orthrus.bench.asked import classes_of, environment_of, prepare, settings_for, title_of
from vllm_orthrus.bench.files import write_csv, write_json
from vllm_orthrus.bench.offline import Engine, starting
from vllm_orthrus.bench.prompts import Prompt
from vllm_orthrus.bench.ways import PLAIN, Way
from vllm_orthrus.cascades.rules import RULES
from vllm_orthrus.errors import UserError

LOSSLESS = "lossless"
COLUMNS = (
    *("rule", "setting", "class", "prompts", "tokens", "forwards", "tokens_per_forward", "seconds", "same", "departed"),
    *("perplexity", "right"),
)
RATIO = 0.05  # of `relaxed`, while k is varied


def run_cascade(asked: argparse.Namespace) -> int:
    out = prepare(asked, ("per_class",))
    rules = asked.rules or list(RULES)
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown:
        raise UserError(f"--rules {' '.join(unknown)}: known are {', '.join(RULES)}.")
    settings = settings_for(asked)
    way = next((one for one in settings.ways if one.name != PLAIN), None)
    if way is None or way.speculative is None:
        raise UserError("--ways plain: drafts nothing that a rule could be asked about. Give two or one.")
    way = Way(way.name, way.speculative | {"draft_sample_method": "probabilistic"})
    facts = environment_of(asked, settings, 1, f"vLLM's engine, {way.name} passes")
    print(f"logs in {settings.logs}", flush=True)
    expected = answers_of(Path(asked.dataset))
    classes = {kind: prompts[: asked.per_class] for kind, prompts in classes_of(asked).items()}
    cascades = list(to_try(rules, asked.alphas, asked.ks))
    rows = []
    with starting(settings, [way]) as engines, tqdm(total=len(classes) * (1 + len(cascades))) as progress:
        sampling = {"temperature": settings.temperature, "max_tokens": settings.tokens}
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(asked.model)
        for kind, prompts in classes.items():
            told = expected.get(kind, [])[: len(prompts)]
            ask(engines[way.name], prompts[:1], sampling)  # whatever a first request waits for
            lossless = ask(engines[way.name], prompts, sampling)
            rows.append(figures(LOSSLESS, "", kind, lossless, lossless, told, tokenizer))
            progress.update(1)
            for rule, setting, cascade in cascades:
                found = ask(engines[way.name], prompts, sampling | {"extra_args": {"orthrus_cascade": cascade}})
                rows.append(figures(rule, setting, kind, found, lossless, told, tokenizer))
                progress.update(1)
    write_json(out, {"environment": facts, "found": rows})
    write_csv(out.with_suffix(".csv"), COLUMNS, rows)
    plots.draw_cascades(rows, title_of(asked, facts), out.with_suffix(".png"))
    print(table(rows))
    print(f"\n{out}, {out.with_suffix('.csv').name}, {out.with_suffix('.png').name}")
    return 0


def to_try(
    rules: Sequence[str], alphas: Sequence[float], ks: Sequence[int]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Rule, how it is set, and what a request says."""
    for rule in rules:
        if rule == "relaxed":
            yield from ((rule, f"k={k}", {"rule": rule, "k": k, "ratio": RATIO}) for k in ks)
        else:
            yield from ((rule, f"{alpha:g}", {"rule": rule, "alpha": alpha}) for alpha in alphas)


def answers_of(dataset: Path) -> dict[str, list[str]]:
    """By class, in the order of the prompts; none where the dataset has none."""
    found: dict[str, list[str]] = {}
    if dataset.suffix == ".jsonl" and dataset.is_file():
        for line in dataset.read_text().splitlines():
            record = json.loads(line)
            if isinstance(record.get("answer"), str):
                found.setdefault(str(record.get("class")), []).append(record["answer"])
    return found


def ask(engine: Engine, prompts: Sequence[Prompt], sampling: Mapping[str, Any]) -> dict[str, Any]:
    return engine.ask(prompts, 1, logprobs=1, **sampling)


def figures(
    rule: str,
    setting: str,
    kind: str,
    found: Mapping[str, Any],
    lossless: Mapping[str, Any],
    expected: Sequence[str],
    tokenizer: Any,
) -> dict[str, Any]:
    said, counted = found["said"], found["counted"]
    tokens = sum(map(len, said)) - len(said)  # a prompt's first token comes of its own step
    passes = counted.get("vllm:orthrus_draft_passes", counted.get("vllm:spec_decode_num_drafts", 0))
    forwards = found["steps"] - len(said) + passes
    logprobs = [
        dict(map(tuple, likeliest))[token]
        for text, places in zip(said, found["likeliest"], strict=True)
        for token, likeliest in zip(text, places, strict=True)
    ]
    right = None
    if kind in CHECKS and len(expected) == len(said):
        texts = [tokenizer.decode(text, skip_special_tokens=True) for text in said]
        right = sum(is_right(kind, text, answer) for text, answer in zip(texts, expected, strict=True)) / len(said)
    return {
        "rule": rule,
        "setting": setting,
        "class": kind,
        "prompts": len(said),
        "tokens": tokens,
        "forwards": forwards,
        "tokens_per_forward": tokens / forwards,
        "seconds": found["seconds"] / lossless["seconds"],
        "same": sum(one == other for one, other in zip(said, lossless["said"], strict=True)) / len(said),
        "departed": counted.get("vllm:orthrus_cascade_departures", 0) / max(1, tokens),
        "perplexity": math.exp(-sum(logprobs) / len(logprobs)),
        "right": right,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    heading = f"{'class':<12}{'rule':<10}{'setting':>8}{'tok/forward':>13}{'seconds':>9}{'same':>7}{'departed':>10}"
    lines = [f"{heading}{'perplexity':>12}{'right':>7}"]
    for row in rows:
        right = "-" if row["right"] is None else f"{row['right']:.2f}"
        lines.append(
            f"{row['class'][:11]:<12}{row['rule']:<10}{row['setting']:>8}{row['tokens_per_forward']:>13.2f}"
            f"{row['seconds']:>9.2f}{row['same']:>7.2f}{row['departed']:>10.3f}{row['perplexity']:>12.3f}{right:>7}"
        )
    return "\n".join(lines)
