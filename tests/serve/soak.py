"""Mixed traffic for as long as one likes, and whether the server is afterwards what it was before.

    make soak MINUTES=30        or: python -m tests.serve.soak --minutes 30 --speculative '{"orthrus_passes": "one"}'

Every greedy answer is compared with stock vLLM's; memory, descriptors and the cache's blocks must be given back; drafts
must be kept as often at the end as at the beginning; our counters must fit vLLM's, and vLLM's what the clients saw.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.evidence import environment
from tests.serve import traffic, watch
from tests.serve.picture import draw
from tests.serve.servers import ONE_PASS, OPTIONS, Holdings, drafting, holdings, idle, plain, settle, until
from tests.serve.traffic import Outcome, Pool, Traffic
from tests.serve.watch import Sample
from vllm_orthrus.bench.files import write_json
from vllm_orthrus.demo.server import Server

# Of the memory, what an allocator may keep. A worker on a CPU also keeps oneDNN's compiled products, one for each
# number of rows that it has met and each shape of weights, about 1 MB each and 1024 at most: those only time can tell
# from a leak.
SPARE = {"VLLM::Worker": 0.25}
SPARE_ELSEWHERE = 0.02


@dataclass
class Soaked:
    """A server's time under traffic, between two moments of rest."""

    before: Holdings
    after: Holdings
    counted_before: dict[str, float]
    counted_after: dict[str, float]
    traffic: Traffic
    samples: list[Sample]

    @property
    def new(self) -> Counter[str]:
        names = self.counted_after
        return Counter({name: round(names[name] - self.counted_before.get(name, 0)) for name in names})


def soak(server: Server, rate: float, seconds: float, run_in: float, every: float = 2.0) -> Soaked:
    """Traffic before the first rest, too, as a server that has served nothing yet holds less."""
    requests = Pool().requests()
    asyncio.run(traffic.send(server.url, requests, rate, run_in, seed=1))
    counted_before = settle(server)
    before = holdings(server)
    with watch.watching(server, every) as samples:
        sent = asyncio.run(traffic.send(server.url, requests, rate, seconds))
    counted_after = settle(server)
    after = until(lambda: holdings(server), lambda held: held.files <= before.files, 15)
    return Soaked(before, after, counted_before, counted_after, sent, samples)


def wrong(found: Soaked) -> list[str]:
    """Whatever should not be, apart from what is said."""
    problems = [f"a request failed: {one.error}" for one in found.traffic.outcomes if one.error]
    problems += [f"misshapen: {shape}" for one in found.traffic.outcomes if (shape := traffic.misshapen(one))]
    if not idle(found.counted_after):
        held = {name: found.counted_after[name] for name in ("num_requests_running", "kv_cache_usage_perc")}
        problems.append(f"with nobody asking it still holds {held}")
    if found.after.files > found.before.files:
        problems.append(f"{found.after.files} open files after it, {found.before.files} before")
    for name, before in found.before.resident.items():
        now = found.after.resident.get(name, 0)
        if now > (1 + SPARE.get(name, SPARE_ELSEWHERE)) * before:
            problems.append(f"{name} has {now} bytes resident after it, {before} before")
    return problems + disagreements(found)


def disagreements(found: Soaked) -> list[str]:
    """Counts that do not fit: the clients' and vLLM's, vLLM's and ours."""
    new, outcomes = found.new, found.traffic.outcomes
    whole = [one for one in outcomes if one.whole]
    ended = Counter(answer.finish for one in whole for answer in one.answers)
    left = sum(one.request.body.get("n", 1) for one in outcomes if one.left)
    ends = {reason: new[f"request_success/{reason}"] for reason in ("stop", "length", "abort", "error")}
    said = sum(answer.tokens for one in whole for answer in one.answers)
    cycles, accepted = new["spec_decode_num_drafts"], new["spec_decode_num_accepted_tokens"]
    by_place = sum(count for name, count in new.items() if "accepted_tokens_per_pos/" in name)
    claims = {
        # Some had ended when their clients left; vLLM counts none of the others.
        f"requests that ended: {ends} by vLLM, {dict(ended)} by the clients, of whom {left} left": (
            all(0 <= ends[reason] - ended[reason] <= left for reason in ("stop", "length"))
            and sum(ends.values()) <= sum(ended.values()) + left
            and not ends["error"]
        ),
        f"{new['generation_tokens']} tokens by vLLM, {said} seen": new["generation_tokens"] >= said,
        f"{by_place} accepted by place, {accepted} in all": by_place == accepted,
        f"{accepted} accepted of {new['spec_decode_num_draft_tokens']} drafts, in {cycles} cycles": (
            0 < accepted < new["spec_decode_num_draft_tokens"]
        ),
    }
    verified = new["orthrus_verifications"]
    if verified:
        outcomes_of_ours = new["orthrus_hits"] + new["orthrus_misses/accepted_count"] + new["orthrus_misses/bonus"]
        claims |= {
            f"{outcomes_of_ours} hits and misses, {verified} verifications": outcomes_of_ours == verified,
            # Ahead of time a step or two of a request that has just ended are verified, which vLLM doesn't count.
            f"{verified} verifications of ours, {cycles} of vLLM's": verified <= cycles + 2 * len(outcomes) + left,
            f"{new['orthrus_tokens']} tokens of {verified} verifications": verified <= new["orthrus_tokens"],
            f"{new['orthrus_rows']} rows of {verified} verifications": new["orthrus_rows"] > verified,
        }
    return [claim for claim, holds in claims.items() if not holds]


