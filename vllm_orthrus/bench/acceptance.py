"""How much of what is drafted the model keeps, as vLLM counts it: one request at a time, by class.

    tokens per cycle   = 1 + accepted / cycles
    tokens per forward = tokens behind the prompt / (steps + draft passes)

A step is one forward that verifies, or decodes plainly. In two passes each cycle had a draft pass before it; in one
pass drafts come with the verification, and the passes that were needed all the same are counted by the engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from vllm_orthrus.bench.offline import starting
from vllm_orthrus.bench.prompts import Classes
from vllm_orthrus.bench.settings import Settings
from vllm_orthrus.bench.summary import ALL

COLUMNS = ("way", "class", "prompts", "tokens", "cycles", "accepted", "tokens_per_cycle", "tokens_per_forward")


def measure(settings: Settings, classes: Classes, at_a_time: int = 8) -> dict[str, dict[str, Any]]:
    """By way and class. Ways are up one after the other: nothing here depends on the clock's fairness."""
    sampling = {"temperature": settings.temperature, "max_tokens": settings.tokens}
    summary: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(settings.ways) * sum(map(len, classes.values())), desc="prompts") as progress:
        for way in settings.ways:
            progress.set_postfix_str(way.name)
            counted: dict[str, Counter[str]] = {}
            with starting(settings, [way]) as engines:
                for kind, prompts in classes.items():
                    total = counted.setdefault(kind, Counter(prompts=len(prompts)))
                    for first in range(0, len(prompts), at_a_time):
                        some = prompts[first : first + at_a_time]
                        found = engines[way.name].ask(some, 1, **sampling)
                        # A prompt's first token comes of its own step, which no way does differently.
                        total.update(found["counted"])
                        total.update(tokens=sum(map(len, found["said"])) - len(some), steps=found["steps"] - len(some))
                        progress.update(len(some))
            if len(counted) > 1:
                counted[ALL] = sum(counted.values(), Counter())
            summary[way.name] = {kind: figures(total) for kind, total in counted.items()}
    return summary


def figures(counted: Mapping[str, int]) -> dict[str, Any]:
    cycles, accepted = (counted.get(f"vllm:spec_decode_num_{name}", 0) for name in ("drafts", "accepted_tokens"))
    passes = counted.get("vllm:orthrus_draft_passes", cycles)
    forwards = counted["steps"] + passes
    # Behind the last place that was ever kept there is nothing to tell.
    places = [count for name, count in sorted(_places(counted)) if count]
    return {
        "prompts": counted["prompts"],
        "tokens": counted["tokens"],
        "cycles": cycles,
        "accepted": accepted,
        "tokens_per_cycle": 1 + accepted / cycles if cycles else 1.0,
        "tokens_per_forward": counted["tokens"] / forwards if forwards else 1.0,
        "accepted_at": [count / cycles for count in places] if cycles else [],
    }


def _places(counted: Mapping[str, int]) -> list[tuple[int, int]]:
    named = ((name.removeprefix("accepted at "), count) for name, count in counted.items() if "accepted at" in name)
    return [(int(place), count) for place, count in named]


def table(summary: Mapping[str, Mapping[str, Any]], shown: Sequence[int] = (1, 2, 3, 4, 6, 8, 12, 15)) -> str:
    lines = [
        f"{'way':<8}{'class':<14}{'prompts':>8}{'tokens':>8}{'tok/cycle':>11}{'tok/forward':>13}   kept at place",
        " " * 65 + "".join(f"{place:>6}" for place in shown),
    ]
    for way, kinds in summary.items():
        for kind, found in kinds.items():
            kept = found["accepted_at"]
            places = "".join(f"{kept[place - 1]:>6.2f}" if place <= len(kept) else f"{'-':>6}" for place in shown)
            rates = f"{found['tokens_per_cycle']:>11.2f}{found['tokens_per_forward']:>13.2f}"
            lines.append(f"{way:<8}{kind[:13]:<14}{found['prompts']:>8}{found['tokens']:>8}{rates}   {places}")
    return "\n".join(lines)


def rows(summary: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For CSV: `accepted_at` in a column per place."""
    return [
        {"way": way, "class": kind, **found}
        | {f"accepted_at_{place}": share for place, share in enumerate(found["accepted_at"], 1)}
        for way, kinds in summary.items()
        for kind, found in kinds.items()
    ]
