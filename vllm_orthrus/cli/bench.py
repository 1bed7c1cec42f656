"""`vllm-orthrus bench`: ways to decode, compared by the clock and by what they accept."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_orthrus.bench.prompts import SHIPPED
from vllm_orthrus.bench.ways import NAMES, OURS


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="compare ways to decode: seconds, and what is accepted")
    kinds = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")
    _add_throughput(kinds)
    _add_acceptance(kinds)
    _add_cost(kinds)
    _add_lossless(kinds)
    _add_cascade(kinds)


def _add_throughput(kinds: Any) -> None:
    parser = kinds.add_parser(
        "throughput",
        help="tokens per second of plain vLLM, drafting, and other methods",
        description="Ways to decode take turns behind real servers, after it is seen that they say the same.",
    )
    _add_common(parser, NAMES)
    parser.add_argument(
        "--against", action="append", default=[], metavar="JSON", help='another speculative config: {"method":"ngram"}'
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="requests at once")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way; three at least to call a difference")
    parser.add_argument("--per-client", type=int, default=2, help="requests of a turn, for each that is under way")
    parser.add_argument("--offline", action="store_true", help="engines without servers")
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="one way up at a time, with all memory; started anew each round"
    )
    parser.set_defaults(run=throughput)


def _add_acceptance(kinds: Any) -> None:
    parser = kinds.add_parser("acceptance", help="tokens per cycle and per forward, and which drafts are kept")
    _add_common(parser, tuple(OURS))
    parser.add_argument("--per-class", type=int, help="only so many prompts of each class")
    parser.set_defaults(run=acceptance)


def _add_cost(kinds: Any) -> None:
    parser = kinds.add_parser("cost", help="what steps take in each mode, and how well that is foretold")
    parser.add_argument("--model", required=True, help="folder or repository of the base")
    parser.add_argument("--head", help="folder or repository of the head (default: by the base's name)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 3, 8], help="requests at once")
    parser.add_argument("--context", type=int, nargs="+", default=[48, 512], help="tokens that are cached of each")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="FILE.json; FILE.csv and FILE.png go beside it")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="further options of `vllm serve`")
    parser.set_defaults(run=cost)


def _add_lossless(kinds: Any) -> None:
    parser = kinds.add_parser(
        "lossless",
        help="where greedy texts part from plain vLLM's, and how nearly tied the tokens were there",
        description="Plain decoding against itself in other batch sizes, which is the floor; then drafting against it.",
    )
    _add_common(parser, tuple(OURS), temperature=False, dtypes=("bfloat16", "float32"))
    parser.add_argument("--per-class", type=int, help="only so many prompts of each class")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16], help="requests at once")
    parser.add_argument(
        "--invariant", action="store_true", help="set VLLM_BATCH_INVARIANT=1 for all; then nothing may differ"
    )
    parser.set_defaults(run=lossless, temperature=0.0)


def _add_cascade(kinds: Any) -> None:
    parser = kinds.add_parser(
        "cascade",
        help="what lossy rules bring in forwards, and cost in text",
        description="Each rule over its settings, beside the same engine without: forwards, seconds, right answers.",
    )
    _add_common(parser, ("two",))
    parser.add_argument("--rules", nargs="+", help="default: all")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.05, 0.2, 0.5, 0.8], help="of all but `relaxed`")
    parser.add_argument("--ks", type=int, nargs="+", default=[2, 3, 5], help="of `relaxed`")
    parser.add_argument("--per-class", type=int, default=20, help="only so many prompts of each class")
    parser.set_defaults(run=cascade)


def _add_common(
    parser: argparse.ArgumentParser, ways: tuple[str, ...], temperature: bool = True, dtypes: tuple[str, ...] = ()
) -> None:
    parser.add_argument("--model", required=True, help="folder or repository of the base")
    parser.add_argument("--head", help="folder or repository of the head (default: by the base's name)")
    parser.add_argument("--ways", nargs="+", default=ways, choices=NAMES, help=f"default: {' '.join(ways)}")
    parser.add_argument(
        "--dataset",
        default=SHIPPED,
        help="JSONL as Spec-Bench, MT-Bench and SPEED-Bench have it, ShareGPT's JSON, a Hugging Face "
        f"name[:subset[:split]], or `{SHIPPED}`, which are in this package (default: %(default)s)",
    )
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="only these, of lines with `class` or `category`")
    parser.add_argument("--raw", action="store_true", help="prompts as they stand, without the chat template")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end of an answer")
    if temperature:
        parser.add_argument("--temperature", type=float, default=0.0)
    if dtypes:  # for which is known how far rounding reaches
        parser.add_argument("--dtype", default=dtypes[0], choices=dtypes)
    else:
        parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="FILE.json; FILE.csv and FILE.png go beside it")
    parser.add_argument(
        "options", nargs="*", metavar="-- OPTIONS", help="further options of `vllm serve`, for all ways"
    )


def throughput(options: argparse.Namespace) -> int:
    from vllm_orthrus.bench.commands import run_throughput

    return run_throughput(options)


def acceptance(options: argparse.Namespace) -> int:
    from vllm_orthrus.bench.commands import run_acceptance

    return run_acceptance(options)


def cost(options: argparse.Namespace) -> int:
    from vllm_orthrus.bench.cost import run_cost

    return run_cost(options)


def lossless(options: argparse.Namespace) -> int:
    from vllm_orthrus.bench.lossless import run_lossless

    return run_lossless(options)


def cascade(options: argparse.Namespace) -> int:
    from vllm_orthrus.bench.cascade import run_cascade

    return run_cascade(options)
