"""What would be accepted wherever a draft might begin: the text that modes are simulated on.

    python -m benchmarks.traces [--per-class 20] [--out FILE]

For every place of greedy answers to held-out prompts, how many drafts of a pass of its own the text that follows
accepts, up to 15, as a hexadecimal digit. For one pass, by the number of hypotheses: how often one had foreseen the
outcome, and what was accepted where none had. By the reference model, which the engine's tests are held to.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.evidence import FOLDER, ROOT, Evidence, environment
from vllm_orthrus.training.evaluate import first_per_class, read_prompts
from vllm_orthrus.training.reference import Cache, Reference
from vllm_orthrus.training.simulator import OnePass

TINY = ROOT / "examples" / "tiny-orthrus"
FILE = FOLDER / "traces-tiny-orthrus.json"
HYPOTHESES = (1, 2, 3, 4, 6, 8)
LENGTH = 128


@dataclass
class Traces(Evidence):
    text: dict[str, Any] = field(default_factory=dict)  # by class


@torch.inference_mode()
def accepted_alone(reference: Reference, prompt: list[int], answer: list[int]) -> str:
    """At each place of the answer that has a whole block behind it."""
    text, drafts = torch.tensor([*prompt, *answer]), reference.config.num_drafts
    cache = reference.new_cache(1, len(text))
    reference.autoregressive(text[None], torch.arange(len(text))[None], cache)
    places = torch.arange(len(prompt), len(text) - drafts)
    several = Cache(*([layer.expand(len(places), -1, -1, -1) for layer in side] for side in cache))
    hidden = reference.diffusion(text[places], places, several)
    drafted = reference.logits(hidden)[:, :drafts].argmax(-1)
    follows = text[places[:, None] + 1 + torch.arange(drafts)]
    kept = (drafted == follows).long().cumprod(1).sum(1)
    return "".join(f"{min(15, count):x}" for count in kept.tolist())


def riding(reference: Reference, prompts: list[list[int]], hypotheses: int, stop: list[int]) -> dict[str, Any]:
    runs = OnePass(reference, hypotheses).generate(prompts, LENGTH, stop)
    steps = [step for run in runs for step in run.steps]
    tails = [step.accepted for step in steps if step.offset]
    return {
        "hits": sum(step.hit for step in steps) / len(steps),
        "tails": "".join(f"{min(15, accepted):x}" for accepted in tails),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    prompts = first_per_class(read_prompts(TINY / "heldout.jsonl", tokenizer), args.per_class)
    reference = Reference.from_pretrained(TINY / "base", TINY / "head", torch.float32, "cpu")
    found = Traces(args.out, environment() | {"asked": f"--per-class {args.per_class}"})
    for kind in tqdm(list(dict.fromkeys(prompt.kind for prompt in prompts)), desc="classes"):
        mine = [prompt.tokens for prompt in prompts if prompt.kind == kind]
        answers = reference.generate(mine, LENGTH, stop=[])
        found.text[kind] = {
            "alone": [
                accepted_alone(reference, prompt, answer.tokens) for prompt, answer in zip(mine, answers, strict=True)
            ],
            "riding": {str(number): riding(reference, mine, number, []) for number in HYPOTHESES},
        }
    found.write()


if __name__ == "__main__":
    main()
