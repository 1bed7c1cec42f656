"""`vllm-orthrus doctor`: is this installation able to serve, and if not, what to do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

Verdict = Literal["ok", "note", "RED"]


class Finding(NamedTuple):
    verdict: Verdict
    subject: str
    found: str
    advice: str = ""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor", help="check versions, plugin, patches, the head for a model, and a cluster"
    )
    parser.add_argument("model", nargs="?", help="a base model: also say which head serves it")
    parser.add_argument("--head", help="the head to check for MODEL, instead of the one it resolves to")
    parser.add_argument("--revision", help="of the head")
    parser.add_argument(
        "--cluster",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="also ask every node of a Ray cluster (default: the one that runs here)",
    )
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    parser.add_argument("--explain", action="store_true", help="say why each patch exists and when it can go")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every finding; 1 if any is red."""
    sections = [("Versions", _versions()), ("Plugin", _plugin()), ("Patches", _patches(args.explain))]
    if args.model:
        sections.append((f"Head for {args.model}", _head(args.model, args.head, args.revision)))
    if args.cluster:
        sections.append((f"Nodes of the Ray cluster {args.cluster}", _nodes(args.cluster)))
    told: dict[str, list[Finding]] = {}
    for title, findings in sections:
        if not args.json:
            print(title)
        told[title] = []
        for finding in findings:
            told[title].append(finding)
            if not args.json:
                _print(finding)
    red = any(finding.verdict == "RED" for findings in told.values() for finding in findings)
    if args.json:
        found = {title: [finding._asdict() for finding in findings] for title, findings in told.items()}
        print(json.dumps({"ready": not red, "found": found}, indent=1))
    else:
        print("Something above is red." if red else "Ready to serve.")
    return int(red)


def _print(finding: Finding) -> None:
    print(f"  {finding.verdict:<4}  {finding.subject:<28} {finding.found}")
    if finding.advice:
        print(f"        -> {finding.advice}")


def _versions() -> Iterator[Finding]:
    from vllm_orthrus.patches.versions import SUPPORTED_VLLM, installed_vllm, vllm_is

    yield Finding("ok", "python", sys.version.split()[0])
    vllm = installed_vllm()
    if vllm is None:
        yield Finding("RED", "vllm", "not installed", f"install vLLM {SUPPORTED_VLLM} into this environment")
    elif vllm_is(SUPPORTED_VLLM):
        yield Finding("ok", "vllm", vllm)
    else:
        yield Finding("RED", "vllm", vllm, f"install vLLM {SUPPORTED_VLLM}; with others the plugin does nothing")
    for name in ("vllm-orthrus", "torch", "transformers", "triton"):
        try:
            yield Finding("ok", name, version(name))
        except PackageNotFoundError:
            if name == "triton":
                yield Finding("RED", name, "not installed", "install triton: Model Runner V2 needs it, on CPUs too")
            else:
                yield Finding("RED", name, "not installed", f"install {name} into this environment")


def _plugin() -> Iterator[Finding]:
    for group, purpose in (
        ("vllm.general_plugins", "method 'orthrus'"),
        ("vllm.platform_plugins", "CPU mode"),
    ):
        ours = [entry for entry in entry_points(group=group) if entry.value.startswith("vllm_orthrus.")]
        if len(ours) == 1:
            yield Finding("ok", group, f"{ours[0].name} -> {ours[0].value}")
        elif ours:
            yield Finding("RED", group, f"found {len(ours)} times", "uninstall all copies of vllm-orthrus, install one")
        else:
            yield Finding(
                "RED",
                group,
                "not found",
                f"vLLM cannot discover {purpose}: install vllm-orthrus with pip (a source tree has no entry points)",
            )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "orthrus" not in allowed.split(","):
        yield Finding("RED", "VLLM_PLUGINS", allowed, "add orthrus to the list, or unset the variable")
    forced = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if forced is not None and forced.lower() in ("0", "false"):
        yield Finding("RED", "VLLM_USE_V2_MODEL_RUNNER", forced, "unset it: Orthrus runs on Model Runner V2 only")


def _patches(explain: bool) -> Iterator[Finding]:
    from vllm_orthrus.patches.versions import installed_vllm

    if installed_vllm() is None:
        yield Finding("note", "not checked", "no vLLM to check them against")
        return
    # As in a serving process: vLLM settles its platform, and only then loads general plugins.
    from vllm.platforms import current_platform

    yield Finding("ok", "platform", str(current_platform.device_name or current_platform.device_type))
    from vllm_orthrus.patches import PATCHES, WORKER_PATCHES, State, install, install_in_worker
    from vllm_orthrus.patches.cpu import interpreter_enabled

    if interpreter_enabled():
        from vllm_orthrus.patches.native import recognised

        found = recognised()
        others = [name.partition(":")[2] for name, known in found.items() if not known]
        yield Finding(
            "note",
            "kernels",
            f"{len(found) - len(others)} of {len(found)} of vLLM's run natively",
            "no CPU compiler for Triton here: all others are interpreted, exact but slow"
            + (f"; so are {', '.join(others)}" if others else ""),
        )
    installed = install()
    if installed:
        install_in_worker()
    for patch in (*PATCHES, *WORKER_PATCHES):
        reasons = f"{patch.why} Goes when {patch.remove_when} ({patch.upstream})." if explain else ""
        if patch.state is State.REFUSED:
            yield Finding("RED", patch.state.value, f"{patch.target}: {patch.problem}", "this vLLM is not one of ours")
        elif not installed and patch.state is State.PENDING:
            yield Finding("note", "held back with the others", patch.target, reasons)
        else:
            yield Finding("ok", patch.state.value, patch.target, reasons)


def _head(model: str, head: str | None, revision: str | None) -> Iterator[Finding]:
    from vllm_orthrus.heads import HeadError, find_nonsense, open_head, resolve_head
    from vllm_orthrus.training.reference import read_base_config

    try:
        source = head or resolve_head(model)
    except HeadError as error:
        yield Finding("RED", "head map", "cannot be read", str(error))
        return
    if source is None:
        yield Finding(
            "RED",
            "head",
            "none known",
            "name one with --head and speculative_config['model'], add it to the head map, or train one",
        )
        return
    yield Finding("ok", "head", f"{source}{' (in the model itself)' if source == model else ''}")
    try:
        checkpoint = open_head(source, revision)
        config = checkpoint.config
        warnings = config.check_fits(read_base_config(model), model)
        checkpoint.check_complete()
        nonsense = find_nonsense(checkpoint.tensors())
    except (HeadError, OSError) as error:
        yield Finding("RED", "fit", type(error).__name__, str(error))
        return
    size = sum(Path(path).stat().st_size for path in set(checkpoint.files.values())) / 2**30
    yield Finding("ok", "layout", f"{checkpoint.layout}, {len(checkpoint.files)} tensors in files of {size:.2f} GiB")
    yield Finding("ok", "block", f"{config.block_size} rows, up to {config.num_drafts} drafts")
    if str(nonsense):
        verdict: Verdict = "RED" if nonsense.drafts_nothing else "note"
        yield Finding(verdict, "weights", str(nonsense), "convert or train the head anew")
    for warning in warnings:
        yield Finding("note", "fit", "differs", warning)


def _nodes(address: str) -> Iterator[Finding]:
    from vllm_orthrus.cli.cluster import asked_there, nodes_of

    here = asked_there()()
    for node in nodes_of(address):
        advice = node.differs(here)
        yield Finding("RED" if advice else "ok", node.name, str(node), advice)
