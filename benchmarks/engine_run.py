"""One vLLM engine, as JSON in and JSON out: what it says, or how long its steps take.

    python -m benchmarks.engine_run '{"engine": {"model": "..."}, "prompts": [[1, 2, 3]], "length": 64}'
    python -m benchmarks.engine_run '{"engine": {"model": "..."}, "points": [[1, 1024]], "steps": 40}'

A process each: memory, graphs and compiled code of one engine shall not be another's.
"""

import json
import os
import statistics
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # steps are timed from where they are asked for
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams

COUNTERS = (
    "vllm:spec_decode_num_drafts",
    "vllm:spec_decode_num_accepted_tokens",
    "vllm:orthrus_verifications",
    "vllm:orthrus_tokens",
    "vllm:orthrus_hits",
    "vllm:orthrus_draft_passes",
)


def answers(llm: LLM, prompts: list[list[int]], length: int, stop: list[int]) -> dict[str, Any]:
    """Greedy."""
    sampling = SamplingParams(temperature=0, max_tokens=length, stop_token_ids=stop, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    counted = {metric.name: metric.value for metric in llm.get_metrics() if metric.name in COUNTERS}
    return {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "counted": counted}


def seconds_per_step(llm: LLM, requests: int, context: int, steps: int) -> dict[str, Any]:
    """Of decoding steps with this many requests at once, each behind a prompt of its own."""
    engine, warm = llm.llm_engine, 8
    vocabulary = engine.model_config.get_vocab_size()
    sampling = SamplingParams(temperature=0, max_tokens=context, ignore_eos=True, detokenize=False)
    names = [f"{requests}x{context}-{request}" for request in range(requests)]
    for place, name in enumerate(names):
        prompt = [(7919 * place + 31 * token) % (vocabulary - 1) for token in range(context)]
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
    waiting = set(names)
    while waiting:
        waiting -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    for _ in range(warm):
        engine.step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    # Steps that are scheduled ahead take turns in being waited for: the mean is what a step costs, whatever they hide.
    return {
        "requests": requests,
        "context": context,
        "mean": statistics.fmean(times),
        "median": statistics.median(times),
    }


def main() -> None:
    task = json.loads(sys.argv[1])
    llm = LLM(
        **{"skip_tokenizer_init": True, "disable_log_stats": False, "enable_prefix_caching": False} | task["engine"]
    )
    config = llm.llm_engine.vllm_config
    result: dict[str, Any] = {
        "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
        "passes": getattr(config.speculative_config, "orthrus_passes", None),
    }
    if "prompts" in task:
        result |= answers(llm, task["prompts"], task["length"], task.get("stop", []))
    if "points" in task:
        room = config.cache_config.num_gpu_blocks * config.cache_config.block_size
        fitting = [(requests, context) for requests, context in task["points"] if requests * (context + 256) <= room]
        result["steps"] = [seconds_per_step(llm, *point, task["steps"]) for point in fitting]
    print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
