"""Whether ways to decode say the same, before anybody asks how fast they say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from vllm_orthrus.bench.ways import PLAIN, Way

Texts = Sequence[Sequence[int]]  # tokens of each answer


class Same(NamedTuple):
    equal: int
    asked: int
    parts_at: list[int]  # for each answer that differs, its first token that does

    def __str__(self) -> str:
        if self.equal == self.asked:
            return f"all {self.asked} answers are plain decoding's"
        first = ", ".join(map(str, sorted(self.parts_at)))
        return f"{self.equal} of {self.asked} answers are plain decoding's; the others part from it at token {first}"


def compare(mine: Texts, plain: Texts) -> Same:
    parting = [_first_difference(one, other) for one, other in zip(mine, plain, strict=True)]
    parts_at = [place for place in parting if place is not None]
    return Same(len(plain) - len(parts_at), len(plain), parts_at)


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    pairs = zip_longest(one, other, fillvalue=None)
    return next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), None)


def judge(said: Mapping[str, Texts], ways: Sequence[Way], exact: bool) -> tuple[dict[str, Same], list[str]]:
    """By way, how much of plain decoding's greedy text it says; and what must not be timed.

    In float32 nothing may differ. Otherwise rows that are computed together are rounded differently from rows that are
    computed one by one, and nearly tied tokens may fall either way.
    """
    same = {way.name: compare(said[way.name], said[PLAIN]) for way in ways if way.name != PLAIN}
    claims = {way.name for way in ways if way.lossless}
    wrong = [
        f"{name}: {found}. In float32 it must say the same, so its speed means nothing."
        for name, found in same.items()
        if exact and name in claims and found.equal < found.asked
    ]
    return same, wrong
