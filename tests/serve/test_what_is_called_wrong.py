"""What a soak calls wrong: each fault, planted into figures of a sound one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.serve import soak, traffic, watch
from tests.serve.servers import Holdings
from tests.serve.soak import Soaked
from tests.serve.traffic import Answer, Outcome, Pool, Traffic
from tests.serve.watch import Sample

COUNTED = {
    "num_requests_running": 0.0,
    "num_requests_waiting": 0.0,
    "kv_cache_usage_perc": 0.0,
    "request_success/stop": 1.0,
    "request_success/length": 1.0,
    "generation_tokens": 60.0,
    "spec_decode_num_drafts": 20.0,
    "spec_decode_num_draft_tokens": 300.0,
    "spec_decode_num_accepted_tokens": 40.0,
    "spec_decode_num_accepted_tokens_per_pos/0": 25.0,
    "spec_decode_num_accepted_tokens_per_pos/1": 15.0,
    "orthrus_verifications": 18.0,
    "orthrus_hits": 10.0,
    "orthrus_misses/accepted_count": 5.0,
    "orthrus_misses/bonus": 3.0,
    "orthrus_tokens": 50.0,
    "orthrus_rows": 900.0,
}


def sound() -> Soaked:
    pool = Pool()
    outcomes = [
        Outcome(pool.request("regex"), 0.0, [Answer("1 + 2 = 3", "stop", 9, 20)]),
        Outcome(pool.request("short"), 0.0, [Answer("one two", "length", 40, 20)]),
        Outcome(pool.request("short"), 0.0, [Answer("one", None, 0, 0)], left=True),
    ]
    held = Holdings({"vllm": 1000, "VLLM::Worker": 9000}, 100, 20)
    nothing = dict.fromkeys(COUNTED, 0.0)
    return Soaked(held, held, nothing, dict(COUNTED), Traffic(outcomes), [])


def counting(**changed: float) -> Callable[[Soaked], Any]:
    def plant(found: Soaked) -> None:
        found.counted_after |= {name.replace("__", "/"): count for name, count in changed.items()}

    return plant


def holding(front_end: int, worker: int, files: int) -> Callable[[Soaked], Any]:
    def plant(found: Soaked) -> None:
        found.after = Holdings({"vllm": front_end, "VLLM::Worker": worker}, files, 20)

    return plant


def answering(place: int, **changed: Any) -> Callable[[Soaked], Any]:
    def plant(found: Soaked) -> None:
        found.traffic.outcomes[place] = replace(found.traffic.outcomes[place], **changed)

    return plant


def test_what_is_sound_is_not_called_wrong() -> None:
    assert soak.wrong(sound()) == []


@pytest.mark.parametrize(
    ("plant", "called"),
    [
        (holding(1021, 9000, 100), "vllm has 1021 bytes"),
        (holding(1000, 11_500, 100), "VLLM::Worker has 11500 bytes"),
        (holding(1000, 9000, 101), "open files"),
        (counting(kv_cache_usage_perc=0.01), "still holds"),
        (counting(num_requests_running=1), "still holds"),
        (counting(request_success__error=1), "requests that ended"),
        (counting(request_success__stop=0), "requests that ended"),
        (counting(request_success__length=5), "requests that ended"),
        (counting(generation_tokens=40), "tokens by vLLM"),
        (counting(spec_decode_num_accepted_tokens=41), "accepted by place"),
        (counting(orthrus_hits=11), "hits and misses"),
        (counting(orthrus_verifications=60, orthrus_hits=52, orthrus_tokens=70), "verifications of ours"),
        (counting(orthrus_tokens=17), "tokens of 18"),
        (counting(orthrus_rows=18), "rows of 18"),
        (answering(1, error="APIConnectionError: gone", answers=[]), "a request failed"),
        (answering(0, answers=[Answer("one plus two", "stop", 9, 20)]), "misshapen"),
    ],
)
def test_what_is_wrong_is_called_so(plant: Callable[[Soaked], Any], called: str) -> None:
    found = sound()
    plant(found)
    assert any(called in problem for problem in soak.wrong(found)), soak.wrong(found)


@pytest.mark.parametrize(
    ("mine", "left", "same"),
    [
        (Answer("one two", "stop", 4, 9), False, True),
        (Answer("one two", "length", 4, 9), False, False),
        (Answer("one two", "stop", 5, 9), False, False),
        (Answer("one too", "stop", 4, 9), False, False),
        (Answer("one", None, 0, 0), True, True),
        (Answer("onto", None, 0, 0), True, False),
        (None, True, True),
        (None, False, False),
    ],
)
def test_answers_are_compared(mine: Answer | None, left: bool, same: bool) -> None:
    request = Pool().request("short")
    wanted = Outcome(request, 0.0, [Answer("one two", "stop", 4, 9)])
    found = traffic.difference(Outcome(request, 0.0, [mine] if mine else [], left=left), wanted)
    assert (found is None) == same


@pytest.mark.parametrize(("per_minute", "flat"), [(0.0, True), (1.0, False), (-1.0, False)])
def test_a_slope_is_told_from_noise(per_minute: float, flat: bool) -> None:
    """Noise that lasts: neighbours of a sample are like it."""
    draw, drift, values = random.Random(1), 0.0, []
    seconds = [5.0 * place for place in range(360)]
    for second in seconds:
        drift = 0.9 * drift + draw.gauss(0, 1)
        values.append(2000 + drift + per_minute * second / 60)
    found = watch.slope(seconds, values)
    assert found.flat == flat
    assert abs(found.per_minute - per_minute) <= 1.5 * found.noise


@pytest.mark.parametrize(
    ("per_minute", "noise", "decayed"),
    [(-0.01, 0.002, True), (-0.01, 0.02, False), (-0.001, 0.0005, False), (0.01, 0.002, False)],
)
def test_acceptance_that_decays_is_called_so(per_minute: float, noise: float, decayed: bool) -> None:
    """Only what is more than chance, and a twentieth of it within half an hour."""
    line = watch.Slope(per_minute, noise, mean=3.0)._asdict()
    assert bool(soak.decays({"tokens_per_cycle": line}, minutes=30)) == decayed


def test_what_drafting_brings_is_told_by_window() -> None:
    def at(place: int, kept: float) -> Sample:
        names = ("spec_decode_num_drafts", "orthrus_verifications", "orthrus_hits")
        counted = dict.fromkeys(names, 10.0 * place) | {"spec_decode_num_accepted_tokens": kept}
        return Sample(float(place), 0, 0, 0, {}, counted | {"spec_decode_num_accepted_tokens_per_pos/0": kept / 2})

    # Twice as many are kept in the first half as in the second.
    samples = [at(place, 40.0 * min(place, 9) + 20.0 * max(0, place - 9)) for place in range(20)]
    first, last = (window["tokens_per_cycle"] for window in watch.rates(samples, 2))
    assert first == pytest.approx(5.0, abs=0.2) and last == pytest.approx(3.0, abs=0.2)


def test_requests_are_the_same_again() -> None:
    some, again = ([pool.request(kind) for kind in traffic.RATES] for pool in (Pool(3), Pool(3)))
    assert some == again
