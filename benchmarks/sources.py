"""Where each file of evidence/ comes from: the command that makes it anew, and how long that takes on two cores.

A file that no entry stands for is no evidence, and `tests/unit/test_evidence.py` says so.
"""

from collections.abc import Mapping
from typing import NamedTuple

OUT = "{out}"  # where a command is told to write
ONE_CORE = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
TINY = "--model examples/tiny-orthrus/base --head examples/tiny-orthrus/head"
HELD_OUT = "--dataset examples/tiny-orthrus/heldout.jsonl"
SMALL = "--enforce-eager --max-model-len 512 --kv-cache-memory-bytes 67108864"
NGRAM = '{"method":"ngram","num_speculative_tokens":15,"prompt_lookup_max":4}'
WIDENED = "runs/tiny-orthrus-as-28x1280-bfloat16"
WIDEN = (
    f"test -d {WIDENED} || "
    f"vllm-orthrus widen examples/tiny-orthrus/base examples/tiny-orthrus/head {WIDENED} --like 28x1280"
)


class Source(NamedTuple):
    shows: str
    commands: tuple[str, ...]  # one after the other, in the top folder
    minutes: int
    timed: bool = False  # holds seconds: made anew on the kind of machine that it names, and on no other
    variables: Mapping[str, str] = {}
    pictures: Mapping[str, str] = {}  # by the ending of what appears beside the file, its name in docs/pictures


