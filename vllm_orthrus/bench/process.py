"""A Python process that answers questions, so that several with different settings can take turns."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_orthrus.errors import UserError

ANSWER = "RESULT "


class ProcessError(UserError):
    """The process ended before it had answered; the message holds the end of what it said."""


class AnsweringProcess:
    """Runs a module with `--serve TASK`, whose `questions` this asks.

    What else it says goes to the log, or to our own stderr without one. It runs in the folder, or in ours.
    """

    def __init__(
        self,
        module: str,
        task: Any,
        variables: Mapping[str, str] | None = None,
        log: Path | None = None,
        folder: Path | None = None,
    ) -> None:
        self.log, self.is_ready = log, False
        self.said = sys.stderr if log is None else log.open("a", buffering=1)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--serve", json.dumps(task)],
            cwd=folder,
            env={**os.environ, **(variables or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )

    def ready(self) -> None:
        if not self.is_ready:
            self._receive()
            self.is_ready = True

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return found
            self.said.write(line)
        if self.log is None:
            raise ProcessError("it has ended; its last words are above")
        raise ProcessError("\n".join([*self.log.read_text(errors="replace").splitlines()[-30:], f"(all: {self.log})"]))

    def ask(self, *question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.ready()
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._receive()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        if self.log is not None:
            self.said.close()


def questions() -> Iterator[Any]:
    """In that process, once it is ready. Each is to be answered before the next."""
    answer({})
    for line in sys.stdin:
        yield json.loads(line)


def answer(found: Mapping[str, Any]) -> None:
    print(ANSWER + json.dumps(found), flush=True)
