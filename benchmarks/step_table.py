"""What a step takes by the cost model, for docs/one-pass.md: as it is, and with the launches and products there were.
And for docs/heads.md: with a head in bf16, and with one in fp8.

    python -m benchmarks.step_table

Qwen3-8B in bf16, one request, all 15 drafts. Nothing of it was measured on one of these devices.
"""

from collections.abc import Callable, Iterator

from vllm_orthrus.policy.cost import (
    AROUND_DRAFTS,
    Device,
    Forward,
    Mode,
    Model,
    blocks_beside,
    forwards,
    joins,
    launches,
    pairs,
    part_seconds,
    parts,
    projections_seconds,
    step_seconds,
    vocabulary_seconds,
)
from vllm_orthrus.policy.devices import DEVICES

NAMES = ("H200", "H100", "A100", "RTX 4090", "RTX 5090")
CONTEXTS = (1024, 4096, 16384)
PLAIN = Mode(0)
WAYS = {"two passes": Mode(15, 16), "one pass, 64 rows": Mode(15, 16, 4), "one pass, 128 rows": Mode(15, 16, 8)}
# Launches of a layer and of what takes up an outcome with an operator for each norm and each thing learnt.
APART = {"one": (22, 266), "draft": (14, AROUND_DRAFTS)}
MODEL = Model()
# Requests and hypotheses of each: of an engine with default settings, and beyond them.
SIZES = [(count, blocks_beside(count, 192, 16, 16, 4)) for count in (1, 2, 3, 4)] + [(1, 8), (1, 16)]


def seconds_apart(device: Device, mode: Mode, context: float) -> float:
    """Of one request's step with a launch for each operator and a product for each view and each kind of logits."""
    return device.step + sum(forward_apart(device, forward) for forward in forwards(mode, 1, context))


def forward_apart(device: Device, forward: Forward) -> float:
    launched = launches(MODEL, forward)
    if forward.drafted:
        layer, beside = APART["one" if forward.verified else "draft"]
        launched = MODEL.layers * layer + beside
    return sum(part_seconds(device, part) for part in parts(MODEL, forward)) + launched * device.launch


def product_saved(device: Device, mode: Mode, requests: int, context: float) -> float:
    """Seconds of a step that has one product for all its logits, where that is quicker; else nothing."""
    verification = forwards(mode, requests, context)[0]
    if not joins(device, MODEL, verification):
        return 0.0
    apart, joined = (vocabulary_seconds(device, MODEL, verification, way) for way in (False, True))
    return apart - joined


def view_saved(device: Device, mode: Mode, requests: int, context: int) -> float:
    """Seconds of a step that has one product for both views, where that is quicker; else nothing."""
    verification = forwards(mode, requests, context)[0]
    if not pairs(device, MODEL, verification):
        return 0.0
    apart, paired = (projections_seconds(device, MODEL, verification, way) for way in (False, True))
    return apart - paired


def table() -> Iterator[str]:
    yield f"| device | context | plain | {' | '.join(WAYS)} |"
    yield "|---" * (3 + len(WAYS)) + "|"
    for name in NAMES:
        device = DEVICES[name]
        for context in CONTEXTS:
            plain = step_seconds(device, MODEL, PLAIN, 1, context)
            cells = []
            for mode in WAYS.values():
                then, now = seconds_apart(device, mode, context), step_seconds(device, MODEL, mode, 1, context)
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


def of_sizes(saved_by: Callable[[Device, Mode, int, int], float], else_: str, context: int) -> Iterator[str]:
    """With products apart and with one, where that is quicker: milliseconds by device and size."""
    yield f"| device | {' | '.join(f'{count} x (16 + {16 * blocks})' for count, blocks in SIZES)} |"
    yield "|---" * (1 + len(SIZES)) + "|"
    for name in NAMES:
        device, cells = DEVICES[name], []
        for count, blocks in SIZES:
            mode = Mode(15, 16, blocks)
            now, saved = step_seconds(device, MODEL, mode, count, context), saved_by(device, mode, count, context)
            cells.append(f"{1e3 * (now + saved):.2f} → {1e3 * now:.2f}" if saved else f"{1e3 * now:.2f}, {else_}")
        yield f"| {name} | {' | '.join(cells)} |"


def of_products(context: int = 1024) -> Iterator[str]:
    """With a product for each kind of logits, and with one for all where that is quicker."""
    yield from of_sizes(product_saved, "twice", context)


def of_views(context: int = 1024) -> Iterator[str]:
    """With a product for each view, and with one for both where that is quicker."""
    yield from of_sizes(view_saved, "apart", context)


if __name__ == "__main__":
    print("\n".join(table()))
    print("\n" + "\n".join(of_products()))
    print("\n" + "\n".join(of_views()))
    print("\n" + "\n".join(quantized()))
