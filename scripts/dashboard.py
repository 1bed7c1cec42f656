"""Write dashboards/grafana.json: what a server with Orthrus does, from vLLM's `/metrics` in a Prometheus.

    python scripts/dashboard.py

Here stands what is shown and why; the JSON around it is Grafana's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARD = Path(__file__).resolve().parents[1] / "dashboards" / "grafana.json"
WHICH = 'model_name=~"$model"'
SOURCE = {"type": "prometheus", "uid": "${source}"}


class Curve(NamedTuple):
    query: str
    legend: str


class Panel(NamedTuple):
    title: str
    says: str  # behind the (i)
    curves: list[Curve]
    unit: str = "short"
    stacked: bool = False
    least: float | None = 0


class Row(NamedTuple):
    title: str
    panels: list[Panel]


def rate(name: str, by: str = "") -> str:
    """Of a counter of vLLM's or ours, over all engines that serve the model."""
    return f"sum{f' by ({by})' if by else ''} (rate(vllm:{name}_total{{{WHICH}}}[$__rate_interval]))"


def gauge(name: str, how: str = "sum") -> str:
    return f"{how} (vllm:{name}{{{WHICH}}})"


def quantile(share: float, name: str) -> str:
    buckets = f"sum by (le) (rate(vllm:{name}_seconds_bucket{{{WHICH}}}[$__rate_interval]))"
    return f"histogram_quantile({share}, {buckets})"


def quantiles(name: str) -> list[Curve]:
    return [Curve(quantile(share, name), f"{100 * share:.0f} %") for share in (0.5, 0.95)]


CYCLES, KEPT, SAID = rate("spec_decode_num_drafts"), rate("spec_decode_num_accepted_tokens"), rate("generation_tokens")
KEPT_BY_PLACE = rate("spec_decode_num_accepted_tokens_per_pos", by="position")
CARRIED, MISSES = rate("orthrus_verifications"), rate("orthrus_misses", by="cause")

ROWS = [
    Row(
        "Does drafting pay?",
        [
            Panel(
                "Estimated speed-up",
                "What plain steps would have taken for the same tokens, as the policy believes, over what was taken, "
                "of steps that read no prompt. Plain ones count as 1. Only where modes are chosen, as is the default.",
                [Curve(f"{rate('orthrus_plain_seconds')} / {rate('orthrus_decoding_seconds')}", "times plain")],
            ),
            Panel(
                "Tokens per cycle",
                "1 + drafts kept, of each verification that had drafts. Plain decoding gives 1. Falls if text is less "
                "easily foreseen, or if the head does not belong to the model.",
                [Curve(f"1 + {KEPT} / {CYCLES}", "tokens per cycle")],
                least=1,
            ),
            Panel(
                "Where tokens come from",
                "Drafts that were kept; the token that each verification adds; and all others: plain steps, and the "
                "first of each answer. Much plain decoding means that drafts do not pay with this text and load.",
                [
                    Curve(KEPT, "drafts kept"),
                    Curve(CYCLES, "verifications"),
                    Curve(f"{SAID} - {KEPT} - {CYCLES}", "plain"),
                ],
                unit="short",
                stacked=True,
            ),
            Panel(
                "Drafts per cycle",
                "How many a verification gets: the mode that the policy takes.",
                [Curve(f"{rate('spec_decode_num_draft_tokens')} / {CYCLES}", "drafts per cycle")],
            ),
            Panel(
                "Kept, by place in the block",
                "Chance that all drafts up to this place are kept. The first is where a broken head shows.",
                [Curve(f"{KEPT_BY_PLACE} / ignoring (position) group_left {CYCLES}", "{{position}}")],
                unit="percentunit",
            ),
        ],
    ),
    Row(
        "One pass",
        [
            Panel(
                "Tokens per forward",
                "Of verifications that carried hypotheses.",
                [Curve(f"{rate('orthrus_tokens')} / {CARRIED}", "tokens per forward")],
                least=1,
            ),
            Panel(
                "Outcomes foreseen",
                "Hits, and misses by cause: no block behind so many accepted drafts, or only for another bonus.",
                [
                    Curve(f"{rate('orthrus_hits')} / {CARRIED}", "hit"),
                    Curve(f"{MISSES} / ignoring (cause) group_left {CARRIED}", "miss: {{cause}}"),
                ],
                unit="percentunit",
                stacked=True,
            ),
            Panel(
                "Rows per verification",
                "Its own and those of the blocks that ride with it. Rows beyond a device's knee take time.",
                [Curve(f"{rate('orthrus_rows')} / {CARRIED}", "rows")],
            ),
            Panel(
                "Draft passes of their own",
                "Behind prompts, and where a batch has no room for hypotheses.",
                [Curve(rate("orthrus_draft_passes"), "per second")],
            ),
        ],
    ),
    Row(
        "What users get",
        [
            Panel("Tokens per second", "All answers together.", [Curve(SAID, "tokens per second")]),
            Panel(
                "Between tokens",
                "Several tokens of a cycle come at once, so half of the gaps may be next to nothing.",
                quantiles("inter_token_latency"),
                unit="s",
            ),
            Panel("First token", "From the request on.", quantiles("time_to_first_token"), unit="s"),
            Panel("Whole answers", "", quantiles("e2e_request_latency"), unit="s"),
        ],
    ),
    Row(
        "Load",
        [
            Panel(
                "Requests",
                "",
                [Curve(gauge("num_requests_running"), "running"), Curve(gauge("num_requests_waiting"), "waiting")],
            ),
            Panel(
                "KV cache in use",
                "Of the fullest engine.",
                [Curve(gauge("kv_cache_usage_perc", "max"), "in use")],
                unit="percentunit",
            ),
            Panel(
                "Prompt tokens found in the cache",
                "Drafts read the same cache, so behind a cached prefix as many are kept as elsewhere.",
                [Curve(f"{rate('prefix_cache_hits')} / {rate('prefix_cache_queries')}", "found")],
                unit="percentunit",
            ),
            Panel(
                "Preemptions",
                "Requests that had to give their place in the cache.",
                [Curve(rate("num_preemptions"), "per second")],
            ),
        ],
    ),
]


def dashboard() -> dict[str, Any]:
    return {
        "uid": "vllm-orthrus",
        "title": "vLLM with Orthrus",
        "tags": ["vllm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source(), model()]},
        "panels": list(panels()),
    }


def source() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def model() -> dict[str, Any]:
    query = "label_values(vllm:generation_tokens_total, model_name)"
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "models"},
        "definition": query,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }


def panels(width: int = 24, height: int = 8) -> Iterator[dict[str, Any]]:
    number, y = count(1), 0
    for row in ROWS:
        yield {"id": next(number), "type": "row", "title": row.title, "gridPos": {"x": 0, "y": y, "w": width, "h": 1}}
        edges = [round(width * place / len(row.panels)) for place in range(len(row.panels) + 1)]
        for panel, (left, right) in zip(row.panels, pairwise(edges), strict=True):
            where = {"x": left, "y": y + 1, "w": right - left, "h": height}
            yield {"id": next(number), "gridPos": where, **chart(panel)}
        y += 1 + height


def chart(panel: Panel) -> dict[str, Any]:
    drawn = {"fillOpacity": 30 if panel.stacked else 0, "stacking": {"mode": "normal" if panel.stacked else "none"}}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.says,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": panel.least, "custom": drawn}, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": curve.query, "legendFormat": curve.legend}
            for place, curve in enumerate(panel.curves)
        ],
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(text())
