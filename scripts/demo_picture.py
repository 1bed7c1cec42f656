"""Run the demonstration and draw what a terminal showed of it.

    python scripts/demo_picture.py [--out docs/pictures/demo.svg]

What is drawn is what was printed, cut at the terminal's width; nothing is put in or left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ("vllm-orthrus", "demo", "--per-class", "1")
COLUMNS = 100
LETTER, LINE, EDGE, BAR = 7.8, 18, 16, 34  # pixels
BLANK = "\N{NO-BREAK SPACE}"  # others are drawn as one where several follow each other
STYLE = (
    "text{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:13px}"
    ".said{fill:#e6edf3}.w{fill:#0d1117}.p{fill:#7ee787}"
)


def wrapped(said: str) -> list[str]:
    """Lines as a terminal of so many columns has them."""
    lines: list[str] = []
    for line in said.rstrip("\n").split("\n"):
        shown = line.rsplit("\r", 1)[-1].expandtabs()
        lines += [shown[start : start + COLUMNS] for start in range(0, max(1, len(shown)), COLUMNS)]
    return lines


def draw(command: str, said: str) -> str:
    lines = [f"$ {command}", *wrapped(said)]
    width, height = round(2 * EDGE + COLUMNS * LETTER), BAR + LINE * len(lines) + EDGE
    rows = [
        f'<text class="{"said" if place else "p"}" x="{EDGE}" y="{BAR + LINE * place + 13}">'
        f"{escape(line).replace(' ', BLANK)}</text>"
        for place, line in enumerate(lines)
    ]
    dots = [
        f'<circle cx="{EDGE + 6 + 18 * place}" cy="17" r="5.5" fill="{colour}"/>'
        for place, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    ]
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    frame = f'<rect class="w" width="{width}" height="{height}" rx="8"/>'
    named = '<title id="t">The demonstration in a terminal</title>'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="t">'
    parts = [opening, named, f"<style>{STYLE}</style>", frame, *dots, *rows]
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures" / "demo.svg")
    out = parser.parse_args().out
    program = Path(sys.executable).with_name(COMMAND[0])
    done = subprocess.run([program, *COMMAND[1:]], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    print(done.stdout)
    if done.returncode == 0:
        out.write_text(draw(" ".join(COMMAND), done.stdout))
        print(out)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
