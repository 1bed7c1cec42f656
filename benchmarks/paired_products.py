"""Is one product for both views as quick on this GPU as the cost model says it is?

    python -m benchmarks.paired_products [--out FILE]

    apart  = two products for queries, keys and values, two for results, each to its part of one tensor
    paired = one of each kind                                      vllm_orthrus/engine/onepass/pairs.py

In the sizes of Qwen3-8B, for as many rows as engines have. First the results of both, and if they differ by more than
bfloat16 rounds, no time is printed and the exit status is 1; then the time of a layer's four or two products in a CUDA
graph of 36 layers, each with weights of its own. Needs vLLM and a GPU; exit status 2: there is none.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from benchmarks.evidence import Evidence, default_path, environment
from benchmarks.gpu_check import seconds_per_launch
from benchmarks.step_table import SIZES
from vllm_orthrus.engine.onepass import joined, pairs
from vllm_orthrus.policy.cost import Device, Forward, Model, launches, projections_seconds
from vllm_orthrus.policy.devices import find_device

DEVICE, HALF = "cuda", torch.bfloat16
MODEL, VERIFIED, BLOCK = Model(), 16, 16
TOLERANCE = 2e-2  # relative to the largest result, of sums of thousands in bfloat16


class Layer(NamedTuple):
    target: Any
    diffusion: Any


@dataclass
class Timed(Evidence):
    sizes: list[dict[str, Any]] = field(default_factory=list)


def make_layer() -> Layer:
    """Both views' projections, with weights side by side."""
    attended = MODEL.heads * MODEL.head_dim
    shapes = {"qkv_proj": (attended + 2 * MODEL.kv_heads * MODEL.head_dim, MODEL.hidden)}
    shapes["o_proj"] = (MODEL.hidden, attended)

    def view() -> Any:
        made = {}
        for name, shape in shapes.items():
            weight = torch.nn.Parameter(torch.randn(shape, dtype=HALF, device=DEVICE) / 64, requires_grad=False)
            made[name] = SimpleNamespace(
                weight=weight, bias=None, quant_method=UnquantizedLinearMethod(), tp_rank=0, tp_size=1,
                output_size=shape[0],
            )  # fmt: skip
        return SimpleNamespace(**made)

    layer = Layer(view(), view())
    target: Any = SimpleNamespace(model=SimpleNamespace(layers=[SimpleNamespace(self_attn=layer.target)]))
    laid: Any = SimpleNamespace(target=target, layers=[layer.diffusion])
    pairs.lay_side_by_side(laid)
    return layer


def products(layer: Layer, hidden: Tensor, verified: int, pair: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Projections of both views, and results of rows that attended to nothing but their queries."""
    width = layer.target.o_proj.weight.shape[1]
    weights = pairs.side_by_side(layer.target.qkv_proj, layer.diffusion.qkv_proj)
    if pair and weights is not None:
        rows, fresh = pairs.project(hidden, verified, weights)
    else:
        rows = linear(hidden[:verified], layer.target.qkv_proj.weight)
        fresh = linear(hidden[verified:], layer.diffusion.qkv_proj.weight)
    seen: Any = (rows[:, :width],), (fresh[:, :width],)
    attended = joined.Attended(layer.target, layer.diffusion, *seen, pair)
    return rows, fresh, attended.results()


def check(layer: Layer, hidden: Tensor, verified: int) -> float:
    """The largest difference, relative to the largest value."""
    width = layer.target.o_proj.weight.shape[1]
    worst = 0.0
    kinds = [products(layer, hidden, verified, pair)[:2] for pair in (False, True)]
    given = [part[:, :width].contiguous() for part in kinds[0]]
    weights = pairs.side_by_side(layer.target.o_proj, layer.diffusion.o_proj)
    assert weights is not None, "the weights do not lie side by side"
    room = pairs.Room(given[0], *map(len, given))
    room.verified.copy_(given[0])
    room.drafted.copy_(given[1])
    results = joined.results(layer.target, layer.diffusion, *given), room.results(weights)
    for one, other in (*zip(*kinds, strict=True), results):
        worst = max(worst, float((one.float() - other.float()).abs().max() / one.float().abs().max()))
    return worst


def seconds(layers: list[Layer], hidden: Tensor, verified: int, pair: bool) -> float:
    """Of the products of a layer."""

    def launch(layer: Layer) -> Callable[[], Any]:
        return lambda: products(layer, hidden, verified, pair)

    return seconds_per_launch([launch(layer) for layer in layers])


def foretold(device: Device, forward: Forward, pair: bool) -> float:
    """By the cost model, launches included."""
    four = (launches(MODEL, forward) - launches(MODEL, forward, paired=True)) * 2 * device.launch
    return (projections_seconds(device, MODEL, forward, pair) + four) / MODEL.layers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/evidence/paired_products-GPU.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("paired_products needs a GPU that this PyTorch can use, and found none; nothing was measured.")
        return 2
    facts = environment()
    device = find_device(facts["gpu"])
    evidence = Timed(options.out or default_path("paired_products", facts["gpu"]), facts)
    layers = [make_layer() for _ in range(MODEL.layers)]
    print("microseconds of a layer's products: apart, paired; by the cost model")
    for count, blocks in SIZES:
        verified, drafted = count * VERIFIED, count * blocks * BLOCK
        hidden = torch.randn(verified + drafted, MODEL.hidden, dtype=HALF, device=DEVICE)
        difference = check(layers[0], hidden, verified)
        found: dict[str, Any] = {"verified": verified, "drafted": drafted, "difference": difference}
        evidence.sizes.append(found)
        if difference > TOLERANCE:
            evidence.write()
            print(f"RED  {verified} + {drafted} rows: results differ by {difference:.1e}; no time is taken.")
            return 1
        forward = Forward(count, 0, VERIFIED, blocks * BLOCK, VERIFIED)
        for name, pair in (("apart", False), ("paired", True)):
            found[name] = seconds(layers, hidden, verified, pair)
            found[f"{name}_foretold"] = foretold(device, forward, pair)
        evidence.write()
        times = [1e6 * found[name] for name in ("apart", "paired", "apart_foretold", "paired_foretold")]
        print("{} + {} rows: {:.1f}, {:.1f}; {:.1f}, {:.1f}".format(verified, drafted, *times))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
