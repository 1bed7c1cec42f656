"""`vllm-orthrus simulate`: what one pass and two give, in tokens by the reference model and in time by the roofline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    simulate = subparsers.add_parser(
        "simulate", help="what one pass with H hypotheses gains over two, by prompt class, with a head and its base"
    )
    simulate.add_argument("head", help="folder or repository")
    simulate.add_argument("--base", required=True, help="folder or repository of the base")
    simulate.add_argument("--prompts", type=Path, required=True, help="JSONL with `prompt` and `class`")
    simulate.add_argument("--hypotheses", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16], help="0 is two passes")
    simulate.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    simulate.add_argument("--drafts", type=int, help="drafts per verification (default: all that were trained)")
    simulate.add_argument("--width", type=int, help="rows per block (default: as trained)")
    simulate.add_argument("--drafting", choices=("probabilistic", "greedy"), default="probabilistic")
    simulate.add_argument("--max-new-tokens", type=int, default=128)
    simulate.add_argument("--per-class", type=int, help="only so many prompts of each class")
    simulate.add_argument("--group", action="append", default=[], help="NAME=CLASS,CLASS: show these classes together")
    simulate.add_argument("--batch", type=int, default=64)
    simulate.add_argument("--context", type=int, default=2048, help="tokens of KV cache in the modelled time")
    simulate.add_argument(
        "--time-on", nargs="+", default=["H200", "H100", "A100", "RTX 4090", "RTX 5090"], help="devices by name, or CPU"
    )
    simulate.add_argument(
        "--selector", default="auto", help="auto: the head's own; off; or a folder or repository with another"
    )
    simulate.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="float32")
    simulate.add_argument("--device", default="cpu")
    simulate.add_argument("--seed", type=int, default=0)
    simulate.add_argument("--json", type=Path, help="write the figures to this file, too")
    simulate.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import json

    import torch
    from transformers import AutoTokenizer

    from vllm_orthrus.policy.cost import Mode, Model, step_seconds
    from vllm_orthrus.policy.devices import find_device
    from vllm_orthrus.training.evaluate import Setting, decode, first_per_class, read_prompts
    from vllm_orthrus.training.reference import Reference, tokens_per_cycle
    from vllm_orthrus.training.simulator import OnePass, figures

    tokenizer = AutoTokenizer.from_pretrained(options.base, trust_remote_code=False)
    prompts = first_per_class(read_prompts(options.prompts, tokenizer), options.per_class)
    groups = _groups([prompt.kind for prompt in prompts], options.group)
    dtype = getattr(torch, options.dtype)
    reference = Reference.from_pretrained(options.base, options.head, dtype, options.device, selector=options.selector)
    stop = [tokenizer.eos_token_id]
    devices, model = [find_device(name) for name in options.time_on], Model()
    block = options.width or reference.config.block_size
    drafts = options.drafts or max(1, min(block, reference.config.num_drafts))

    def gains(tokens: float, num_hypotheses: int) -> dict[str, float]:
        """Tokens per second, against plain decoding, with so many tokens in a step of one request."""
        mode = Mode(drafts, block, num_hypotheses)
        seconds = {
            device.name: [step_seconds(device, model, one, 1, options.context) for one in (Mode(0), mode)]
            for device in devices
        }
        return {name: tokens * plain / step for name, (plain, step) in seconds.items()}

    found: list[dict[str, Any]] = []
    for temperature in options.temperature:
        setting = Setting(
            options.max_new_tokens,
            temperature,
            options.drafts,
            options.width,
            options.drafting,
            batch=options.batch,
            seed=options.seed,
        )
        generations = decode(reference, prompts, stop, setting)
        two_pass = {
            name: tokens_per_cycle([cycle for place in places for cycle in generations[place].cycles]) / 2
            for name, places in groups.items()
        }
        print(
            f"\nT={temperature}: tokens per forward, and per second by the roofline of an 8B model; plain decoding is 1"
        )
        print(HEADINGS + "".join(f"{device.name:>10}" for device in devices))
        for num_hypotheses in options.hypotheses:
            if num_hypotheses == 0:
                for name, value in two_pass.items():
                    times = gains(2 * value, 0)
                    print(f"{0:>3}  {name:<12}{value:>8.2f}{1:>8.2f}{'':>28}" + _columns(times))
                    found.append(
                        {"temperature": temperature, "hypotheses": 0, "class": name}
                        | {"tokens/forward": value, "time": times}
                    )
                continue
            generator = torch.Generator(options.device).manual_seed(options.seed)
            loop = OnePass(
                reference, num_hypotheses, temperature, options.drafts, options.width, options.drafting, generator
            )
            runs = [
                run
                for start in range(0, len(prompts), options.batch)
                for run in loop.generate(
                    [prompt.tokens for prompt in prompts[start : start + options.batch]], options.max_new_tokens, stop
                )
            ]
            if temperature == 0 and options.dtype == "float32":
                _check_same([run.tokens for run in runs], [generation.tokens for generation in generations])
            for name, places in groups.items():
                result = figures([runs[place] for place in places])
                ratio = result.tokens_per_forward / two_pass[name]
                times = gains(result.tokens_per_forward, num_hypotheses)
                print(
                    f"{num_hypotheses:>3}  {name:<12}{result.tokens_per_forward:>8.2f}{ratio:>8.2f}{result.hit:>8.2f}"
                    f"{result.count_missed:>10.2f}{result.bonus_missed:>10.2f}" + _columns(times)
                )
                found.append(
                    {"temperature": temperature, "hypotheses": num_hypotheses, "class": name}
                    | {"tokens/forward": result.tokens_per_forward, "ratio": ratio, "time": times}
                    | {"hit": result.hit, "count missed": result.count_missed, "bonus missed": result.bonus_missed}
                )
    if options.json:
        setting_used = {name: str(value) for name, value in vars(options).items() if name not in ("run", "json")}
        options.json.write_text(json.dumps({"setting": setting_used, "figures": found}, indent=2) + "\n")
    return 0


HEADINGS = f"{'H':>3}  {'class':<12}{'tokens':>8}{'ratio':>8}{'hits':>8}{'no count':>10}{'no bonus':>10}"


def _columns(times: dict[str, float]) -> str:
    return "".join(f"{value:>10.2f}" for value in times.values())


def _groups(kinds: Sequence[str], wanted: Sequence[str]) -> dict[str, list[int]]:
    """Places of the prompts of each class, of each group that was asked for, and of all."""
    from vllm_orthrus.training.config import ConfigError

    members = {kind: {kind} for kind in dict.fromkeys(kinds)}
    for group in wanted:
        name, _, listed = group.partition("=")
        members[name] = set(listed.split(","))
        if not members[name] <= set(kinds):
            raise ConfigError(f"--group {group}: the prompts' classes are {', '.join(dict.fromkeys(kinds))}.")
    members["all"] = set(kinds)
    return {name: [place for place, kind in enumerate(kinds) if kind in found] for name, found in members.items()}


def _check_same(one_pass: list[list[int]], two_pass: list[list[int]]) -> None:
    different = [place for place, (mine, other) in enumerate(zip(one_pass, two_pass, strict=True)) if mine != other]
    if different:
        raise RuntimeError(
            f"greedy text differs between one pass and two on prompts {different}: drafting isn't lossless"
        )
