"""What drafting would gain on a device, before anybody has it: by the roofline, and by how text is accepted.

    tokens of a step with K drafts = 1 + p + ... + p^K         p such that a published head's cycles have their length
    gain = tokens * seconds(plain) / seconds(mode)

One chance for all places is rough: drafts that begin well go on well. Published lengths are of greedy text.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm_orthrus.policy.cost import Device, Mode, Model, blocks_beside, step_seconds

PUBLISHED_DRAFTS = 31  # of a cycle, in what was published

# Tokens per cycle, the bonus included, of the released heads.
PUBLISHED = {
    "Qwen3-8B": {"MATH-500": 12.7, "GSM8K": 10.6, "AIME25": 10.5, "MBPP": 7.9},
    "Qwen3-4B": {"GSM8K": 9.95, "MT-Bench": 3.84},
    "Qwen3-1.7B": {"math": 8.13, "GSM8K": 7.75, "code": 3.26, "QA": 2.0, "poetry": 1.6},
}

# Of the drafts that a pass of its own would have given, those that one pass keeps, by hypotheses: the tiny trained
# model's, all classes, greedy (docs/one-pass.md).
RIDING = {1: 0.55, 2: 0.62, 3: 0.66, 4: 0.70, 6: 0.74, 8: 0.77}


class Choice(NamedTuple):
    mode: Mode
    gain: float  # times plain decoding


def chance_of(tokens_per_cycle: float, drafts: int = PUBLISHED_DRAFTS) -> float:
    """Of a draft whose predecessors were kept."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, drafts) < tokens_per_cycle else (low, middle)
    return low


def expected_tokens(chance: float, drafts: int) -> float:
    return sum(chance**place for place in range(drafts + 1))


# Of an engine with default settings.
DRAFTS, BLOCK, HYPOTHESES, ROWS = 15, 16, 4, 192


def one_pass(requests: int) -> Mode:
    """Two passes, where there is no room."""
    return Mode(DRAFTS, BLOCK, blocks_beside(requests, ROWS, DRAFTS + 1, BLOCK, HYPOTHESES))


def modes_for(requests: int) -> list[Mode]:
    two = [Mode(0), *(Mode(few, few) for few in (DRAFTS // 4, DRAFTS // 2)), Mode(DRAFTS, BLOCK)]
    riding = one_pass(requests)
    return [*two, riding] if riding.hypotheses else two


def choices(device: Device, model: Model, chance: float, requests: int, context: float) -> list[Choice]:
    """The best first."""
    plain = step_seconds(device, model, Mode(0), requests, context)
    found = []
    for mode in modes_for(requests):
        kept = expected_tokens(chance, mode.drafts) - 1
        tokens = 1 + kept * (RIDING[mode.hypotheses] if mode.hypotheses else 1)
        found.append(Choice(mode, tokens * plain / step_seconds(device, model, mode, requests, context)))
    return sorted(found, key=lambda choice: -choice.gain)


def fits(device: Device, model: Model, requests: int, context: float, share: float = 0.9) -> bool:
    """share: of the device's memory, as vLLM takes it."""
    return model.resident_bytes + requests * context * model.bytes_per_position <= share * device.capacity
