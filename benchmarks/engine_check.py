"""The whole engine on a GPU, in phases: first whether it drafts as it must, then what that costs.

    python -m benchmarks.engine_check [--phase NAME] [--anew] [--folder FOLDER] [--minutes 9]

Needs vLLM and this package. `phases.py` says what the phases are: oracle, rows, text, wide, steps. Each ends within the
minutes given, as no engine is started that could not end by then, and writes a file of its own after every answer and
every point. Called again, a phase goes on where it stopped; one that has everything is not run again. Findings of
another environment are never added to: --anew replaces them, --folder puts new ones beside them.

A phase that finds something wrong doesn't keep later ones from running, but no speed is printed for a way of decoding
that is wrong. Texts may part at near ties (`vllm_orthrus/bench/near_ties.py`). Exit status 1: something is wrong,
failed, or is still to be done. Exit status 2: there is no GPU, or the findings at hand come from elsewhere.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from benchmarks.evidence import FOLDER, ROOT, Evidence, default_path, differences, environment
from benchmarks.phases import PHASES, TINY, Phase, Scale, Start

# Triton's products of float32 are otherwise TF32 on a GPU, and vLLM's attention for float32 is made of those.
EXACT_FLOAT32 = {"TRITON_F32_DEFAULT": "ieee"}

Keep = Callable[[dict[str, Any]], None]


class OtherEnvironmentError(Exception):
    """There are findings already, and they come from another machine, other packages or other code."""


@dataclass
class PhaseEvidence(Evidence):
    """What the engines of a phase told, by name. Everything else here follows from it."""

    phase: str
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    postponed: dict[str, str] = field(default_factory=dict)  # engines that there was no time for
    red: dict[str, list[str]] = field(default_factory=dict)
    near_ties: dict[str, list[str]] = field(default_factory=dict)
    finished: bool = False

    @classmethod
    def open(cls, folder: Path, phase: str, facts: dict[str, Any], anew: bool = False) -> "PhaseEvidence":
        """Those at hand, to be added to, or none yet."""
        evidence = cls(default_path(f"engine_check-{phase}", facts["gpu"], folder), facts, phase)
        if evidence.path.is_file() and not anew:
            found = json.loads(evidence.path.read_text())
            other = differences(facts, found["environment"])
            if other:
                raise OtherEnvironmentError(
                    f"{evidence.path} comes from elsewhere ({'; '.join(other)}), and findings are not mixed. "
                    "Give --anew to replace it, or --folder to put new findings beside it."
                )
            return cls(evidence.path, **found)
        return evidence

    def keep(self, name: str, part: dict[str, Any]) -> None:
        found = self.engines.setdefault(name, {})
        for kind, value in part.items():
            if kind == "started":
                found[kind] = value
            elif kind == "answers":
                found.setdefault("answers", []).append(value)
            elif kind == "step":
                found.setdefault("steps", []).append(value)
        self.write()

    def missing(self, start: Start) -> dict[str, Any] | None:
        """What is still to be asked of an engine."""
        found, ask = self.engines.get(start.name, {}), dict(start.ask)
        if "at_once" in ask:
            known = {answers["at_once"] for answers in found.get("answers", [])}
            ask["at_once"] = [at_once for at_once in ask["at_once"] if at_once not in known]
        if "points" in ask:
            measured = {(step["requests"], step["context"]) for step in found.get("steps", [])}
            ask["points"] = [point for point in ask["points"] if tuple(point) not in measured]
        return ask if ask.get("at_once") or ask.get("points") else None

    def judge(self, phase: Phase, scale: Scale) -> None:
        verdict = phase.judge(scale, {name: found for name, found in self.engines.items() if "started" in found})
        self.red = {name: problems for name, problems in verdict.red.items() if problems}
        self.near_ties = verdict.near_ties
        self.write()


def run_engine(task: dict[str, Any], timeout: float, keep: Keep) -> None:
    """Start an engine in a process of its own, and hand on what it tells, as soon as it does."""
    command = [sys.executable, "-m", "benchmarks.engine_run", json.dumps(task)]
    exact = EXACT_FLOAT32 if task["engine"].get("dtype") == "float32" else {}
    last: deque[str] = deque(maxlen=40)  # lines of a log, in case it fails
    done = False
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | exact, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        alarm = Timer(timeout, process.kill)
        alarm.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("PART "):
                    part = json.loads(line.removeprefix("PART "))
                    done = done or "done" in part
                    keep(part)
                else:
                    last.append(line)
        finally:
            ended_by_us = not alarm.is_alive()
            alarm.cancel()
            process.kill()
    if not done:
        why = f"did not end within {timeout:.0f} s" if ended_by_us else "ended before it had told everything"
        raise RuntimeError(f"{why}:\n{''.join(last)[-3000:]}")


def run_phase(phase: Phase, scale: Scale, evidence: PhaseEvidence, deadline: float) -> None:
    """Ask every engine what is still missing, as far as there is time."""
    evidence.failed, evidence.postponed = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        starts = [start for start in phase.starts(scale, folder) if evidence.missing(start)]
        expected = phase.prepare_seconds + sum(start.seconds for start in starts)
        print(f"{evidence.phase}: {len(starts)} engines to start, about {expected / 60:.0f} minutes", flush=True)
        prepared, slower = False, 1.0
        for number, start in enumerate(starts, 1):
            left = deadline - time.monotonic()
            seconds = start.seconds * slower + (0 if prepared else phase.prepare_seconds)
            print(f"  {number}/{len(starts)} {start.name}: up to {seconds:.0f} s, {left:.0f} s left", flush=True)
            if left < seconds:
                evidence.postponed[start.name] = f"it may take {seconds:.0f} s, and {left:.0f} s were left"
                evidence.write()
                continue
            began = time.monotonic()
            if not prepared:
                phase.prepare(scale, folder)
                print(f"    checkpoints written in {time.monotonic() - began:.0f} s", flush=True)
                prepared, began = True, time.monotonic()
            task = {"engine": start.engine | dict(scale.engine), **(evidence.missing(start) or {})}
            try:
                run_engine(task, deadline - time.monotonic(), partial(evidence.keep, start.name))
            except RuntimeError as error:
                evidence.failed[start.name] = str(error)
                print(f"    FAILED: {error}", flush=True)
            took = time.monotonic() - began
            slower = max(slower, took / start.seconds)
            print(f"    took {took:.0f} s", flush=True)
            evidence.judge(phase, scale)
    everything = phase.starts(scale, Path())
    evidence.finished = not any(evidence.missing(start) for start in everything)
    evidence.judge(phase, scale)


# What is said about it


def state(evidence: PhaseEvidence) -> str:
    if evidence.red or evidence.failed:
        return "red" if evidence.red else "failed"
    if not evidence.finished:
        return "unfinished" if evidence.engines else "not run"
    return "right, but for near ties" if evidence.near_ties else "right"


def untrusted(needed: Iterable[PhaseEvidence]) -> Callable[[str], str | None]:
    """By way of decoding: why its speed would mean nothing, if it would not."""
    needed = list(needed)

    def reason(way: str) -> str | None:
        for evidence in needed if way != "plain" else []:
            # The oracle's engines are no ways of decoding: it speaks of drafting as such.
            general = evidence.phase == "oracle"
            if evidence.red if general else way in evidence.red:
                return f"{evidence.phase} is red"
            if not (evidence.finished if general else evidence.engines.get(way, {}).get("answers")):
                return f"{evidence.phase} has not shown that it is right"
        return None

    return reason


def lines(evidence: PhaseEvidence, starts: list[Start], reason: Callable[[str], str | None]) -> Iterator[str]:
    """A phase's findings: what is wrong first, then what may be told of its speeds."""
    for name, problems in evidence.red.items():
        yield from (f"  RED  {name}: {problem}" for problem in problems)
    for name, near_ties in evidence.near_ties.items():
        yield from (f"  near tie  {name}: {tie}" for tie in near_ties)
    for name, problem in evidence.failed.items():
        yield f"  FAILED  {name}: {problem.splitlines()[0]}"
    for name, time_left in evidence.postponed.items():
        yield f"  to be done  {name}: {time_left}"
    plain = evidence.engines.get("plain", {})
    for start in starts:
        found = evidence.engines.get(start.name, {})
        why = "it is red" if start.name in evidence.red else reason(start.way)
        measured = [*found.get("steps", []), *found.get("answers", [])] if evidence.phase != "oracle" else []
        if measured and why is not None:
            yield f"  {start.name}: speed not shown, {why}"
            continue
        yield from step_lines(start.name, found, plain)
        if evidence.phase == "wide":
            yield from answer_lines(start.name, found, plain)


