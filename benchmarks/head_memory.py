"""What a head keeps beside its base: alone, in a merged checkpoint, and if that were a draft model of its own.

    python -m benchmarks.head_memory [--out FILE]

Engines with the random model of the tests: bytes of all memory that parameters of target and drafter lie in, each piece
counted once, and layers that have a cache. Then Qwen3 by the shapes of its tensors. vLLM's own method `draft_model`
loads the merged checkpoint's base a second time and leaves its head out; a drafter of its own would have that as well.
Exit status 1: ours keeps more than the head's tensors, or has a cache. A minute of one core.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.evidence import FOLDER, Evidence, environment
from vllm_orthrus.heads import BaseShape, expected_tensors
from vllm_orthrus.heads.widen import shape_like

PLAIN, ALONE = "plain", "head alone"
MERGED, SERVED = "merged checkpoint as the head", "merged checkpoint served, its own head"
AGAIN = "merged checkpoint as a `draft_model`"
BYTES = 2  # of a weight in bf16
TIED = {"Qwen3-1.7B": True, "Qwen3-4B": True, "Qwen3-8B": False}  # one matrix embeds and gives logits


@dataclass
class Found(Evidence):
    head_bytes: int = 0  # of the random head's tensors
    engines: dict[str, dict[str, int]] = field(default_factory=dict)
    qwen3: dict[str, dict[str, int]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def weights(*models: Any) -> int:
    """Bytes of the memory that their parameters lie in, whoever else's lie there."""
    pieces = [parameter.untyped_storage() for model in models for parameter in model.parameters()]
    return sum({piece.data_ptr(): piece.nbytes() for piece in pieces}.values())


def kept(base: Path, speculative: dict[str, Any] | None) -> dict[str, int]:
    from tests.engine.harness import Engine, prompts

    engine = Engine(base, speculative)
    engine.run(prompts(2), 8)
    runner = engine.runner
    models = [runner.model] if speculative is None else [runner.model, runner.speculator.model]
    found = {"weights": weights(*models), "layers_with_a_cache": len(runner.kv_caches)}
    engine.close()
    return found


def by_shapes(name: str) -> dict[str, int]:
    """Of the base as Transformers builds it, and of a head as one is checked."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    shape = shape_like(name, {"model_type": "qwen3", "tie_word_embeddings": TIED[name]})
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(Qwen3Config(**shape))
    values = BYTES * sum(parameter.numel() for parameter in base.parameters())
    head = BYTES * sum(map(math.prod, expected_tensors(BaseShape.from_config(shape)).values()))
    layers, heads, dim = (shape[one] for one in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    return {"base": values, "head": head, "again": values + head, "cache_per_token": BYTES * 2 * layers * heads * dim}


def wrong(found: Found) -> list[str]:
    plain = found.engines[PLAIN]
    right = {"weights": plain["weights"] + found.head_bytes, "layers_with_a_cache": plain["layers_with_a_cache"]}
    ours = {way: found.engines[way] for way in (ALONE, MERGED, SERVED)}
    return [f"{way}: {one}, not {right}" for way, one in ours.items() if one != right]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=FOLDER / "head-memory.json")
    args = parser.parse_args()
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from tests.engine.checkpoints import base_tensors, head_tensors
    from tests.engine.conftest import Checkpoints
    from tests.rehearsal.counted_steps import as_on_a_gpu

    found = Found(args.out, environment())
    found.head_bytes = sum(tensor.nbytes for tensor in head_tensors(base_tensors()).values())
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        as_on_a_gpu(patch)  # a CPU keeps its products' weights in a form of their own
        tiny = Checkpoints(Path(folder))
        asked: dict[str, tuple[Path, dict[str, Any] | None]] = {
            PLAIN: (tiny.base, None),
            ALONE: (tiny.base, {"method": "orthrus", "model": str(tiny.block_head)}),
            MERGED: (tiny.base, {"method": "orthrus", "model": str(tiny.merged)}),
            SERVED: (tiny.merged, {"method": "orthrus"}),
            AGAIN: (tiny.base, {"method": "draft_model", "model": str(tiny.merged), "num_speculative_tokens": 4}),
        }
        for way, (base, speculative) in asked.items():
            found.engines[way] = kept(base, speculative)
            found.write()
    found.qwen3 = {name: by_shapes(name) for name in TIED}
    found.wrong = wrong(found)
    found.write()
    print(json.dumps({"engines": found.engines, "qwen3": found.qwen3, "wrong": found.wrong}, indent=1))
    return int(bool(found.wrong))


if __name__ == "__main__":
    sys.exit(main())
