"""Where the findings of a check go."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Evidence:
    """Everything that was found, written out after every step."""

    path: Path
    environment: dict[str, Any]

    def write(self) -> None:
        content = asdict(self)
        content.pop("path")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def default_path(check: str, gpu: str) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in gpu)
    return ROOT / "benchmarks" / "evidence" / f"{check}-{name}.json"
