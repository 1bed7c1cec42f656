"""`vllm-orthrus bench ...`: a table, and JSON, CSV and a picture beside each other."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

from vllm_orthrus.bench import acceptance, offline, online, plots, summary, throughput
from vllm_orthrus.bench.asked import classes_of, environment_of, prepare, settings_for, title_of
from vllm_orthrus.bench.files import write_csv, write_json
from vllm_orthrus.bench.turns import Decoder
from vllm_orthrus.bench.ways import OURS, PLAIN, Way
from vllm_orthrus.errors import UserError


def run_throughput(asked: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does, it stops the servers, too
    out = prepare(asked, ("concurrency", "rounds", "per_client"))
    settings = settings_for(asked, asked.against)
    plan = throughput.Plan(asked.concurrency, asked.rounds, asked.per_client, not asked.one_at_a_time)
    over = "vLLM's engine" if asked.offline else "vllm serve and vllm bench serve"
    together = 1 if asked.one_at_a_time else len(settings.ways)
    findings = throughput.Findings(out, environment_of(asked, settings, together, over))
    print(f"{', '.join(way.name for way in settings.ways)}: {over}; logs in {settings.logs}", flush=True)
    with ExitStack() as stack:
        client = None if asked.offline else stack.enter_context(online.client(settings))

        def start(ways: Sequence[Way]) -> AbstractContextManager[Mapping[str, Decoder]]:
            if client is None:
                return offline.starting(settings, ways)
            return online.serving(settings, client, ways)

        throughput.measure(settings, plan, classes_of(asked), start, findings)
    for name, same in findings.same_text.items():
        print(f"{name}: {same}")
    for problem in findings.red:
        print("RED", problem)
    if findings.red:
        return 1
    findings.summary = summary.summarise(findings.rounds)
    findings.flags = throughput.flags(settings.ways, findings.rounds)
    findings.write()
    write_csv(out.with_suffix(".csv"), summary.COLUMNS, summary.with_rates(findings.rounds))
    plots.draw_throughput(findings.summary, title_of(asked, findings.environment), out.with_suffix(".png"))
    print(summary.table(findings.summary))
    for flag in findings.flags:
        print("FLAG", flag)
    return _told(out)


def run_acceptance(asked: argparse.Namespace) -> int:
    out = prepare(asked, ("per_class",) if asked.per_class is not None else ())
    settings = settings_for(asked)
    settings = replace(settings, ways=[way for way in settings.ways if way.name != PLAIN])  # which drafts nothing
    if not settings.ways:
        raise UserError(f"--ways {PLAIN}: drafts nothing. There are {', '.join(OURS)}.")
    facts = environment_of(asked, settings, 1, "vLLM's engine")
    print(f"logs in {settings.logs}", flush=True)
    classes = {kind: prompts[: asked.per_class] for kind, prompts in classes_of(asked).items()}
    found = acceptance.measure(settings, classes)
    write_json(out, {"environment": facts, "summary": found})
    rows = acceptance.rows(found)
    places = max(len(one["accepted_at"]) for kinds in found.values() for one in kinds.values())
    columns = [*acceptance.COLUMNS, *(f"accepted_at_{place}" for place in range(1, places + 1))]
    write_csv(out.with_suffix(".csv"), columns, rows)
    plots.draw_acceptance(found, title_of(asked, facts), out.with_suffix(".png"))
    print(acceptance.table(found))
    return _told(out)


def _told(out: Path) -> int:
    print(f"\n{out}, {out.with_suffix('.csv').name}, {out.with_suffix('.png').name}")
    return 0
