"""What a step takes by the cost model, for docs/one-pass.md: as it is, and with the launches and products there were.
And for docs/heads.md: with a head in bf16, and with one in fp8.

    python -m benchmarks.step_table

Qwen3-8B in bf16, one request, all 15 drafts. Nothing of it was measured on one of these devices.
"""

from collections.abc import Iterator

from vllm_orthrus.policy import cost
from vllm_orthrus.policy.cost import (
    Device,
    Mode,
    Model,
    blocks_beside,
    forwards,
    joins,
    step_seconds,
    vocabulary_seconds,
)
from vllm_orthrus.policy.devices import DEVICES

NAMES = ("H200", "H100", "A100", "RTX 4090", "RTX 5090")
CONTEXTS = (1024, 4096, 16384)
PLAIN = Mode(0)
WAYS = {"two passes": Mode(15, 16), "one pass, 64 rows": Mode(15, 16, 4), "one pass, 128 rows": Mode(15, 16, 8)}
# Launches of a layer and of what takes up an outcome when norms, rotation, matching and learning were single operators.
APART = {"one": (22, 266), "draft": (14, 0)}
MODEL = Model()


def launches_saved(mode: Mode) -> int:
    """In a step."""
    layer, outcome = APART["one" if mode.hypotheses else "draft"]
    if mode.hypotheses:
        return MODEL.layers * (layer - cost.ONE_PASS_LAYER) + outcome - cost.OUTCOME
    return MODEL.layers * (layer - cost.DRAFT_LAYER)


def product_saved(device: Device, mode: Mode, requests: int, context: float) -> float:
    """Seconds of a step that has one product for all its logits, where that is quicker; else nothing."""
    verification = forwards(mode, requests, context)[0]
    if not joins(device, MODEL, verification):
        return 0.0
    apart, joined = (vocabulary_seconds(device, MODEL, verification, way) for way in (False, True))
    return apart - joined


def table() -> Iterator[str]:
    yield f"| device | context | plain | {' | '.join(WAYS)} |"
    yield "|---" * (3 + len(WAYS)) + "|"
    for name in NAMES:
        device = DEVICES[name]
        for context in CONTEXTS:
            plain = step_seconds(device, MODEL, PLAIN, 1, context)
            cells = []
            for mode in WAYS.values():
                now = step_seconds(device, MODEL, mode, 1, context)
                then = now + launches_saved(mode) * device.launch + product_saved(device, mode, 1, context)
                cells.append(f"{1e3 * then:.2f} → {1e3 * now:.2f}, {now / plain:.2f}x")
            yield f"| {name} | {context // 1024}K | {1e3 * plain:.2f} | {' | '.join(cells)} |"


def quantized() -> Iterator[str]:
    yield f"| device | context | {' | '.join(WAYS)} |"
    yield "|---" * (2 + len(WAYS)) + "|"
    for name in NAMES:
        for context in CONTEXTS:
            cells = []
            for mode in WAYS.values():
                before, after = (
                    step_seconds(DEVICES[name], MODEL._replace(head_weight_bytes=size), mode, 1, context)
                    for size in (2, 1)
                )
                cells.append(f"{1e3 * before:.2f} → {1e3 * after:.2f}, {1 - after / before:.1%} less")
            yield f"| {name} | {context // 1024}K | {' | '.join(cells)} |"


def of_products(context: int = 1024) -> Iterator[str]:
    """By requests of an engine with default settings, and by hypotheses of one request beyond them."""
    modes = [(count, blocks_beside(count, 192, 16, 16, 4)) for count in (1, 2, 3, 4)] + [(1, 8), (1, 16)]
    yield f"| device | {' | '.join(f'{count} x (16 + {16 * blocks})' for count, blocks in modes)} |"
    yield "|---" * (1 + len(modes)) + "|"
    for name in NAMES:
        device, cells = DEVICES[name], []
        for count, blocks in modes:
            mode = Mode(15, 16, blocks)
            now, saved = step_seconds(device, MODEL, mode, count, context), product_saved(device, mode, count, context)
            cells.append(f"{1e3 * (now + saved):.2f} → {1e3 * now:.2f}" if saved else f"{1e3 * now:.2f}, twice")
        yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(table()))
    print("\n" + "\n".join(of_products()))
    print("\n" + "\n".join(quantized()))
