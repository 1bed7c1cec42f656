"""What rounds add up to, as figures and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vllm_orthrus.bench.calls import call
from vllm_orthrus.bench.ways import PLAIN

ALL = "all"
Rounds = Sequence[Mapping[str, Any]]
COLUMNS = (
    *("round", "at_once", "class", "way", "requests", "tokens", "seconds", "tokens_per_second", "times_plain"),
    *("cycles", "drafted", "accepted", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms"),
)


def with_rates(rounds: Rounds) -> list[dict[str, Any]]:
    """Each turn, with how fast it was and how many times as fast as plain decoding in the same round."""
    return [
        {**turn, "tokens_per_second": _rate([turn]), "times_plain": _rate([turn]) / _rate([plain])}
        for turn, plain in _beside_plain(rounds)
    ]


def _beside_plain(rounds: Rounds) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Turns whose plain counterpart was measured, too."""
    plain = {_place(turn): turn for turn in rounds if turn["way"] == PLAIN}
    return ((turn, plain[_place(turn)]) for turn in rounds if _place(turn) in plain)


def _place(turn: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(turn[name] for name in ("round", "at_once", "class"))


def summarise(rounds: Rounds) -> dict[str, Any]:
    """By number of requests, class and way. Over all classes, a round counts with its tokens and its seconds."""
    pairs = list(_beside_plain(rounds))
    found: dict[str, Any] = {}
    for at_once in _values(rounds, "at_once"):
        kinds = [kind for kind in _values(rounds, "class") if kind != ALL]
        for kind in [*kinds, ALL] if len(kinds) != 1 else kinds:
            for way in _values(rounds, "way"):
                mine = [
                    (turn, plain)
                    for turn, plain in pairs
                    if (turn["at_once"], turn["way"]) == (at_once, way) and (turn["class"] == kind or kind == ALL)
                ]
                if mine:
                    found.setdefault(str(at_once), {}).setdefault(kind, {})[way] = _summary(mine)
    return found


def _summary(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    rates, ratios = [], []
    for number in _values([turn for turn, _ in pairs], "round"):
        mine, plain = zip(*(pair for pair in pairs if pair[0]["round"] == number), strict=True)
        rates.append(_rate(mine))
        ratios.append(_rate(mine) / _rate(plain))
    found = call(ratios)
    cycles, accepted = (sum(turn[name] for turn, _ in pairs) for name in ("cycles", "accepted"))
    return {
        "tokens_per_second": statistics.median(rates),
        **{f"{name}_plain" if name == "times" else name: value for name, value in found._asdict().items()},
        "rounds": len(ratios),
        "tokens_per_cycle": 1 + accepted / cycles if cycles else None,
    }


def _rate(turns: Iterable[Mapping[str, Any]]) -> float:
    turns = list(turns)
    return float(sum(turn["tokens"] for turn in turns) / sum(turn["seconds"] for turn in turns))


def _values(rounds: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(turn[name] for turn in rounds))


def table(summary: Mapping[str, Any]) -> str:
    """Tokens per second, and times plain; a difference that is not called one has a question mark."""
    lines = []
    for at_once, kinds in summary.items():
        lines += [
            "",
            f"{f'{at_once} at once':<14}" + "".join(f"{kind[:14]:>16}" for kind in kinds) + "   tokens per cycle",
        ]
        last = list(kinds.values())[-1]
        for way in last:
            cells = "".join(f"{_cell(way, found[way]):>16}" for found in kinds.values())
            drafting = last[way]["tokens_per_cycle"]
            lines.append(f"{way[:13]:<14}" + cells + (f"{drafting:>19.2f}" if drafting else ""))
    return "\n".join([*lines, "", "tokens per second, and times plain in the median round; ? is no difference seen"])


def _cell(way: str, found: Mapping[str, Any]) -> str:
    rate = f"{found['tokens_per_second']:.1f}"
    if way == PLAIN:
        return f"{rate}        "
    return f"{rate} {found['times_plain']:5.2f}x" + ("?" if found["verdict"] == "no difference seen" else " ")
