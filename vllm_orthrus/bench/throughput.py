"""Ways to decode against plain decoding, by the clock: first whether they say the same, then how fast.

A turn is one way, one class of prompts and so many requests at a time. Ways take turns within a round, each time
another one first, so that whatever else the machine does falls on all of them; what is compared are turns of the same
round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from vllm_orthrus.bench.files import write_json
from vllm_orthrus.bench.prompts import Classes, choose
from vllm_orthrus.bench.settings import Settings
from vllm_orthrus.bench.texts import Texts, judge
from vllm_orthrus.bench.turns import Decoder, Start
from vllm_orthrus.bench.ways import Way

T = TypeVar("T")

CHECKED = 8  # prompts whose answers are compared, or one of each class if there are more


@dataclass
class Findings:
    path: Path
    environment: dict[str, Any]
    same_text: dict[str, str] = field(default_factory=dict)  # by way
    red: list[str] = field(default_factory=list)  # why nothing was timed
    flags: list[str] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        content = asdict(self)
        content.pop("path")
        write_json(self.path, content)


@dataclass(frozen=True)
class Plan:
    concurrency: list[int]
    rounds: int
    per_client: int
    side_by_side: bool


def measure(settings: Settings, plan: Plan, classes: Classes, start: Start, findings: Findings) -> None:
    """Nothing is timed if a way says something else than it must."""
    total = plan.rounds * len(plan.concurrency) * len(classes) * len(settings.ways)
    if plan.side_by_side:
        with start(settings.ways) as decoders:
            said = {name: _say(decoder, settings, classes) for name, decoder in decoders.items()}
            if _trusted(findings, settings, said):
                for decoder in decoders.values():
                    _warm_up(decoder, plan, classes)
                with tqdm(total=total, desc="turns") as progress:
                    for number in range(plan.rounds):
                        _round(decoders, plan, classes, number, findings, progress)
        return
    said = {}
    for way in tqdm(settings.ways, desc="answers to compare"):
        with start([way]) as decoders:
            said[way.name] = _say(decoders[way.name], settings, classes)
    if _trusted(findings, settings, said):
        with tqdm(total=total, desc="turns") as progress:
            for number in range(plan.rounds):
                for way in rotated(settings.ways, number):
                    with start([way]) as decoders:
                        _warm_up(decoders[way.name], plan, classes)
                        _round(decoders, plan, classes, number, findings, progress)


def _say(decoder: Decoder, settings: Settings, classes: Classes) -> Texts:
    each = max(1, CHECKED // len(classes))
    return decoder.answers([prompt for prompts in classes.values() for prompt in prompts[:each]], settings.tokens)


def _trusted(findings: Findings, settings: Settings, said: Mapping[str, Texts]) -> bool:
    same, findings.red = judge(said, settings.ways, settings.exact)
    findings.same_text = {name: str(found) for name, found in same.items()}
    findings.write()
    return not findings.red


def _warm_up(decoder: Decoder, plan: Plan, classes: Classes) -> None:
    """Compiles, allocates, and lets what learns from the clock see every number of requests once."""
    prompts = next(iter(classes.values()))
    for at_once in plan.concurrency:
        decoder.turn(choose(prompts, at_once, 0), at_once)


def _round(
    decoders: Mapping[str, Decoder], plan: Plan, classes: Classes, number: int, findings: Findings, progress: Any
) -> None:
    for at_once in plan.concurrency:
        for kind, prompts in classes.items():
            asked = choose(prompts, at_once * plan.per_client, number)
            for name in rotated(list(decoders), number):
                progress.set_postfix_str(f"{name}, {kind}, {at_once} at once")
                turn = decoders[name].turn(asked, at_once)
                place = {"round": number, "at_once": at_once, "class": kind, "way": name, "requests": len(asked)}
                found = {"tokens": turn.tokens, "seconds": turn.seconds, **turn.drafts._asdict(), **turn.more}
                findings.rounds.append(place | found)
                progress.update()
        findings.write()


def rotated(some: list[T], by: int) -> list[T]:
    by %= len(some)
    return some[by:] + some[:by]


def flags(ways: list[Way], rounds: list[dict[str, Any]]) -> list[str]:
    """Speculative decoding that cannot help, which no text would show."""
    found = []
    for way in ways:
        mine = [one for one in rounds if one["way"] == way.name]
        drafted, accepted = (sum(one[name] for one in mine) for name in ("drafted", "accepted"))
        if mine and way.speculative is not None and not accepted:
            what = f"none of {drafted} drafts was accepted" if drafted else "it made no drafts"
            found.append(f"{way.name}: {what}")
    return found
