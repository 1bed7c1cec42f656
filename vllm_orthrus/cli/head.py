"""`vllm-orthrus head ...`: look at heads, move them between layouts, check and measure them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    head = subparsers.add_parser("head", help="extract, convert, inspect and verify head checkpoints")
    tools = head.add_subparsers(dest="tool", required=True, metavar="TOOL")

    inspect = tools.add_parser("inspect", help="what a head is and which base it belongs to")
    inspect.add_argument("head", help="folder or repository")
    inspect.add_argument("--revision")
    inspect.set_defaults(run=run_inspect)

    extract = tools.add_parser("extract", help="take the head out of a merged checkpoint")
    extract.add_argument("checkpoint", help="folder or repository of a merged checkpoint")
    extract.add_argument("output", type=Path)
    extract.add_argument("--base", help="the stock base it belongs to, where the checkpoint doesn't say")
    extract.add_argument("--base-revision")
    extract.add_argument("--revision", help="of the merged checkpoint")
    extract.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="convert the weights, quantized ones too"
    )
    extract.set_defaults(run=run_extract)

    convert = tools.add_parser(
        "convert", help="merge a head and its base into one checkpoint (published layout), quantize a head, or both"
    )
    convert.add_argument("head", help="folder or repository of a head")
    convert.add_argument("output", type=Path)
    convert.add_argument("--base", type=Path, help="folder of the base to merge with")
    convert.add_argument("--quantize", choices=("fp8",), help="the head's projections, with a scale per output channel")
    convert.add_argument("--revision")
    convert.set_defaults(run=run_convert)

    verify = tools.add_parser("verify", help="check a head against a base, and measure tokens per cycle")
    verify.add_argument("head", help="folder or repository")
    verify.add_argument("--base", required=True, help="folder or repository of the base")
    verify.add_argument("--revision", help="of the head")
    verify.add_argument("--prompts", type=Path, help="JSONL with `prompt` and `class`: measure with the reference")
    verify.add_argument("--temperature", type=float, default=0.0)
    verify.add_argument("--drafts", type=int, help="drafts per cycle (default: all that were trained)")
    verify.add_argument("--width", type=int, help="rows per block (default: as trained)")
    verify.add_argument("--max-new-tokens", type=int, default=128)
    verify.add_argument("--per-class", type=int, help="measure only so many prompts of each class")
    verify.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="float32")
    verify.add_argument("--device", default="cpu")
    verify.add_argument("--seed", type=int, default=0)
    verify.add_argument(
        "--selector", default="auto", help="auto: the head's own; off; or a folder or repository with another"
    )
    verify.add_argument("--json", type=Path, help="write the figures to this file, too")
    verify.set_defaults(run=run_verify)


def run_inspect(options: argparse.Namespace) -> int:
    from vllm_orthrus.heads import open_head, resolve_head

    head = open_head(options.head, options.revision)
    shapes = head.shapes()
    numbers = sum(math.prod(shape) for shape in shapes.values())
    stored = {"fp8": "projections in fp8 (E4M3), a scale per output channel"}
    shape, config = head.config.shape, head.config
    resolved = resolve_head(config.base.name) if config.base.name else None
    facts = {
        "layout": head.layout,
        "block": f"{config.block_size} rows, {config.num_drafts} drafts, mask token {config.mask_token_id}",
        "base": f"{config.base.name or 'not named'} (revision {config.base.revision or 'any'})",
        "fingerprint": config.base.fingerprint,
        "shape": f"{shape.model_type}, {shape.num_layers} layers, hidden {shape.hidden_size}, "
        f"{shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim}, vocabulary {shape.vocab_size}",
        "tensors": f"{len(shapes)}, {numbers / 1e6:.2f} M parameters",
        "selector": _selector_fact(head.selector),
        "quantization": stored[config.quantization] if config.quantization else "none",
        "found by name": f"{config.base.name} -> {resolved}" if resolved else "no: give it as `model` when serving",
    }
    for name, fact in facts.items():
        print(f"{name + ':':<15}{fact}")
    head.check_complete()
    print("complete: every tensor that the base calls for is there")
    return _say_nonsense(head)


def _selector_fact(selector: Any) -> str:
    if selector is None:
        return "none"
    numbers = 3 * selector.shape.rank
    return f"rank {selector.shape.rank}, {selector.shape.candidates} candidates, {numbers} x hidden parameters"


def _say_nonsense(head: Any) -> int:
    """1 if no draft can come of these weights."""
    from vllm_orthrus.heads import find_nonsense

    nonsense = find_nonsense(head.tensors())
    if str(nonsense):
        print(f"warning: {head.source} {nonsense}. Convert or train the head anew.")
    if head.selector is not None and str(spoilt := find_nonsense(head.selector.tensors())):
        print(f"warning: {head.source}: its selector {spoilt}. Train it anew, or serve with orthrus_selector='off'.")
    return int(nonsense.drafts_nothing)


def run_extract(options: argparse.Namespace) -> int:
    import torch

    from vllm_orthrus.heads import open_head
    from vllm_orthrus.heads.convert import extract_head

    dtype = getattr(torch, options.dtype) if options.dtype else None
    checkpoint = open_head(options.checkpoint, options.revision)
    config = extract_head(checkpoint, options.output, options.base, options.base_revision, dtype)
    print(f"{options.output}: head of {config.base.name}, {len(checkpoint.files)} tensors")
    return 0


def run_convert(options: argparse.Namespace) -> int:
    from vllm_orthrus.heads import HeadError, open_head
    from vllm_orthrus.heads.convert import merge_head, quantize_head

    if options.base is None and options.quantize is None:
        raise HeadError("nothing to convert to: give --base to merge with it, --quantize fp8, or both.")
    head = open_head(options.head, options.revision)
    form = f" in {options.quantize}" if options.quantize else ""
    if options.base is None:
        quantize_head(head, options.output, options.quantize)
        print(f"{options.output}: {options.head}{form}")
    else:
        merge_head(head, options.base, options.output, options.quantize)
        print(f"{options.output}: {options.base} with {options.head}{form}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    import json
    import time

    import torch
    from transformers import AutoTokenizer

    from vllm_orthrus.heads import open_head
    from vllm_orthrus.training.evaluate import Setting, decode, first_per_class, read_prompts, summarise, table
    from vllm_orthrus.training.reference import Reference, read_base_config

    head = open_head(options.head, options.revision)
    warnings = head.config.check_fits(read_base_config(options.base), options.base)
    head.check_complete()
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"{options.head} fits {options.base}")
    useless = _say_nonsense(head)
    if options.prompts is None or useless:
        return useless
    tokenizer = AutoTokenizer.from_pretrained(options.base, trust_remote_code=False)
    prompts = first_per_class(read_prompts(options.prompts, tokenizer), options.per_class)
    dtype = getattr(torch, options.dtype)
    reference = Reference.from_pretrained(
        options.base, options.head, dtype, options.device, options.revision, options.selector
    )
    setting = Setting(options.max_new_tokens, options.temperature, options.drafts, options.width, seed=options.seed)
    started = time.monotonic()
    generations = decode(reference, prompts, [tokenizer.eos_token_id], setting, show_progress=True)
    results = summarise(prompts, generations)
    width = setting.width or head.config.block_size
    drafts = setting.num_drafts or min(width, head.config.num_drafts)
    print(f"\nT={setting.temperature}, block of {width}, {drafts} drafts, {time.monotonic() - started:.0f} s")
    print(table(results))
    if options.json:
        figures = {
            kind: {
                "tokens_per_cycle": result.tokens_per_cycle,
                "per_prompt": result.per_prompt,
                "accepted": result.by_position(),
            }
            for kind, result in results.items()
        }
        options.json.write_text(json.dumps({"setting": setting._asdict(), "classes": figures}, indent=2) + "\n")
    return 0