def step_lines(name: str, found: dict[str, Any], plain: dict[str, Any]) -> Iterator[str]:
    reference = {(step["requests"], step["context"]): step for step in plain.get("steps", []) if "mean" in step}
    for step in found.get("steps", []):
        point = f"  {name:<16} {step['requests']:>3} x {step['context']:<6}"
        if "skipped" in step:
            yield f"{point} {step['skipped']}"
            continue
        base = reference.get((step["requests"], step["context"]))
        times = f"{1e3 * step['mean']:8.2f} ms per step, {1e3 * step['forward']:8.2f} in the forward"
        yield f"{point} {times}" + (f", {step['mean'] / base['mean']:.2f} times plain" if base else "")


def answer_lines(name: str, found: dict[str, Any], plain: dict[str, Any]) -> Iterator[str]:
    def rate(answers: dict[str, Any]) -> float:
        return float(sum(map(len, answers["tokens"])) / answers["seconds"])

    reference = {answers["at_once"]: rate(answers) for answers in plain.get("answers", [])}
    for answers in found.get("answers", []):
        at_once, counted = answers["at_once"], answers["counted"]
        cycles = counted.get("vllm:spec_decode_num_drafts", 0)
        line = f"  {name:<16} {at_once:>3} at once {rate(answers):8.1f} tokens per second"
        if at_once in reference:
            line += f", {rate(answers) / reference[at_once]:.2f} times plain"
        if cycles:
            line += f", {1 + counted['vllm:spec_decode_num_accepted_tokens'] / cycles:.2f} tokens per cycle"
        yield line


