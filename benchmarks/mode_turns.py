"""What the policy of modes is worth on two cores, in turns of one class after the other, as cpu_modes asks for them.

    python -m benchmarks.mode_turns [--out FILE]

Steps take what a bench of this CPU found (evidence/cost-xeon-amx-2-cores.json); drafts are kept as the tiny model's
traces say. Each turn begins so many answers at once and ends with the last of them, and the next is of another class:
the hardest thing for a policy that learns from what it has just seen. One process, a minute.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.evidence import FOLDER, Evidence, environment
from benchmarks.traces import FILE as TRACES
from vllm_orthrus.policy.clock import Step
from vllm_orthrus.policy.kept import Outcome
from vllm_orthrus.policy.modes import ModePolicy
from vllm_orthrus.policy.replay import Text, read_traces

STEPS = FOLDER / "cost-xeon-amx-2-cores.json"
MODES = (0, 3, 7, 15)
TIMED = (1, 4)  # requests, before the engine serves
CONTEXT = 150.0
BELIEVED = 2.2  # times what steps take: the roofline's idea of them
VERIFIES = 0.4  # of what a step with drafts takes beyond a plain one; its draft pass takes the rest
NOISE = 0.06


@dataclass
class Found(Evidence):
    times_plain: dict[str, dict[str, float]] = field(default_factory=dict)  # medians, by requests and class


class Steps:
    """Seconds, between those that were measured."""

    def __init__(self) -> None:
        found = json.loads(STEPS.read_text())["steps"]
        same = [one for one in found if one["verified"] == one["drafting"] and one["context"] < 300]
        self.known = {
            drafts: sorted((one["requests"], one["seconds"]) for one in same if one["drafting"] == drafts)
            for drafts in MODES
        }

    def settled(self, drafts: int, requests: int) -> float:
        return float(np.interp(requests, *zip(*self.known[drafts], strict=True)))

    def seconds(self, verified: int, drafting: int, requests: int) -> float:
        plain, first, then = (self.settled(drafts, requests) for drafts in (0, verified, drafting))
        return plain + VERIFIES * (first - plain) + (1 - VERIFIES) * (then - plain)


class Turn(NamedTuple):
    kind: str
    plain: float  # seconds
    auto: float


def turns(texts: dict[str, Text], steps: Steps, at_once: int, rounds: int, tokens: int, seed: int) -> Iterator[Turn]:
    draw = random.Random(seed)
    policy = ModePolicy(MODES, lambda drafts, requests, context: BELIEVED * steps.settled(drafts, requests))
    for requests in TIMED:
        for drafts in MODES:
            policy.clock.believe(Step(requests, CONTEXT, drafts, drafts, steps.settled(drafts, requests)))
    names = iter(range(10**9))
    for _ in range(rounds):
        for kind, text in texts.items():
            answers = [draw.choice(text.answers)[:tokens] for _ in range(at_once)]
            plain = sum(
                steps.settled(0, sum(len(answer) > step for answer in answers)) * (1 + NOISE * draw.random())
                for step in range(max(map(len, answers)))
            )
            live = {next(names): answer for answer in answers}
            yield Turn(kind, plain, answered(policy, steps, live, draw))


def answered(policy: ModePolicy, steps: Steps, live: dict[int, list[int]], draw: random.Random) -> float:
    """Seconds until the last of these requests has ended."""
    place, verified, total = dict.fromkeys(live, 0), 0, 0.0
    while live:
        drafting = policy.choose(list(live), CONTEXT)
        spent = steps.seconds(verified, drafting, len(live)) * (1 + NOISE * draw.random())
        accepted = {name: min(verified, answer[place[name]]) for name, answer in live.items()}
        if verified:
            policy.verified([Outcome(name, verified, count) for name, count in accepted.items()])
        policy.observe(Step(len(live), CONTEXT, verified, drafting, spent))
        total += spent
        for name, count in accepted.items():
            place[name] += count + 1
            if place[name] >= len(live[name]):
                policy.finished(name)
                del live[name]
        verified = drafting if live else 0
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--out", type=Path, default=FOLDER / "mode-turns.json")
    args = parser.parse_args()
    texts, steps = read_traces(json.loads(TRACES.read_text())["text"]), Steps()
    evidence = Found(args.out, environment() | {"rounds": args.rounds, "seeds": args.seeds, "tokens": args.tokens})
    print(f"| requests | {' | '.join(texts)} | all |")
    print("|---" * (2 + len(texts)) + "|")
    for at_once in tqdm((1, 2, 4, 8), desc="requests", leave=False):
        found = [
            turn for seed in range(args.seeds) for turn in turns(texts, steps, at_once, args.rounds, args.tokens, seed)
        ]
        cells = {kind: statistics.median(one.plain / one.auto for one in found if one.kind == kind) for kind in texts}
        cells["all"] = sum(one.plain for one in found) / sum(one.auto for one in found)
        evidence.times_plain[str(at_once)] = cells
        evidence.write()
        tqdm.write(f"| {at_once} | {' | '.join(f'{cell:.2f}' for cell in cells.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
