"""`vllm-orthrus plan`: what drafting would gain on hardware that is not at hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    plan = subparsers.add_parser("plan", help="by the roofline: best mode, gain over plain decoding, and memory")
    plan.add_argument("--base", required=True, help="a folder, or the name of a Qwen3 model")
    plan.add_argument("--device", nargs="+", default=["H200"], help="by name: H200, H100, A100, 'RTX 4090', ...")
    plan.add_argument("--context", type=int, nargs="+", default=[2048, 16384])
    plan.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    plan.add_argument("--tensor-parallel-size", type=int, default=1)
    plan.add_argument("--head-quantization", choices=("fp8",), help="of the head's projections")
    plan.add_argument(
        "--tokens-per-cycle", type=float, nargs="+", help="measured ones, with 15 drafts, instead of what was published"
    )
    plan.add_argument("--json", type=Path, help="write the figures to this file, too")
    plan.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from vllm_orthrus.policy.devices import find_device
    from vllm_orthrus.policy.plan import PUBLISHED, chance_of, choices, fits

    name, model = _model(options.base)
    model = model.share(_ranks(options, model))
    if options.head_quantization:
        model = model._replace(head_weight_bytes=1)
    if options.tokens_per_cycle:
        _positive(options.tokens_per_cycle)
        texts = {f"{tokens:g} a cycle": chance_of(tokens, 15) for tokens in options.tokens_per_cycle}
    else:
        published = PUBLISHED.get(name, PUBLISHED["Qwen3-8B"])
        texts = {kind: chance_of(tokens) for kind, tokens in published.items()}
    form = (
        f"base in bf16 and head in {options.head_quantization}"
        if options.head_quantization
        else "base and head in bf16"
    )
    print(f"{name}, {form}, by the roofline: estimated, nothing was run.")
    if not options.tokens_per_cycle:
        of = name if name in PUBLISHED else "Qwen3-8B, for want of figures for this one"
        print(f"Acceptance as published for {of}.")
    found = []
    for device in map(find_device, options.device):
        room = max(0.0, 0.9 * device.capacity - model.resident_bytes) / model.bytes_per_position
        print(
            f"\n{device.name}: {model.resident_bytes / 1e9:.1f} GB of weights a rank, and room for {room / 1e3:,.0f}K "
            f"tokens of cache\n{'context':>9}{'requests':>10}  " + "".join(f"{kind:<30}" for kind in texts)
        )
        for context in options.context:
            for requests in options.concurrency:
                if not fits(device, model, requests, context):
                    print(f"{context:>9}{requests:>10}  does not fit")
                    continue
                best = {kind: choices(device, model, chance, requests, context)[0] for kind, chance in texts.items()}
                cells = (f"{one.gain:.2f}x {_said(one.mode)}" for one in best.values())
                print(f"{context:>9}{requests:>10}  " + "".join(f"{cell:<30}" for cell in cells))
                found += [
                    {"device": device.name, "context": context, "requests": requests, "text": kind, "gain": one.gain}
                    | one.mode._asdict()
                    for kind, one in best.items()
                ]
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _said(mode: Any) -> str:
    if mode.drafts == 0:
        return "plain"
    return f"one pass, {mode.hypotheses} blocks" if mode.hypotheses else f"two passes, {mode.drafts} drafts"


def _model(base: str) -> tuple[str, Any]:
    """A known name needs no file."""
    from vllm_orthrus.errors import UserError
    from vllm_orthrus.heads.widen import KNOWN, read_config, shape_like
    from vllm_orthrus.policy.cost import Model

    name = base.rpartition("/")[2]
    if Path(base).is_dir():
        shape = read_config(Path(base))
    elif name in KNOWN:
        shape = shape_like(name, {})
    else:
        raise UserError(f"--base {base} is neither a folder nor one of {', '.join(KNOWN)}. Give one of these.")
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    layers, hidden, intermediate, heads, kv_heads = (int(shape[one]) for one in names)
    vocab = int(shape["vocab_size"])
    return name, Model(layers, hidden, intermediate, heads, kv_heads, int(shape["head_dim"]), vocab)


def _ranks(options: argparse.Namespace, model: Any) -> int:
    from vllm_orthrus.errors import UserError

    ranks: int = options.tensor_parallel_size
    if ranks < 1 or model.heads % ranks:
        raise UserError(f"--tensor-parallel-size {ranks} must divide the model's {model.heads} heads.")
    for setting, values in (("--context", options.context), ("--concurrency", options.concurrency)):
        if min(values) < 1:
            raise UserError(f"{setting} {min(values)} must be at least 1.")
    return ranks


def _positive(tokens: list[float]) -> None:
    from vllm_orthrus.errors import UserError

    for one in tokens:
        if not 1 <= one <= 16:
            raise UserError(f"--tokens-per-cycle {one:g} must lie between 1 and 16, the bonus included.")
