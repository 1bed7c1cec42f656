"""What the pages tell of evidence, out of the files themselves.

    python -m benchmarks.figures [--check]

Tables stand in the pages between `<!-- figures: NAME -->` and `<!-- end of figures -->` and are written anew there, and
so are the picture of the README and the list of evidence. What is said in sentences is compared, and whoever changed a
file mends the sentence. --check writes nothing, and says what would change.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import renew
from benchmarks.evidence import FOLDER, ROOT
from benchmarks.speedup_picture import draw

MODES = "cpu-modes-bfloat16-epyc-2-cores.json"
MODES_ELSEWHERE = "cpu-modes-bfloat16-xeon-amx-2-cores.json"
SELECTOR = "selector-tiny.json"
COST = "cost-xeon-amx-2-cores.json"
PICTURE = ROOT / "docs" / "pictures" / "speedup.svg"
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(\n<!-- end of figures -->)", re.DOTALL)


class Said(NamedTuple):
    page: str
    words: str  # with its figures, as the page must have it


def evidence(file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / file).read_text())
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def named(kinds: Mapping[str, Any]) -> list[str]:
    return [kind.replace("low-entropy", "low-entropy, pooled") for kind in kinds]


def times_plain(file: str) -> str:
    summary = evidence(file)["summary"]
    kinds = summary["1"]["auto"]
    rows = [
        [n, way, *(f"{found['times_plain']:.2f}" for found in of.values())]
        for n, ways in summary.items()
        for way, of in ways.items()
        if way != "plain"
    ]
    return table(["requests", "", *named(kinds)], rows)


def selector_by_the_clock(file: str) -> str:
    """Times the speed of the same without one."""
    summary = evidence(file)["summary"]
    kinds, rows = summary["1"]["auto"], []
    for n, ways in summary.items():
        without, selected = ([ways[way][kind]["ms_per_token"] for kind in kinds] for way in ("auto", "auto, selector"))
        rows.append([n, *(f"{one / other:.2f}" for one, other in zip(without, selected, strict=True))])
    return table(["requests", *named(kinds)], rows)


def turns() -> str:
    found = evidence("mode-turns.json")["times_plain"]
    rows = [[requests, *(f"{times:.2f}" for times in kinds.values())] for requests, kinds in found.items()]
    return table(["requests", *found["1"]], rows)


def steps(context: int = 128) -> dict[int, dict[int, float]]:
    """Milliseconds by requests and drafts, for contexts that begin with so many tokens."""
    found: dict[int, dict[int, float]] = {}
    for step in evidence(COST)["steps"]:
        if step["context"] < 2 * context:
            found.setdefault(step["requests"], {})[step["verified"]] = 1000 * step["seconds"]
    return {requests: dict(sorted(of.items())) for requests, of in found.items()}


def step_times() -> str:
    found = steps()
    head = ["requests", *("plain" if not drafts else f"{drafts} drafts" for drafts in found[1])]
    rows = [
        [str(requests), *(f"{ms:.1f}{' ms' * (requests == 1)}" if not n else f"{ms:.0f}" for n, ms in of.items())]
        for requests, of in found.items()
    ]
    return table(head, rows)


def acceptance() -> str:
    """Tokens per cycle and per forward, at temperature 0 and 0.8."""
    greedy, sampled = (evidence(f"acceptance-tiny{end}.json")["summary"] for end in ("", "-sampled"))
    head = ["class"]
    for passes in ("two passes", "one pass"):
        head += [f"{passes}: per cycle", "per forward"] if passes == "two passes" else [f"{passes}: per forward"]
    head += [f"{column}, T=0.8" for column in head[1:]]

    def cells(summary: Mapping[str, Any], kind: str) -> list[str]:
        two, one = summary["two"][kind], summary["one"][kind]
        figures = (two["tokens_per_cycle"], two["tokens_per_forward"], one["tokens_per_forward"])
        return [f"{figure:.2f}" for figure in figures]

    return table(head, [[kind, *cells(greedy, kind), *cells(sampled, kind)] for kind in greedy["two"]])


def beside_ngram() -> str:
    """tokens behind the prompt / forwards

    forwards: 2 x cycles in two passes; cycles and a draft pass behind each prompt in one; with n-grams, which draft in
    some steps only, the tokens that are no accepted drafts. Drafts accepted past an answer's end make that a little
    less than it was.
    """
    turns = evidence("beside-ngram-tiny.json")["rounds"]
    columns = {"ngram": "n-gram", "two": "two passes", "one": "one pass"}
    taken = Counter((turn["round"], turn["class"]) for turn in turns)  # by how many ways: the same prompts to all
    rounds = [turn for turn in turns if taken[turn["round"], turn["class"]] == 1 + len(columns)]
    kinds = list(dict.fromkeys(turn["class"] for turn in rounds))

    def per_forward(way: str, some: list[str]) -> str:
        mine = [turn for turn in rounds if turn["way"] == way and turn["class"] in some]
        tokens, accepted, cycles, requests = (
            sum(turn[name] for turn in mine) for name in ("tokens", "accepted", "cycles", "requests")
        )
        forwards = {"ngram": tokens - requests - accepted, "two": 2 * cycles, "one": cycles + requests}[way]
        return f"{(tokens - requests) / forwards:.2f}"

    rows = [[kind, *(per_forward(way, [kind]) for way in columns)] for kind in kinds]
    return table(["class", *columns.values()], [*rows, ["all", *(per_forward(way, kinds) for way in columns)]])


def under_load() -> str:
    one, stock = (evidence(f"soak-tiny-{way}.json") for way in ("one-pass", "stock"))

    def requests(found: Mapping[str, Any]) -> str:
        counts = [found["requests"][name] for name in ("answered", "left", "failed")]
        return f"{sum(counts)}: {counts[0]} answered, {counts[1]} left by their clients, {counts[2]} failed"

    def slope(found: Mapping[str, Any], name: str, digits: int) -> str:
        it = found["slopes_per_minute"][name]
        return f"{it['per_minute']:+.{digits}f} ± {it['noise']:.{digits}f}"

    def memory(found: Mapping[str, Any]) -> str:
        it = found["slopes_per_minute"]["memory_mib"]
        end = ": no more than noise" if it["flat"] else ""
        return f"{it['mean']:,.0f} MiB, {slope(found, 'memory_mib', 2)} MiB a minute{end}"

    kept = one["slopes_per_minute"]
    rows = [
        ["requests", requests(one), requests(stock)],
        [
            "greedy answers that differ from stock vLLM's",
            f"{one['differences']['count']} of {one['requests']['greedy']}",
            "",
        ],
        ["open files before and after", *(f"{it['before']['files']}, {it['after']['files']}" for it in (one, stock))],
        ["memory of all processes, minutes 12 to 30", memory(one), memory(stock)],
        [
            "tokens per cycle",
            f"{kept['tokens_per_cycle']['mean']:.1f}, {slope(one, 'tokens_per_cycle', 3)} a minute",
            "",
        ],
        ["first draft kept", f"{kept['first_kept']['mean']:.1f}, {slope(one, 'first_kept', 3)} a minute", ""],
    ]
    return table(["", "one pass", "stock vLLM"], rows)


def cascades() -> str:
    kinds = ("arithmetic", "json", "log")
    found = {(one["rule"], one["setting"], one["class"]): one for one in evidence("cascades-tiny.json")["found"]}

    def right(one: Mapping[str, Any]) -> str:
        count = round(one["right"] * one["prompts"])
        return f"{one['tokens_per_forward']:.2f}, {count or 'none'}" + f" of {one['prompts']}" * bool(count)

    def most(kind: str) -> str:
        lossless = found["lossless", "", kind]
        able = [one for (_, _, of), one in found.items() if of == kind and one["right"] >= lossless["right"]]
        best = max(able, key=lambda one: one["tokens_per_forward"])
        if best["tokens_per_forward"] <= lossless["tokens_per_forward"]:
            return f"{lossless['tokens_per_forward']:.2f}"
        return f"{best['tokens_per_forward']:.2f}, `{best['rule']}` {best['setting']}"

    rows = [["lossless: tokens per forward, right", *(right(found["lossless", "", kind]) for kind in kinds)]]
    rows.append(
        ["the most tokens per forward of a setting with at least as many right", *(most(kind) for kind in kinds)]
    )
    for rule, setting in (("chow", "0.1"), ("token_v3", "0.9"), ("diff", "0.9")):
        rows.append([f"`{rule}` {setting}", *(right(found[rule, setting, kind]) for kind in kinds)])
    return table(["", "arithmetic", "JSON", "log"], rows)


TARGET = 0.99  # of tokens as the model has them


def at_a_target() -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """By class: lossless, and the quickest setting in hindsight that leaves so many tokens as they are."""
    found: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for one in evidence("cascades-tiny.json")["found"]:
        lossless, best = found.get(one["class"], (one, one))
        quicker = one["tokens_per_forward"] > best["tokens_per_forward"]
        found[one["class"]] = (lossless, one if quicker and one["departed"] <= 1 - TARGET else best)
    return found


def cascades_at_a_target() -> str:
    rows = []
    for kind, (lossless, best) in at_a_target().items():
        setting = "lossless" if best is lossless else f"`{best['rule']}` {best['setting']}"
        gain = f"{best['tokens_per_forward'] / lossless['tokens_per_forward'] - 1:+.1%}".replace("%", " %")
        right = "not checked"
        if best["right"] is not None:
            before, after = (round(one["right"] * one["prompts"]) for one in (lossless, best))
            right = f"{before} -> {after} of {best['prompts']}"
        rows.append([kind, setting, gain, right])
    return table(["class", "the best setting in hindsight", "tokens per forward", "right answers"], rows)


def selector() -> str:
    """Tokens per cycle of two passes."""
    found = evidence(SELECTOR)["two_passes"]
    head = ["class", *(f"T = {degrees}: {what}" for degrees in ("0", "0.8") for what in ("head alone", "selector"))]
    head.insert(3, "gain, and 95 % by resampling the prompts")
    rows = []
    for kind, cold in found["0.0"].items():
        warm = found["0.8"][kind]
        within = f"{cold['gain']:+.0%} ({cold['gain_least']:+.0%} to {cold['gain_most']:+.0%})".replace("%", " %")
        figures = [f"{one[name]:.2f}" for one in (cold, warm) for name in ("alone", "selector")]
        rows.append([kind, *figures[:2], within, *figures[2:]])
    return table(head, rows)


def selector_in_one_pass() -> str:
    """Beside the tokens per forward of two passes, which are half of those of a cycle."""
    found = evidence(SELECTOR)
    two, one = found["two_passes"]["0.0"], found["one_pass"]
    rows = []
    for kind in ("low-entropy", "code", "prose", "all"):
        alone, selected = one["alone"][kind], one["selector"][kind]
        gain = 2 * selected["tokens_per_forward"] / two[kind]["selector"]
        misses = [
            f"{100 * each['hit']:.0f} / {100 * each['count_missed']:.0f} / {100 * each['bonus_missed']:.0f}"
            for each in (alone, selected)
        ]
        rates = [f"{each['tokens_per_forward']:.2f}" for each in (alone, selected)]
        rows.append([kind, *rates, f"{gain:.2f}x", *misses])
    head = ["class", "one pass, head alone", "with the selector", "of two passes with it"]
    return table([*head, "hits / number missed / bonus missed, %, alone", "with it"], rows)


def warm_starts() -> str:
    found = evidence("warm-starts.json")["points"]
    rate = {(point["case"], point["passes"]): point["tokens_per_cycle"] for point in found}
    rows = []
    for point in (point for point in found if point["passes"] == "two"):
        case = point["case"]
        not_read = f"{100 * point['not_read']:.0f} % of the prompts" if point["not_read"] else "nothing"
        figures = [
            f"{rate[case, passes]:.3f} ({rate[case, passes] / rate['cold', passes] - 1:+.1%})".replace("%", " %")
            for passes in ("two", "one")
        ]
        rows.append([case, not_read, str(point["preemptions"]), *figures])
    return table(["", "not read here", "preemptions", "two passes: tokens per cycle", "one pass"], rows)


def launches_beside() -> str:
    """What a step of Qwen3-8B launches, and by which formula."""
    found = evidence("launches-beside.json")
    steps = {one["way"]: one for one in found["qwen3_8b"]}
    plain = steps["plain"]["forward"]
    rows = []
    for way, step in steps.items():
        launched = step["forward"] + step["drafting"]
        alone = launched - step["in_graphs"]
        name = way if way not in found["theirs"] else f"{way}, {counted(step['layers'], 'layer')}"
        name += f", {step['drafts']} drafts" if "drafts" in step else ""
        rows.append([name, str(step["forward"]), str(step["drafting"]), f"{launched - plain:+}", str(alone)])
    head = ["Qwen3-8B", "the target's forward", "drafting", "beside a plain step", "drafting outside graphs"]
    return table(head, rows)


def launches_by_layer() -> str:
    """By layers of the target (L) and of the drafter (l), and drafts (k)."""
    found = evidence("launches-beside.json")
    plain, ours = found["plain"], found["ours"]
    rows = [["plain", f"{plain['layer']} L + {plain['besides']}", "", ""]]
    for way, one in ours.items():
        if way == "two passes":
            layer, rest = one["a layer of a draft pass"], one["that pass, besides its layers"]
            rows.append([way, rows[0][1], f"{layer} L + {rest + one['around a draft pass']}", str(layer)])
            continue
        forward = one["a layer of a verification with hypotheses"], one["that forward, besides its layers"]
        behind = sum(number for name, number in one.items() if name.startswith(("before", "beside", "behind")))
        rows.append([way, f"{forward[0]} L + {forward[1]}", str(behind), ""])
    for name, one in found["theirs"].items():
        target, by = one["points"][0]["target"], one["launches"]
        passes = f"{by['layer']} l + {by['fixed']}"
        passes += f" + (k - 1) ({by['draft_layer']} l + {by['draft']})" * bool(by["draft"])
        layers = sorted({number for point in one["points"] for number in point["layers_of_a_pass"]})
        rows.append([name, f"{target['layer']} L + {target['besides']}", passes, " or ".join(map(str, layers))])
    return table(["", "the target's forward", "drafting", "a layer that drafts"], rows)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def head_memory() -> str:
    found = evidence("head-memory.json")["engines"]
    plain, rows = found["plain"]["weights"], []
    for way, one in found.items():
        more = f"{one['weights'] / plain - 1:+.0%}".replace("%", " %")
        rows.append([way, f"{one['weights']:,}", more, str(one["layers_with_a_cache"])])
    return table(["random model of two layers", "bytes of weights", "beside plain", "layers with a cache"], rows)


def head_memory_by_shapes() -> str:
    rows = []
    for name, one in evidence("head-memory.json")["qwen3"].items():
        figures = [f"{one[what] / 1e9:.2f} GB" for what in ("base", "head", "again")]
        rows.append([name, *figures, f"{one['cache_per_token'] * 16384 / 1e9:.2f} GB"])
    return table(["in bf16", "base", "its head", "a draft model of both", "and its cache of 16K tokens"], rows)


BLOCKS: Mapping[str, Callable[[], str]] = {
    "launches-beside": launches_beside,
    "launches-by-layer": launches_by_layer,
    "head-memory": head_memory,
    "head-memory-by-shapes": head_memory_by_shapes,
    "selector": selector,
    "selector-in-one-pass": selector_in_one_pass,
    "warm-starts": warm_starts,
    "times-plain": partial(times_plain, MODES),
    "times-plain-elsewhere": partial(times_plain, MODES_ELSEWHERE),
    "selector-by-the-clock": partial(selector_by_the_clock, MODES),
    "selector-by-the-clock-elsewhere": partial(selector_by_the_clock, MODES_ELSEWHERE),
    "turns": turns,
    "beside-ngram": beside_ngram,
    "step-times": step_times,
    "acceptance": acceptance,
    "under-load": under_load,
    "cascades": cascades,
    "cascades-at-a-target": cascades_at_a_target,
}


def said() -> list[Said]:
    modes = evidence(MODES)["summary"]
    everything = [ways["auto"]["all"]["times_plain"] for ways in modes.values()]
    low = modes["1"]["auto"]["low-entropy"]["times_plain"]
    one, *_, eight = evidence(MODES_ELSEWHERE)["summary"].values()
    tiles = [
        f"{one[way]['low-entropy']['times_plain']:.1f}{times}, {one[way]['all']['times_plain']:.2f} and "
        f"{eight[way]['all']['times_plain']:.2f}"
        for way, times in (("auto", " times"), ("auto, selector", ""))
    ]
    of = steps()
    cost = evidence(COST)["errors"]["foretold, and not timed before"]
    lossless = evidence("lossless-tiny-bfloat16.json")
    equal, asked = (min(one[name] for one in lossless["comparisons"]) for name in ("equal", "answers"))
    json_text = [one for one in evidence("cascades-tiny.json")["found"] if one["class"] == "json"]
    exact = next(one for one in json_text if one["rule"] == "lossless")
    able = [one for one in json_text if one["right"] >= exact["right"]]
    best = max(able, key=lambda one: float(one["tokens_per_forward"]))
    beside = {way: one["times_plain"] for way, one in evidence("beside-ngram-tiny.json")["summary"]["1"]["all"].items()}
    simulated = evidence("mode-simulation.json")["summary"]
    policy, fixed = simulated["times_plain"], simulated["of_best_fixed"]
    points = evidence("shared-prefixes.json")["points"]
    launched = {one["way"]: one["drafting"] for one in evidence("launches-beside.json")["qwen3_8b"]}

    def apart(passes: str) -> float:
        rates = [point["tokens_per_cycle"] for point in points if point["passes"] == passes]
        return max(abs(rate["caching"] / rate["no caching"] - 1) for rate in rates)

    two_passes = "are the same with prefix caching and without" if not apart("two") else "DIFFER"
    return [
        Said("README.md", f"answers predictable questions {low:.1f} times as fast as stock vLLM"),
        Said("README.md", f"{everything[0]:.2f} times at one request and {everything[-1]:.2f} at eight"),
        Said("README.md", f"it is {tiles[0]}, and {tiles[1]} with a [selector]"),
        Said("docs/benchmarks.md", f"takes {of[1][3] / of[1][0]:.1f} times a plain one with one request"),
        Said("docs/benchmarks.md", f"and {of[8][3] / of[8][0]:.1f} times with eight"),
        Said(
            "docs/benchmarks.md",
            f"Of the {cost['steps']} sizes that were not timed at the start the time foretold is off by "
            f"{cost['median']:.0%} in the median, at worst {cost['worst']:.0%}".replace("%", " %"),
        ),
        Said("docs/benchmarks.md", f"{equal} of {asked}"),
        Said(
            "docs/benchmarks.md",
            f"at {lossless['tied']['with_a_second_token_within_the_bound']} of {lossless['tied']['places']} places a "
            f"second token is within {lossless['bound']} of the best logit",
        ),
        Said(
            "docs/cascades.md",
            f"the best is {100 * (1 - best['forwards'] / exact['forwards']):.0f} % on JSON, "
            f"{best['forwards']} forwards for {exact['forwards']}",
        ),
        Said("docs/prefixes.md", f"in two passes tokens per cycle {two_passes}"),
        Said("docs/prefixes.md", f"in one pass within {math.ceil(1000 * apart('one')) / 10} %"),
        Said(
            "docs/one-pass.md",
            f"One pass drafts 15 tokens with {launched['one pass']} launches, DFlash with {launched['DFlash']}, and "
            f"EAGLE-3 its 5 with {launched['EAGLE-3']}; two passes take {launched['two passes']}",
        ),
        Said(
            "docs/comparison.md",
            f"{beside['two']:.2f} times plain, one {beside['one']:.2f} and n-gram {beside['ngram']:.2f}",
        ),
        Said("docs/modes.md", f"from {policy['least']:.2f} to {policy['most']:.2f} times plain decoding"),
        Said(
            "docs/modes.md",
            f"gives {fixed['median']:.0%} in the median and {fixed['least']:.0%} at worst".replace("%", " %"),
        ),
        Said("docs/modes.md", f"{simulated['below_0.95_of_best_fixed']} of {simulated['cells']} cells stay below 95 %"),
    ]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}{found[4]}", text)


def wanted() -> dict[Path, str]:
    """Every file that is made of evidence, as it should be."""
    summary = evidence(MODES)
    found = {path: filled(path.read_text()) for path in pages() if BLOCK.search(path.read_text())}
    return found | {renew.PAGE: renew.page(), PICTURE: draw(summary["summary"], summary["environment"])}


def unsaid() -> list[str]:
    """Sentences that a page does not have."""
    texts = {page: " ".join((ROOT / page).read_text().split()) for page in {one.page for one in said()}}
    return [f"{one.page} does not say: {one.words}" for one in said() if one.words not in texts[one.page]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [path for path, text in wanted().items() if not path.exists() or path.read_text() != text]
    if not check:
        for path, text in wanted().items():
            path.write_text(text)
    problems = [f"{path.relative_to(ROOT)} is not as the evidence has it" for path in stale if check] + unsaid()
    print(*problems, sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
