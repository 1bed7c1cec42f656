"""Tokens per cycle where prompts share a prefix, with prefix caching and without.

    python -m benchmarks.shared_prefixes [--questions N] [--out FILE]

Prompts of 320 tokens, of which a part is the same for all and, with caching, is read once and for all. A drafter that
keeps a cache of its own starts cold behind such a prefix; the diffusion view reads the target's. Greedy, float32, the
tiny trained model, in two passes and in one, where it matters a little who reads a prompt beside whom. Exit status 1:
caching changed a text, or tokens per cycle by over 2 %.
One process, some minutes.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.evidence import FOLDER, Evidence, environment
from tests.engine.harness import Engine, Run
from tests.engine.trained import OPTIONS, TINY, chat, questions, tokens_per_cycle, trained_head

LENGTH, PAGE = 320, 32
SHARED = (0, 96, 160, 224, 288)  # tokens; the last is 90 %
ANSWER = 64
WITHIN = 0.02


@dataclass
class Found(Evidence):
    points: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def prompts(engine: Engine, shared: int, count: int) -> list[list[int]]:
    """So many, each with as much text of its own as the common prefix leaves."""
    texts = [chat(engine, question) for question in questions(40)]
    flowing = [token for text in texts for token in text]
    common = flowing[:shared]
    own = LENGTH - shared
    every = len(texts) // count
    made = []
    for index in range(count):
        start = sum(map(len, texts[: index * every]))
        # It ends with a whole question; what stands before that is text of other ones.
        end = start + len(texts[index * every])
        around = (flowing[end:] + flowing)[: max(0, own)]
        made.append(common + (around + flowing[start:end])[-own:])
    return made


def ask(passes: str, shared: int, caching: bool, count: int) -> Run:
    engine = Engine(
        TINY / "base", trained_head(passes), **OPTIONS | {"enable_prefix_caching": caching, "max_num_seqs": 8}
    )
    given = prompts(engine, shared, count)
    engine.run(given[:1], 1)  # whoever comes first reads the prefix
    run = engine.run(given, ANSWER)
    engine.close()
    return run


def measure(passes: str, shared: int, count: int) -> dict[str, Any]:
    cached, without = ask(passes, shared, True, count), ask(passes, shared, False, count)
    return {
        "passes": passes,
        "shared": shared / LENGTH,
        "prompts": count,
        "read_from_cache": cached.cached_tokens / (count * LENGTH),
        "same_text": cached.tokens == without.tokens,
        "tokens_per_cycle": {"caching": tokens_per_cycle(cached), "no caching": tokens_per_cycle(without)},
    }


def plot(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as pyplot

    matplotlib.rcParams["svg.hashsalt"] = "orthrus"  # the same picture from the same figures
    figure, axis = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    looks = {"caching": ("o", "-"), "no caching": ("x", "--")}
    for passes, colour in (("two", "tab:blue"), ("one", "tab:orange")):
        mine = [point for point in points if point["passes"] == passes]
        for name, (marker, line) in looks.items():
            axis.plot(
                [100 * point["shared"] for point in mine],
                [point["tokens_per_cycle"][name] for point in mine],
                marker=marker,
                ls=line,
                ms=7,
                color=colour,
                label=f"{passes} pass{'es' * (passes == 'two')}, {name}",
            )
    axis.set_xlabel("% of each prompt that is shared")
    axis.set_ylabel("tokens per cycle")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--out", type=Path, default=FOLDER / "shared-prefixes.json")
    args = parser.parse_args()
    evidence = Found(args.out, environment() | {"asked": f"--questions {args.questions}"})
    for passes, shared in tqdm([(passes, shared) for passes in ("two", "one") for shared in SHARED]):
        evidence.points.append(measure(passes, shared, args.questions))
        evidence.write()
    apart = [
        abs(point["tokens_per_cycle"]["caching"] / point["tokens_per_cycle"]["no caching"] - 1)
        for point in evidence.points
    ]
    same = all(point["same_text"] for point in evidence.points)
    evidence.summary = {"furthest_apart": max(apart), "same_text_everywhere": same}
    evidence.write()
    plot(evidence.points, FOLDER.parents[1] / "docs" / "pictures" / "shared-prefixes.svg")
    print(json.dumps(evidence.summary, indent=1))
    return int(max(apart) > WITHIN or not same)


if __name__ == "__main__":
    sys.exit(main())
