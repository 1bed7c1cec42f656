"""What is measured of a way in one turn, and who measures it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from vllm_orthrus.bench.prompts import Prompt
from vllm_orthrus.bench.texts import Texts
from vllm_orthrus.bench.ways import Way


class Drafts(NamedTuple):
    """vLLM's counters of a turn."""

    cycles: int = 0
    drafted: int = 0
    accepted: int = 0


class Turn(NamedTuple):
    tokens: int
    seconds: float
    drafts: Drafts
    more: dict[str, float]  # latencies, where they are measured


class Decoder(Protocol):
    """A way to decode that is up and waits for prompts."""

    def answers(self, prompts: Sequence[Prompt], tokens: int) -> Texts:
        """Greedily, one after the other."""

    def turn(self, prompts: Sequence[Prompt], at_once: int) -> Turn:
        """All of them, so many at a time."""


class Start(Protocol):
    """Has ways up for the length of a block."""

    def __call__(self, ways: Sequence[Way]) -> AbstractContextManager[Mapping[str, Decoder]]: ...
