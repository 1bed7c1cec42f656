"""Write docs/settings.md and docs/patches.md from the code that they are about.

    python scripts/reference_pages.py [--check]

--check only says whether they are as they would be written.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CONFIG = ROOT / "vllm_orthrus" / "engine" / "config.py"

SETTINGS = """# Settings

Made by `make reference` from `vllm_orthrus/engine/config.py`; don't edit. All of them stand in `speculative_config`:

    vllm serve Qwen/Qwen3-8B \\
        --speculative-config '{"method": "orthrus", "orthrus_hypotheses": 2}'

or in the `--spec-*` flags. Everything else in it is refused at start, other methods' settings included: what is written
holds, or is an error.

"""
VLLMS = """## vLLM's own

Of vLLM's settings for drafters these mean something here; all others are refused at start, with the reason.

"""
VLLMS_MEAN = {
    "model": "The head: a repository or a folder, merged or head-only. Unset, it is found by the target's name.",
    "revision": "Of the head's repository. All workers open the commit that it named at the start.",
    "num_speculative_tokens": "The most drafts of a step. Unset, 15, or fewer if the head's block is smaller.",
    "draft_sample_method": "`greedy` or `probabilistic`, which accepts more at temperatures above zero.",
    "rejection_sample_method": "How drafts are judged, as everywhere in vLLM: `standard` and `block` are lossless. "
    "LOSSY: `fly` (vLLM 0.33, with its `fly_` settings), and `synthetic`, which is for measurements.",
    "num_speculative_tokens_per_batch_size": "Fewer drafts, or none, for large batches: vLLM's own table, in place of "
    "`orthrus_modes`.",
    "draft_load_config": "How the head is loaded, where that is not as the target is.",
    "draft_tensor_parallel_size": "That of the target, or unset.",
    "use_local_argmax_reduction": "Each rank finds the likeliest of its own tokens; greedy drafts only.",
    "synthetic_acceptance_rates": "For measurements: acceptance that is made up.",
    "synthetic_acceptance_length": "For measurements: acceptance that is made up.",
    "enable_adaptive_verification": "vLLM's choice of how many drafts to verify.",
}
VARIABLES = """
## Environment

| | |
|---|---|
| `VLLM_ORTHRUS_KERNELS` | `torch`: our kernels' PyTorch twins run in their place, on any device. `triton`: \
the kernels, even where they are only interpreted. Unset: what suits. For tests, and to tell whether a kernel is wrong |
| `VLLM_ORTHRUS_HEADS` | where the map of heads by their base's name lies; unset, `vllm-orthrus/heads.json` in \
`$XDG_CONFIG_HOME`, or in `~/.config` |
"""


def settings_page() -> str:
    tree = ast.parse(CONFIG.read_text())
    found = next(
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "OrthrusSpeculativeConfig"
    )
    told_of = []
    for field, told in zip(found.body, found.body[1:], strict=False):
        if not (
            isinstance(field, ast.AnnAssign) and isinstance(told, ast.Expr) and isinstance(told.value, ast.Constant)
        ):
            continue
        default = _default(field.value)
        if default is None:  # filled in, not set
            continue
        told_of.append(
            (ast.unparse(field.target), ast.unparse(field.annotation), default, " ".join(str(told.value.value).split()))
        )
    rows = [(f"[`{name}`](#{name})", default, _first_sentence(text)) for name, _, default, text in told_of]
    page = SETTINGS + _table(rows, ("setting", "default", "")) + "\n"
    for name, kind, default, text in told_of:
        page += f"## {name}\n\n`{kind}`, by default {default}. {text}\n\n"
    return page + VLLMS + _table([(f"`{name}`", meaning) for name, meaning in VLLMS_MEAN.items()]) + VARIABLES


def _default(value: ast.expr | None) -> str | None:
    """With its bounds. None: nobody may set it."""
    if not isinstance(value, ast.Call):
        return f"`{ast.unparse(value)}`" if value is not None else None
    named = {word.arg: ast.unparse(word.value) for word in value.keywords}
    if named.get("init") == "False":
        return None
    bounds = [f"{sign} {named[name]}" for name, sign in (("ge", "at least"), ("le", "at most")) if name in named]
    return ", ".join([f"`{named['default']}`", *bounds])


def patches_page() -> str:
    from vllm_orthrus.patches import PATCHES, WORKER_PATCHES

    page = """# Patches

Made by `make reference` from `vllm_orthrus/patches/`; don't edit. This is everything that the plugin changes in vLLM.
Each checks first that its target is the one it was written for, and one that does not know it stops them all:
`vllm-orthrus doctor --explain` shows that for the vLLM at hand.

"""
    for title, patches in (("In every process", PATCHES), ("In workers that draft", WORKER_PATCHES)):
        page += f"## {title}\n\n"
        for patch in patches:
            page += f"### `{patch.target}`\n\n{_sentence(patch.why)}\n\n"
            page += f"- Upstream: {_sentence(patch.upstream)}\n- Goes when {_sentence(patch.remove_when)}\n\n"
    return page.rstrip() + "\n"


def _sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def _first_sentence(text: str) -> str:
    """With those behind it, where it is a word alone or tells of one value after the other."""
    first, *others = re.split(r"(?<=\.) (?=[A-Z\"])", text)
    while others and (" " not in first or (text.startswith('"') and others[0].startswith('"'))):
        first += f" {others.pop(0)}"
    return first


def _table(rows: list[tuple[Any, ...]], head: tuple[str, ...] = ("", "")) -> str:
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in [head, ("---",) * len(head), *rows])


def main() -> int:
    stale = []
    for name, page in (("settings.md", settings_page()), ("patches.md", patches_page())):
        path = DOCS / name
        if path.exists() and path.read_text() == page:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            path.write_text(page)
    if stale and "--check" in sys.argv:
        print(f"not as the code has it: {', '.join(stale)}. Run `make reference`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
