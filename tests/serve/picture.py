"""One picture of a soak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.serve.watch import RUNNING_IN, Sample
from vllm_orthrus.bench.plots import COLOURS, GREY, pyplot

Panel = tuple[str, list[float]]


def draw(report: Mapping[str, Any], samples: Sequence[Sample], picture: Path) -> None:
    """Memory, load, blocks and what drafts bring, over the minutes; with the lines that slopes were told from."""
    plot = pyplot()
    figure, grid = plot.subplots(4, 1, figsize=(8, 8.4), sharex=True, layout="constrained")
    minutes = [one.seconds / 60 for one in samples]
    memory, load, cache, drafts = grid
    memory.plot(minutes, [one.memory / 2**20 for one in samples], color=COLOURS[0], linewidth=1)
    slope = report["slopes_per_minute"]["memory_mib"]
    _line(memory, minutes, slope)
    memory.set_ylabel("resident, MiB")
    memory.set_title(f"{slope['per_minute']:+.3f} ± {slope['noise']:.3f} MiB a minute, all processes", fontsize=9)
    for name, colour in (("running", COLOURS[0]), ("waiting", COLOURS[1])):
        load.plot(
            minutes, [one.counted[f"num_requests_{name}"] for one in samples], color=colour, linewidth=1, label=name
        )
    load.plot(minutes, [one.files for one in samples], color=GREY, linewidth=1, label="open files")
    load.set_ylabel("requests, files")
    load.legend(frameon=False, fontsize=8, ncols=3)
    cache.plot(minutes, [100 * one.counted["kv_cache_usage_perc"] for one in samples], color=COLOURS[2], linewidth=1)
    cache.set_ylabel("cache in use, %")
    windows = report["windows"]
    middles = [one["seconds"] / 60 for one in windows]
    if windows:
        drafts.plot(middles, [one["tokens_per_cycle"] for one in windows], "o-", color=COLOURS[0], markersize=3)
        _line(drafts, minutes, report["slopes_per_minute"]["tokens_per_cycle"])
    drafts.set_ylabel("tokens per cycle")
    for axes in grid:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if samples:
        low = min(one.memory for one in samples) / 2**20
        memory.set_ylim(bottom=0.95 * low)
    grid[-1].set_xlabel("minutes")
    counts = report["requests"]
    parted = report.get("differences", {}).get("count", "not compared:")
    figure.suptitle(
        f"{counts['answered']} requests answered, {counts['left']} left by their clients, {counts['failed']} failed; "
        f"{parted} greedy answers differ from stock vLLM's",
        fontsize=10,
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    plot.close(figure)


def _line(axes: Any, minutes: Sequence[float], slope: Mapping[str, Any]) -> None:
    """Through the mean, over the time that it was told from."""
    begin, end = RUNNING_IN * minutes[-1], minutes[-1]
    half = slope["per_minute"] * (end - begin) / 2
    axes.plot([begin, end], [slope["mean"] - half, slope["mean"] + half], color="black", linewidth=1, linestyle="--")
