"""Draw what the dashboard shows of a server: every panel, by its own queries, asked of a Prometheus.

    python -m scripts.dashboard_picture http://localhost:9090 --minutes 10 [--out docs/pictures/dashboard.svg]

Grafana draws the same queries; this needs none, and shows what a page of the documentation can hold.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scripts.dashboard import ROWS, Panel, Row

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "dashboard.svg"
STEP = 5  # seconds
FILLED = {"$__rate_interval": "30s", "$model": ".*"}


class Line(NamedTuple):
    name: str
    seconds: list[float]
    values: list[float]


def filled(query: str) -> str:
    """As Grafana fills its variables in."""
    for variable, value in FILLED.items():
        query = query.replace(variable, value)
    return query


def ask(prometheus: str, path: str, **parameters: object) -> Any:
    url = f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)["data"]


def lines_of(panel: Panel, prometheus: str, start: float, end: float) -> list[Line]:
    found = []
    for curve in panel.curves:
        asked = ask(prometheus, "query_range", query=filled(curve.query), start=start, end=end, step=STEP)
        for series in asked["result"]:
            points = [(float(at) - start, float(value)) for at, value in series["values"]]
            kept = [(at, value) for at, value in points if math.isfinite(value)]
            if kept:
                found.append(Line(_legend(curve.legend, series["metric"]), *map(list, zip(*kept, strict=True))))
    return sorted(found, key=_place) if len(panel.curves) == 1 else found


def _legend(form: str, labels: Mapping[str, str]) -> str:
    for label, value in labels.items():
        form = form.replace(f"{{{{{label}}}}}", value)
    return form


def _place(line: Line) -> float:
    return float(line.name) if line.name.isdigit() else math.inf


def draw(rows: Iterable[Row], lines: Mapping[str, list[Line]], title: str, out: Path) -> None:
    """lines: by the titles of panels."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as pyplot

    matplotlib.rcParams["svg.hashsalt"] = "orthrus"  # the same picture from the same figures
    rows = list(rows)
    most = max(len(row.panels) for row in rows)
    figure, axes = pyplot.subplots(
        len(rows), most, figsize=(3.4 * most, 2.3 * len(rows)), squeeze=False, layout="constrained"
    )
    for row, mine in zip(rows, axes, strict=True):
        for axis in mine[len(row.panels) :]:
            axis.set_visible(False)
        for panel, axis in zip(row.panels, mine, strict=False):
            _draw_panel(axis, panel, lines[panel.title])
        mine[0].set_ylabel(row.title, fontsize=9, fontweight="bold")
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("minutes", fontsize=8)
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def _draw_panel(axis: Any, panel: Panel, lines: list[Line]) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_title(panel.title, fontsize=9)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    if panel.stacked and lines:
        times = sorted({at for line in lines for at in line.seconds})
        by_time = [dict(zip(line.seconds, line.values, strict=True)) for line in lines]
        heights = [[values.get(at, 0.0) for at in times] for values in by_time]
        axis.stackplot([at / 60 for at in times], heights, labels=[line.name for line in lines], alpha=0.6)
    else:
        for line in lines:
            axis.plot([at / 60 for at in line.seconds], line.values, label=line.name, lw=1.1)
    if not lines:
        axis.text(0.5, 0.5, "no data", ha="center", va="center", transform=axis.transAxes, fontsize=8)
    if panel.unit == "percentunit":
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif panel.unit == "s":
        axis.yaxis.set_major_formatter("{x:g} s")
    if panel.least is not None:
        axis.set_ylim(bottom=panel.least)
    if lines:
        axis.legend(fontsize=6, ncols=3 if len(lines) > 4 else 1, loc="best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--until", type=float, help="seconds since 1970; left out: now")
    parser.add_argument("--title", default="vLLM with Orthrus, by the dashboard's queries")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    end = asked.until or time.time()
    found = {
        panel.title: lines_of(panel, asked.prometheus, end - 60 * asked.minutes, end)
        for row in ROWS
        for panel in row.panels
    }
    draw(ROWS, found, asked.title, asked.out)
    print(asked.out)


if __name__ == "__main__":
    main()
