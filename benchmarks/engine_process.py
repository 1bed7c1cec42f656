"""An engine in a process of its own, so that several with different settings can take turns."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.evidence import ROOT

ANSWER = "RESULT "


class EngineProcess:
    """Runs a module with `--serve TASK`, whose `questions` this asks."""

    def __init__(self, module: str, task: Mapping[str, Any], variables: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--serve", json.dumps(task)],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return found
        raise RuntimeError("the engine has ended; its last words are above")

    def ask(self, *question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self.receive()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def questions() -> Iterator[Any]:
    """In the engine's process, once it is ready. Each is to be answered before the next."""
    answer({})
    for line in sys.stdin:
        yield json.loads(line)


def answer(found: Mapping[str, Any]) -> None:
    print(ANSWER + json.dumps(found), flush=True)
