"""Pictures of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_orthrus.bench.summary import ALL
from vllm_orthrus.bench.ways import PLAIN
from vllm_orthrus.errors import UserError

# Told apart in grey and by people who see fewer colours; plain decoding is the grey line that all are told by.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#777777"


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("`vllm-orthrus bench` draws with matplotlib: pip install 'vllm-orthrus[bench]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_throughput(summary: Mapping[str, Any], title: str, picture: Path) -> None:
    """Times plain over the number of requests, a panel for each class; with one number, bars by class."""
    kinds = list(next(iter(summary.values())))
    ways = [way for way in next(iter(summary.values()))[kinds[0]] if way != PLAIN]
    colours = dict(zip(ways, COLOURS * len(ways), strict=False))
    plot = pyplot()
    if len(summary) == 1:
        figure, axes = plot.subplots(figsize=(max(6.0, 1.1 * len(kinds) + 3), 4.2), layout="constrained")
        _bars(axes, next(iter(summary.values())), kinds, colours)
        axes.set_xlabel(f"class of prompts, {next(iter(summary))} at once")
    else:
        columns = min(4, len(kinds))
        lines = -(-len(kinds) // columns)
        size = (max(6.0, 3.1 * columns + 1), 2.9 * lines + 0.9)
        figure, grid = plot.subplots(
            lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        for place, axes in enumerate(grid.flat):
            if place < len(kinds):
                _lines(axes, summary, kinds[place], colours)
            else:
                axes.set_axis_off()
        grid.flat[0].set_ylim(bottom=0)  # of all, once all lines are there
        figure.supxlabel("requests at once")
    figure.supylabel("tokens per second, times plain")
    figure.suptitle(f"{title}\nwhiskers: slowest and fastest round; hollow: no difference seen", fontsize=10)
    handles = [plot.Line2D([], [], color=colour, linewidth=3) for colour in (GREY, *colours.values())]
    figure.legend(handles, [PLAIN, *colours], loc="outside right center", frameon=False)
    _save(plot, figure, picture)


def draw_cost(steps: Sequence[Mapping[str, Any]], title: str, picture: Path) -> None:
    """Milliseconds over requests, a panel for each context and a colour for each number of drafts."""
    plot = pyplot()
    contexts: dict[int, list[Mapping[str, Any]]] = {}
    for step in steps:
        near = min(contexts, key=lambda known: abs(known - step["context"]), default=None)
        same = near is not None and abs(near - step["context"]) <= 0.5 * near
        contexts.setdefault(near if near is not None and same else round(step["context"]), []).append(step)
    figure, grid = plot.subplots(1, len(contexts), figsize=(4.2 * len(contexts) + 1, 3.6), squeeze=False, sharey=True)
    drafts = sorted({step["drafting"] for step in steps})
    colours = dict(zip(drafts, (GREY, *COLOURS * len(drafts)), strict=False))
    for axes, (context, mine) in zip(grid.flat, sorted(contexts.items()), strict=True):
        for number in drafts:
            line = sorted((step for step in mine if step["drafting"] == number), key=lambda step: step["requests"])
            axes.plot(
                [step["requests"] for step in line],
                [1e3 * step["foretold"] for step in line],
                color=colours[number],
                linewidth=1,
                linestyle="--",
            )
            for step in line:
                face = colours[number] if step["timed_before"] else "white"
                axes.plot(step["requests"], 1e3 * step["seconds"], "o", color=colours[number], markerfacecolor=face)
        axes.set_title(f"about {context} tokens cached", fontsize=9)
        axes.set_xlabel("requests at once")
        axes.set_ylim(bottom=0)
    grid.flat[0].set_ylabel("milliseconds a step")
    figure.suptitle(f"{title}\ndots: timed, hollow ones not before it served; lines: foretold", fontsize=10)
    handles = [plot.Line2D([], [], color=colours[number], linewidth=3) for number in drafts]
    names = ["plain" if number == 0 else f"{number} drafts" for number in drafts]
    figure.legend(handles, names, loc="outside right center", frameon=False)
    figure.set_layout_engine("constrained")
    _save(plot, figure, picture)


def draw_lossless(found: Sequence[Mapping[str, Any]], bound: float, title: str, picture: Path) -> None:
    """The gap at every place where texts part, a column for each comparison; below it, how often they do."""
    plot = pyplot()
    figure, axes = plot.subplots(figsize=(max(6.0, 1.1 * len(found) + 2), 4.4), layout="constrained")
    for place, one in enumerate(found):
        colour = GREY if one["way"] == PLAIN else COLOURS[0]
        gaps = [min(2 * bound, parted["gap"] if parted["gap"] is not None else bound * 2) for parted in one["partings"]]
        across = [place + 0.5 * (index + 0.5) / len(gaps) - 0.25 for index in range(len(gaps))]
        axes.plot(across, gaps, "o", markersize=4, color=colour, alpha=0.6)
    axes.axhline(bound, color="black", linewidth=1, linestyle="--")
    axes.annotate("as far as rounding reaches", (-0.45, bound), xytext=(0, 3), textcoords="offset points", fontsize=8)
    names = [f"{one['way']}, {one['at_once']} at once\n{one['equal']} of {one['answers']} equal" for one in found]
    axes.set_xticks(range(len(found)), names, fontsize=8)
    axes.set_xlim(-0.5, len(found) - 0.5)
    axes.set_ylim(-0.04 * bound, 2.1 * bound)
    axes.set_ylabel("best logit - logit of the other text's token")
    axes.grid(axis="y", alpha=0.3)
    figure.suptitle(f"{title}\nwhere greedy texts part from plain decoding's, one request at a time", fontsize=10)
    _save(plot, figure, picture)


def _lines(axes: Any, summary: Mapping[str, Any], kind: str, colours: Mapping[str, str]) -> None:
    numbers = list(summary)
    axes.axhline(1, color=GREY, linewidth=1.5)
    for order, (way, colour) in enumerate(colours.items()):
        # A little apart, so that what ways have in common hides none of them.
        places = [place + 0.06 * (order - (len(colours) - 1) / 2) for place in range(len(numbers))]
        found = [summary[number][kind][way] for number in numbers]
        axes.plot(places, [one["times_plain"] for one in found], color=colour, linewidth=1.5)
        for place, one in zip(places, found, strict=True):
            _point(axes, place, one, colour)
    axes.set_xticks(range(len(numbers)), numbers)
    axes.set_title(kind, fontsize=10)
    axes.tick_params(labelbottom=True)  # also above a place that stays empty
    axes.grid(axis="y", alpha=0.3)


def _point(axes: Any, place: float, found: Mapping[str, Any], colour: str) -> None:
    called = found["verdict"] != "no difference seen"
    away = [[found["times_plain"] - found["least"]], [found["most"] - found["times_plain"]]]
    fill = colour if called else "white"
    axes.errorbar(place, found["times_plain"], away, marker="o", markersize=5, color=colour, mfc=fill, capsize=2)


def _bars(axes: Any, found: Mapping[str, Any], kinds: Sequence[str], colours: Mapping[str, str]) -> None:
    width = 0.8 / max(1, len(colours))
    for order, (way, colour) in enumerate(colours.items()):
        for place, kind in enumerate(kinds):
            one = found[kind][way]
            at = place + width * (order - (len(colours) - 1) / 2)
            called = one["verdict"] != "no difference seen"
            away = [[one["times_plain"] - one["least"]], [one["most"] - one["times_plain"]]]
            fill = colour if called else "white"
            axes.bar(at, one["times_plain"], 0.9 * width, color=fill, edgecolor=colour)
            axes.errorbar(at, one["times_plain"], away, color="black", linewidth=1, capsize=2)
            _number(axes, at, one["most"], f"{one['times_plain']:.2f}")
    axes.axhline(1, color=GREY, linewidth=1.5)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)


def _number(axes: Any, place: float, height: float, text: str) -> None:
    above = {"xytext": (0, 3), "textcoords": "offset points"}
    axes.annotate(text, (place, height), **above, ha="center", fontsize=7)


def draw_acceptance(summary: Mapping[str, Any], title: str, picture: Path) -> None:
    """Above, how often each place of the block is kept; below, what that makes of cycles and forwards."""
    ways, kinds = list(summary), list(next(iter(summary.values())))
    plot = pyplot()
    colours = dict(zip(kinds, COLOURS * len(kinds), strict=False)) | {kind: "black" for kind in kinds if kind == ALL}
    figure, grid = plot.subplots(
        2, len(ways), figsize=(3.6 * len(ways) + 2.2, 6.4), sharey="row", squeeze=False, layout="constrained"
    )
    for column, way in enumerate(ways):
        places, bars = grid[0][column], grid[1][column]
        for kind, colour in colours.items():
            kept = summary[way][kind]["accepted_at"]
            places.plot(range(1, len(kept) + 1), kept, color=colour, marker="o", markersize=3, label=kind)
        places.set(title=way, ylim=(0, 1.02), xlabel="place in the block")
        places.grid(alpha=0.3)
        for order, (name, shade) in enumerate((("tokens_per_cycle", 0.35), ("tokens_per_forward", 1.0))):
            at = [place + 0.4 * (order - 0.5) for place in range(len(kinds))]
            values = [summary[way][kind][name] for kind in kinds]
            bars.bar(at, values, 0.38, color=[colours[kind] for kind in kinds], alpha=shade)
            for place, value in zip(at, values, strict=True):
                _number(bars, place, value, f"{value:.1f}")
        bars.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8)
        bars.axhline(1, color=GREY, linewidth=1.5)
        bars.grid(axis="y", alpha=0.3)
        bars.set_axisbelow(True)
        bars.margins(y=0.1)
    grid[0][0].set_ylabel("share of cycles that keep it")
    grid[1][0].set_ylabel("tokens per cycle (pale)\nand per forward")
    figure.suptitle(title, fontsize=10)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    _save(plot, figure, picture)


def draw_cascades(rows: Sequence[Mapping[str, Any]], title: str, picture: Path) -> None:
    """A panel for each class: right answers, or as without where that cannot be told, over tokens per forward."""
    kinds = list(dict.fromkeys(row["class"] for row in rows))
    rules = list(dict.fromkeys(row["rule"] for row in rows))[1:]  # the first is none
    plot, colours = pyplot(), (*COLOURS, "#000000")
    figure, axes = plot.subplots(
        1, len(kinds), figsize=(3.1 * len(kinds) + 1.6, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, kind in zip(axes[0], kinds, strict=True):
        own = [row for row in rows if row["class"] == kind]
        value = "same" if own[0]["right"] is None else "right"
        for rule, colour in zip(rules, colours, strict=False):
            points = [(row["tokens_per_forward"], row[value]) for row in own if row["rule"] == rule]
            panel.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1, label=rule)
        panel.plot(own[0]["tokens_per_forward"], own[0][value], marker="*", markersize=13, color=GREY, linestyle="")
        panel.axhline(own[0][value], color=GREY, linewidth=1)
        panel.set(title=kind, xlabel="tokens per forward", ylim=(-0.03, 1.03))
        panel.set_ylabel("right answers" if value == "right" else "answers as without")
        panel.grid(alpha=0.3)
    figure.suptitle(f"{title}\nthe star is lossless decoding", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    _save(plot, figure, picture)


def _save(plot: Any, figure: Any, picture: Path) -> None:
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    plot.close(figure)
