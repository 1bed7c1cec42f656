"""Prompts for a head, and some that it never sees. Yours come here: what the base will be asked, a few thousand of it.

    python examples/own_head/prompts.py runs/own-head

Those that are made here ask for log lines and JSON, of kinds that the tiny model knows. The base answers them itself.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tiny-orthrus"))
from corpus import source_of, train_samples, unique

KINDS = ("log", "json")
HELD_OUT = 20  # of each kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=2000, help="of each kind")
    asked = parser.parse_args()
    held_out = [one for kind in KINDS for one in unique(source_of(kind, True), HELD_OUT, set(), lambda _: True)]
    asked.folder.mkdir(parents=True, exist_ok=True)
    write(asked.folder / "heldout.jsonl", held_out)
    write(asked.folder / "prompts.jsonl", train_samples(dict.fromkeys(KINDS, asked.count), held_out))


def write(file: Path, samples: list[Any]) -> None:
    """Without their answers: a head learns what its base says, and not what might be said."""
    file.write_text("".join(json.dumps({"class": one["class"], "prompt": one["prompt"]}) + "\n" for one in samples))


if __name__ == "__main__":
    main()