SOURCES: Mapping[str, Source] = {
    "acceptance-tiny.json": Source(
        "tokens per cycle and per forward, by class, in two passes and in one; greedy",
        (
            f"vllm-orthrus bench acceptance {TINY} {HELD_OUT} --ways two one --per-class 10 --dtype float32 "
            f"--out {OUT} -- {SMALL}",
        ),
        5,
        variables=ONE_CORE,
    ),
    "acceptance-tiny-sampled.json": Source(
        "the same at temperature 0.8",
        (
            f"vllm-orthrus bench acceptance {TINY} {HELD_OUT} --ways two one --per-class 10 --dtype float32 "
            f"--temperature 0.8 --out {OUT} -- {SMALL}",
        ),
        5,
        variables=ONE_CORE,
    ),
    "beside-ngram-tiny.json": Source(
        "what is accepted in two passes, in one, and of n-gram drafts",
        (
            f"vllm-orthrus bench throughput {TINY} {HELD_OUT} --offline --ways two one --concurrency 1 --rounds 3 "
            f"--per-client 4 --dtype float32 --against '{NGRAM}' --out {OUT} -- {SMALL}",
        ),
        10,
        variables=ONE_CORE,
    ),
    "cascades-tiny.json": Source(
        "lossy rules: tokens per forward and right answers",
        (
            f"vllm-orthrus bench cascade {TINY} {HELD_OUT} --per-class 20 "
            "--tokens 256 --dtype float32 --rules chow diff opt token_v2 token_v3 relaxed --alphas 0.1 0.3 0.6 0.9 "
            f"--ks 2 5 --out {OUT} -- {SMALL}",
        ),
        20,
        variables=ONE_CORE,
        pictures={".png": "cascades-tiny.png"},
    ),
    "compatibility-0.32.0.json": Source("what goes together, with vLLM 0.32", ("make compatibility",), 75),
    "compatibility-0.33.0.json": Source("what goes together, with vLLM 0.33", ("make compatibility",), 75),
    "cost-xeon-amx-2-cores.json": Source(
        "what steps take, and what was foretold of them",
        (
            WIDEN,
            f"vllm-orthrus bench cost --model {WIDENED}/base --head {WIDENED}/head --concurrency 1 2 4 8 "
            f"--context 128 512 --dtype bfloat16 --out {OUT} -- --max-model-len 1024 --max-num-seqs 8 "
            "--max-num-batched-tokens 128 --kv-cache-memory-bytes 1073741824",
        ),
        10,
        timed=True,
    ),
    "cpu-modes-bfloat16-epyc-2-cores.json": Source(
        "tokens per second beside stock vLLM, by class and requests, with a selector and without",
        (
            "python -m benchmarks.cpu_modes --rounds 3 --at-once 1 2 4 8 --ways plain auto 'auto, selector' "
            f"--out {OUT}",
        ),
        35,
        timed=True,
        pictures={".svg": "modes-on-two-cores.svg"},
    ),
    "cpu-modes-bfloat16-xeon-amx-2-cores.json": Source(
        "the same on another CPU",
        (
            "python -m benchmarks.cpu_modes --rounds 3 --at-once 1 2 4 8 --ways plain auto 'auto, selector' "
            f"--out {OUT}",
        ),
        35,
        timed=True,
        pictures={".svg": "modes-on-two-cores-with-tiles.svg"},
    ),
    "cpu-step-epyc-bf16-2-cores.json": Source(
        "what a step of the tiny model costs, beside stock vLLM's",
        (f"python -m benchmarks.cpu_step --rounds 7 --tokens 64 --out {OUT}",),
        10,
        timed=True,
    ),
    "head-memory.json": Source(
        "bytes and caches that a head adds, beside its base and merged, and that a draft model of its own would",
        (f"python -m benchmarks.head_memory --out {OUT}",),
        2,
        variables=ONE_CORE,
    ),
    "launches-beside.json": Source(
        "what a decoding step launches: plain, with drafts of ours, and with vLLM's own DFlash and EAGLE-3 drafters",
        (f"python -m benchmarks.launches_beside --out {OUT}",),
        2,
        variables=ONE_CORE | {"PYTHONPATH": ".venv/vllm-0.33"},
    ),
    "lossless-tiny-bfloat16.json": Source(
        "where greedy texts part in bfloat16: plain decoding's own floor, and drafting",
        (
            f"vllm-orthrus bench lossless {TINY} {HELD_OUT} --tokens 64 --per-class 6 --at-once 1 12 --out {OUT} "
            f"-- {SMALL} --max-num-seqs 16",
        ),
        5,
        variables=ONE_CORE,
    ),
    "mixed-batches.json": Source(
        "what batches that read prompts would gain by carrying blocks, by the roofline; nothing of it is measured",
        (f"python -m benchmarks.mixed_batches --out {OUT}",),
        20,
    ),
    "mode-simulation.json": Source(
        "what the policy is worth on five GPUs, by their rooflines; nothing of it is measured",
        (f"python -m benchmarks.mode_simulation --lines --tokens 8000 --out {OUT}",),
        30,
    ),
    "mode-turns.json": Source(
        "what the policy makes of turns of one class after the other, with the steps of cost-xeon-amx-2-cores.json",
        (f"python -m benchmarks.mode_turns --out {OUT}",),
        2,
    ),
    "quantized-head-tiny.json": Source(
        "tokens per cycle with a head in fp8",
        (f"python -m benchmarks.quantized_head --out {OUT}",),
        10,
        variables=ONE_CORE,
    ),
    "selector-tiny.json": Source(
        "tokens per cycle and per forward with a selector, and with its head alone",
        (f"python -m benchmarks.selector --out {OUT}",),
        10,
        variables=ONE_CORE,
    ),
    "shared-prefixes.json": Source(
        "tokens per cycle behind a cached prefix, and without a cache",
        (f"python -m benchmarks.shared_prefixes --questions 24 --out {OUT}",),
        30,
        variables=ONE_CORE,
    ),
    "soak-tiny-one-pass.json": Source(
        "half an hour of mixed traffic",
        (f"python -m tests.serve.soak --minutes 30 --rate 0.5 --out {OUT}",),
        55,
        variables=ONE_CORE | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"},
        pictures={".png": "soak.png"},
    ),
    "soak-tiny-stock.json": Source(
        "the same traffic with stock vLLM",
        (f"python -m tests.serve.soak --minutes 30 --rate 0.5 --speculative null --out {OUT}",),
        50,
        variables=ONE_CORE | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"},
    ),
    "traces-tiny-orthrus.json": Source(
        "what would be accepted wherever a draft might begin: the text that modes are simulated on",
        (f"python -m benchmarks.traces --out {OUT}",),
        20,
        variables=ONE_CORE,
    ),
    "warm-starts.json": Source(
        "tokens per cycle behind prefix hits, preemptions and prefixes of another engine",
        (f"python -m benchmarks.warm_starts --questions 24 --out {OUT}",),
        10,
        variables=ONE_CORE,
    ),
}
