"""Real tokens per cycle: the two-pass loop over held-out prompts, by prompt class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from vllm_orthrus.training.config import ConfigError
from vllm_orthrus.training.reference import Cycle, Drafting, Generation, Reference, tokens_per_cycle
from vllm_orthrus.training.samples import encode_prompt, read_jsonl


class Prompt(NamedTuple):
    kind: str
    tokens: list[int]


class Setting(NamedTuple):
    """How to decode while measuring."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    num_drafts: int | None = None
    width: int | None = None
    drafting: Drafting = "probabilistic"
    batch: int = 32
    seed: int = 0


class Acceptance(NamedTuple):
    """What was accepted on the prompts of one class."""

    prompts: int
    tokens: int
    cycles: list[Cycle]
    per_prompt: float  # tokens per cycle, averaged over prompts instead of cycles

    @property
    def tokens_per_cycle(self) -> float:
        return tokens_per_cycle(self.cycles)

    def by_position(self) -> list[float]:
        """For each draft position, how often it was accepted: its share of all cycles."""
        proposed = max((cycle.proposed for cycle in self.cycles), default=0)
        return [sum(cycle.accepted > i for cycle in self.cycles) / len(self.cycles) for i in range(proposed)]


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """`prompt` and `class` of each line, the prompt put through the chat template if there is one."""
    if not path.is_file():
        raise ConfigError(f"the prompt file {path} does not exist. Give a JSONL file with `prompt` and `class`.")
    prompts: list[Prompt] = []
    for number, record in enumerate(read_jsonl(path), 1):
        if "prompt" not in record:
            raise ConfigError(f"{path}, line {number}: no `prompt` among the columns {sorted(record)}.")
        prompts.append(Prompt(str(record.get("class", "all")), encode_prompt(tokenizer, record["prompt"])))
    if not prompts:
        raise ConfigError(f"{path} holds no prompts.")
    return prompts


def first_per_class(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """The first `count` prompts of each class; all of them without a count."""
    seen: Counter[str] = Counter()
    chosen = []
    for prompt in prompts:
        seen[prompt.kind] += 1
        if count is None or seen[prompt.kind] <= count:
            chosen.append(prompt)
    return chosen


def decode(
    reference: Reference,
    prompts: Sequence[Prompt],
    stop: Sequence[int],
    setting: Setting,
    show_progress: bool = False,
) -> list[Generation]:
    """Run the two-pass loop on every prompt; results in the order of the prompts."""
    generator = torch.Generator(reference.device).manual_seed(setting.seed)
    # Prompts of like length together, which wastes little of the prefill.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].tokens))
    done: dict[int, Generation] = {}
    for start in tqdm(range(0, len(order), setting.batch), "decoding held-out prompts", disable=not show_progress):
        part = order[start : start + setting.batch]
        results = reference.generate(
            [prompts[index].tokens for index in part],
            setting.max_new_tokens,
            setting.temperature,
            setting.num_drafts,
            setting.width,
            setting.drafting,
            stop,
            generator,
        )
        done.update(zip(part, results, strict=True))
    return [done[index] for index in range(len(prompts))]


def summarise(prompts: Sequence[Prompt], generations: Sequence[Generation]) -> dict[str, Acceptance]:
    """Results by class, and under `all` for the whole set where there are several classes."""
    by_kind: dict[str, list[Generation]] = {}
    for prompt, generation in zip(prompts, generations, strict=True):
        by_kind.setdefault(prompt.kind, []).append(generation)
    if len(by_kind) > 1:
        by_kind["all"] = list(generations)
    return {kind: _acceptance(found) for kind, found in by_kind.items()}


def _acceptance(generations: list[Generation]) -> Acceptance:
    drafted = [generation for generation in generations if generation.cycles]  # a one-token answer needs no cycle
    return Acceptance(
        len(generations),
        sum(len(generation.tokens) for generation in generations),
        [cycle for generation in generations for cycle in generation.cycles],
        sum(generation.tokens_per_cycle for generation in drafted) / len(drafted) if drafted else float("nan"),
    )


def table(results: dict[str, Acceptance], positions: Sequence[int] = (1, 2, 3, 4, 6, 8, 12, 15)) -> str:
    """Tokens per cycle (bonus included) and the share of cycles that accepted draft 1, 2, ... by class."""
    width = max((len(result.by_position()) for result in results.values()), default=0)
    shown = [position for position in positions if position <= width]
    lines = [
        f"{'class':<12}{'prompts':>8}{'tokens':>8}{'tok/cycle':>11}{'per prompt':>12}   accepted at draft position",
        f"{'':<51}   " + "".join(f"{position:>6}" for position in shown),
    ]
    for kind, result in results.items():
        rates = result.by_position()
        cells = "".join(f"{rates[position - 1]:>6.2f}" if position <= len(rates) else f"{'-':>6}" for position in shown)
        figures = f"{result.prompts:>8}{result.tokens:>8}{result.tokens_per_cycle:>11.2f}{result.per_prompt:>12.2f}"
        lines.append(f"{kind:<12}{figures}   {cells}")
    return "\n".join(lines)
