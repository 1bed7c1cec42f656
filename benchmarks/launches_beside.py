"""What a decoding step launches: plain, with drafts of ours, and with vLLM's own DFlash and EAGLE-3 drafters.

    PYTHONPATH=.venv/vllm-0.33 python -m benchmarks.launches_beside [--out FILE]

Random models, and engines on a CPU, counted by the rule of tests/rehearsal/launch_count.py. Drafters of one and two
layers with two and four drafts give the formula

    launches of drafting = fixed + layer x layers + (drafts - 1) x (draft + draft layer x layers)

and one of three layers with five drafts checks it. What the attention backend prepares for a forward (its metadata) is
left out: the CPU's is no GPU's. In graphs: what vLLM's managers of the drafters capture where the attention backend
supports it, and what ours do. Exit status 1: a formula doesn't hold. Two minutes of one core.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.evidence import FOLDER, Evidence, environment

FITTED, CHECKED = ((1, 2), (2, 2), (1, 4), (2, 4)), (3, 5)  # layers of the drafter, drafts
TARGET_LAYERS = 8  # the fewest of which both take features of different ones
QWEN3_8B = 36
USUAL = {"DFlash": (5, 15), "EAGLE-3": (1, 5)}  # of heads published for it
METHODS = {"DFlash": "dflash", "EAGLE-3": "eagle3"}
# What vLLM's managers capture, where batches of decoding requests have graphs, and what of it is captured elsewhere.
CAPTURED = {
    "DFlash": ("_store_hidden_states", "_precompute_context_kv", "_generate_draft"),
    "EAGLE-3": ("_prefill", "_multi_step_decode"),
}
STAGED = {"DFlash": 1, "EAGLE-3": 0}  # of these: features are put side by side where the graph finds them
OURS = ("one pass", "one pass, fused", "two passes")


@dataclass
class Found(Evidence):
    plain: dict[str, int] = field(default_factory=dict)
    ours: dict[str, dict[str, int]] = field(default_factory=dict)
    theirs: dict[str, dict[str, Any]] = field(default_factory=dict)
    qwen3_8b: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Formula(NamedTuple):
    fixed: int
    layer: int
    draft: int
    draft_layer: int

    def at(self, layers: int, drafts: int) -> int:
        return self.fixed + self.layer * layers + (drafts - 1) * (self.draft + self.draft_layer * layers)


def formula_of(counted: Mapping[tuple[int, int], int]) -> Formula:
    """Of the four points in FITTED."""
    by_drafts = {}
    for drafts in (2, 4):
        layer = counted[2, drafts] - counted[1, drafts]
        by_drafts[drafts] = (counted[1, drafts] - layer, layer)
    draft, draft_layer = (_whole(4 - 2, most - few) for few, most in zip(by_drafts[2], by_drafts[4], strict=True))
    fixed, layer = by_drafts[2]
    return Formula(fixed - draft, layer - draft_layer, draft, draft_layer)


def _whole(steps: int, launches: int) -> int:
    each, rest = divmod(launches, steps)
    if rest:
        raise ValueError(f"{launches} launches for {steps} more drafts: not as many for each of them")
    return each


def plain_forward(base: Path) -> dict[str, int]:
    from tests.engine.harness import Engine
    from tests.rehearsal.launch_count import LaunchCount

    engine = Engine(base, max_num_seqs=3)
    with pytest.MonkeyPatch.context() as patch:
        counted = LaunchCount(engine.runner.model)
        counted.note(patch, engine.runner.model, "forward")
        run(engine, counted, patch)
    engine.close()
    return forwards(counted)


def run(engine: Any, counted: Any, patch: pytest.MonkeyPatch) -> None:
    """Two requests, from their prompts on, in an engine that has launched before all that others may."""
    from tests.engine.harness import prompts

    engine.run(prompts(1), 4)
    for parts in counted.parts.values():
        parts.clear()
    with counted.counting(patch):
        engine.run(prompts(2, shortest=7), 8)


def forwards(counted: Any) -> dict[str, int]:
    """Of the target, behind the one that reads the prompts."""
    from tests.rehearsal.counted_steps import same

    some = counted.parts["forward"][1:]
    layer = min(n for part in some for n in part.layers)  # others hand a drafter what they have, which is no layer's
    return {"layer": layer, "besides": same(len(part.launches) - layer * len(part.layers) for part in some)}


def drafting(name: str, base: Path, drafter: Path, drafts: int) -> dict[str, Any]:
    from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

    from tests.engine.harness import Engine
    from tests.rehearsal.counted_steps import same
    from tests.rehearsal.launch_count import LaunchCount

    asked = {"method": METHODS[name], "model": str(drafter), "num_speculative_tokens": drafts}
    engine = Engine(base, asked, max_num_seqs=3)
    speculator = engine.runner.speculator
    counted = LaunchCount(engine.runner.model, speculator.model)
    with pytest.MonkeyPatch.context() as patch:
        counted.leave_out(patch, DraftModelSpeculator, "_build_attn_metadata")
        counted.note(patch, engine.runner.model, "forward")
        for part in ("propose", "_run_model", *CAPTURED[name]):
            counted.note(patch, speculator, part)
        propose = speculator.propose

        def with_lengths_known(batch: Any, *args: Any, **kwargs: Any) -> Any:
            counted.of_host.append(batch.seq_lens_cpu_upper_bound)
            return propose(batch, *args, **kwargs)

        patch.setattr(speculator, "propose", with_lengths_known)
        run(engine, counted, patch)
    engine.close()
    # The first is behind the prompts, and the last, of a step that ends them all, drafts nothing.
    steps = counted.parts["propose"][1:-1]
    captured = sum(
        same(len(one.launches) for one in counted.parts[part][1 : 1 + len(steps)]) for part in CAPTURED[name]
    )
    return {
        "drafts": drafts,
        "target": forwards(counted),
        "launches": same(len(step.launches) for step in steps),
        "in_graphs": captured - STAGED[name],
        "layers_of_a_pass": same(tuple(one.layers) for one in counted.parts["_run_model"]),
        "names": dict(Counter(steps[0].launches)),
    }


def ours(kind: int, base: Path, head: Path) -> dict[str, int]:
    from tests.engine.harness import Engine, prompts
    from tests.rehearsal.counted_steps import count, settings

    engine = Engine(base, settings(kind, head), max_num_seqs=3)
    engine.run(prompts(1), 2)
    with pytest.MonkeyPatch.context() as patch:
        found = count(engine, patch)
    engine.close()
    return found


def theirs(name: str, base: Path, folder: Path, write: Callable[[Path, int], Path]) -> dict[str, Any]:
    points: dict[tuple[int, int], dict[str, Any]] = {}
    for layers, drafts in (*FITTED, CHECKED):
        drafter = folder / f"{METHODS[name]}-{layers}"
        if not drafter.exists():
            write(drafter, layers)
        points[layers, drafts] = drafting(name, base, drafter, drafts)
    found: dict[str, Any] = {"points": [{"layers": layers} | one for (layers, _), one in points.items()]}
    for what in ("launches", "in_graphs"):
        formula = formula_of({point: points[point][what] for point in FITTED})
        found[what] = formula._asdict() | {"holds": formula.at(*CHECKED) == points[CHECKED][what]}
    return found


def qwen3_8b(found: Found) -> list[dict[str, Any]]:
    """Launches of a step, without vLLM's preparation, product for logits and sampling, which are the same in all."""
    from tests.rehearsal import counted_steps as part

    plain = QWEN3_8B * found.plain["layer"] + found.plain["besides"]
    rows: list[dict[str, Any]] = [{"way": "plain", "forward": plain, "drafting": 0, "in_graphs": plain}]
    for way, counted in found.ours.items():
        if way == "two passes":
            itself = QWEN3_8B * counted[part.DRAFT_LAYER] + counted[part.DRAFT_REST]
            forward, drafts, captured = plain, itself + counted[part.AROUND], plain + itself
        else:
            forward = QWEN3_8B * counted[part.LAYER] + counted[part.REST]
            drafts = sum(counted[what] for what in (part.BEFORE, part.LOGITS, part.OUTCOME, part.BESIDE_OUTCOME))
            captured = forward + counted[part.OUTCOME]
        rows.append({"way": way, "drafts": 15, "forward": forward, "drafting": drafts, "in_graphs": captured})
    for name, counted in found.theirs.items():
        target = counted["points"][0]["target"]
        forward = QWEN3_8B * target["layer"] + target["besides"]
        layers, drafts = USUAL[name]
        total, captured = (
            Formula(*(counted[what][part] for part in Formula._fields)).at(layers, drafts)
            for what in ("launches", "in_graphs")
        )
        row = {"way": name, "layers": layers, "drafts": drafts, "forward": forward, "drafting": total}
        rows.append(row | {"in_graphs": forward + captured})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=FOLDER / "launches-beside.json")
    args = parser.parse_args()
    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "HF_HUB_OFFLINE": "1"}
    from tests.engine import checkpoints
    from tests.engine.conftest import Checkpoints
    from tests.engine.drafters import write_dflash, write_eagle3
    from tests.rehearsal.counted_steps import as_on_a_gpu

    found = Found(args.out, environment())
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        folder = Path(temporary)
        as_on_a_gpu(patch)
        mine = Checkpoints(folder)
        for kind, way in enumerate(OURS):
            found.ours[way] = ours(kind, mine.base, mine.block_head)
            found.write()
        patch.setitem(checkpoints.CONFIG, "num_hidden_layers", TARGET_LAYERS)
        base = checkpoints.write_base(folder / "deeper")
        found.plain = plain_forward(base)
        for name, write in (("DFlash", write_dflash), ("EAGLE-3", write_eagle3)):
            found.theirs[name] = theirs(name, base, folder, write)
            found.write()
    found.qwen3_8b = qwen3_8b(found)
    found.wrong = [
        f"{name}: {what}"
        for name, one in found.theirs.items()
        for what in ("launches", "in_graphs")
        if not one[what]["holds"]
    ]
    found.write()
    print(json.dumps(found.qwen3_8b, indent=1))
    return int(bool(found.wrong))


if __name__ == "__main__":
    sys.exit(main())