def decays(slopes: Mapping[str, Any], minutes: float) -> list[str]:
    """What drafting brings may not fall by more than chance, and a twentieth, over all of the time."""
    found = []
    for name in ("tokens_per_cycle", "first_kept"):
        if (line := slopes.get(name)) and line["per_minute"] < -line["noise"]:
            fallen = -line["per_minute"] * minutes
            if fallen > line["mean"] / 20:
                found.append(f"{name} has fallen by {fallen:.3f}, of {line['mean']:.3f} in the mean")
    return found


def differences(outcomes: Sequence[Outcome], folder: Path) -> list[str]:
    """From what stock vLLM says to the same."""
    greedy = [one for one in outcomes if one.request.greedy and not one.error]
    with plain(folder) as server:
        expected = asyncio.run(traffic.answer_all(server.url, [one.request for one in greedy]))
    found = (traffic.difference(one, expected[one.request.key]) for one in greedy)
    return [one for one in found if one]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second")
    parser.add_argument("--speculative", default=json.dumps(ONE_PASS), help="settings of ours; null: stock vLLM")
    parser.add_argument("--out", type=Path, help="FILE.json; FILE.png goes beside it")
    asked = parser.parse_args()
    out = asked.out or Path(f"soak-{datetime.now():%Y%m%d-%H%M%S}.json")
    folder = Path(tempfile.mkdtemp(prefix="vllm-orthrus-soak-"))
    settings = json.loads(asked.speculative)
    print(f"logs in {folder}", flush=True)
    facts = environment()
    with plain(folder) if settings is None else drafting(folder, settings) as server:
        found = soak(server, asked.rate, 60 * asked.minutes, run_in=24 * asked.minutes, every=5.0)
    report = reported(found) | {"wrong": []}
    if settings is not None:
        report["wrong"] = wrong(found) + decays(report["slopes_per_minute"], asked.minutes)
        parted = differences(found.traffic.outcomes, folder)
        report["differences"] = {"count": len(parted), "first": parted[:20]}
    said = {"minutes": asked.minutes, "rate": asked.rate, "speculative": settings, "options": OPTIONS}
    write_json(out, {"environment": facts, "asked": said, **report, "samples": [_row(one) for one in found.samples]})
    if len(found.samples) > 2 * watch.SEGMENTS:
        draw(report, found.samples, out.with_suffix(".png"))
    print(json.dumps({name: report[name] for name in report if name != "windows"}, indent=1, default=str))
    return 1 if report["wrong"] or report.get("differences", {}).get("count") else 0


def reported(found: Soaked) -> dict[str, Any]:
    outcomes, settled = found.traffic.outcomes, watch.run_in(found.samples)
    seconds = [one.seconds for one in settled]
    windows = watch.rates(found.samples, 30)
    slopes = {"memory_mib": watch.slope(seconds, [one.memory / 2**20 for one in settled])}
    slopes["files"] = watch.slope(seconds, [float(one.files) for one in settled])
    late = [one for one in windows if one["seconds"] >= watch.RUNNING_IN * found.samples[-1].seconds]
    for name in ("tokens_per_cycle", "first_kept", "hit_rate"):
        told = [one for one in late if one[name] is not None]
        if len(told) > watch.SEGMENTS:
            slopes[name] = watch.slope([one["seconds"] for one in told], [one[name] for one in told])
    return {
        "requests": {
            "answered": sum(one.whole for one in outcomes),
            "left": sum(one.left for one in outcomes),
            "failed": sum(one.error is not None for one in outcomes),
            "withheld": found.traffic.withheld,
            "by_kind": dict(Counter(one.request.kind for one in outcomes)),
            "greedy": sum(one.request.greedy for one in outcomes),
        },
        "slopes_per_minute": {name: one._asdict() | {"flat": one.flat} for name, one in slopes.items()},
        "before": found.before._asdict(),
        "after": found.after._asdict(),
        "counted": {name: count for name, count in sorted(found.new.items()) if count and not name.endswith("created")},
        "windows": windows,
    }


def _row(one: Sample) -> Mapping[str, Any]:
    shown = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions")
    return {
        "seconds": round(one.seconds, 1),
        "memory": one.memory,
        "resident": dict(one.resident),
        "files": one.files,
        "threads": one.threads,
    } | {name: one.counted[name] for name in shown}


if __name__ == "__main__":
    sys.exit(main())
