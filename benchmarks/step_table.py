"""What a step takes by the cost model, for docs/one-pass.md: with the launches there are, and with those there were.
And for docs/heads.md: with a head in bf16, and with one in fp8.

    python -m benchmarks.step_table

Qwen3-8B in bf16, one request, all 15 drafts. Nothing of it was measured on one of these devices.
"""

from collections.abc import Iterator

from vllm_orthrus.policy import cost
from vllm_orthrus.policy.cost import Mode, Model, step_seconds
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
                then = now + launches_saved(mode) * device.launch
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


if __name__ == "__main__":
    print("\n".join(table()))
    print("\n".join(quantized()))