def tiny_prompts(per_class: int) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Held-out prompts of the tiny model, and what ends its answers."""
    from transformers import AutoTokenizer

    from vllm_orthrus.training.evaluate import first_per_class, read_prompts

    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    prompts = first_per_class(read_prompts(TINY / "heldout.jsonl", tokenizer), per_class)
    return tuple(tuple(prompt.tokens) for prompt in prompts), (tokenizer.eos_token_id,)


def check(
    phases: list[str], scale: Scale, folder: Path, facts: dict[str, Any], minutes: float, anew: bool = False
) -> int:
    """Run phases, and tell what is known of all."""
    every = {name: PhaseEvidence.open(folder, name, facts, anew) for name in phases}
    for name in PHASES:
        if name not in every:
            with suppress(OtherEnvironmentError):  # as good as none
                every[name] = PhaseEvidence.open(folder, name, facts)
    for name in phases:
        evidence, phase = every[name], PHASES[name]
        if evidence.finished:
            print(f"{name}: has its evidence already, in {evidence.path}", flush=True)
        else:
            run_phase(phase, scale, evidence, time.monotonic() + 60 * minutes)
        reason = untrusted(every.get(other) or PhaseEvidence(Path(), facts, other) for other in phase.needs)
        print(*lines(evidence, phase.starts(scale, Path()), reason), sep="\n", flush=True)
    print(f"\n{'phase':<8} {'state':<26} {'engines':>7}   evidence")
    for name, evidence in every.items():
        print(f"{name:<8} {state(evidence):<26} {len(evidence.engines):>7}   {evidence.path}")
    return 0 if all(state(every[name]).startswith("right") for name in phases) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=list(PHASES), action="append", help="default: all, in this order")
    parser.add_argument("--anew", action="store_true", help="forget what these phases have found so far")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the evidence is, and goes")
    parser.add_argument("--minutes", type=float, default=9.0, help="for each phase: start nothing that could not end")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("engine-check needs a GPU that this PyTorch can use, and found none; nothing was checked or measured.")
        return 2
    facts = environment()
    print(f"{facts['gpu']}, torch {facts['torch']}, vLLM {facts['packages']['vllm']}", flush=True)
    prompts, stop = tiny_prompts(per_class=8)
    scale = Scale(prompts=prompts, stop=stop)
    try:
        return check(options.phase or list(PHASES), scale, options.folder, facts, options.minutes, options.anew)
    except OtherEnvironmentError as error:
        print(error)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
