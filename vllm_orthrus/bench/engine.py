"""A vLLM engine without a server, in a process of its own.

    python -m vllm_orthrus.bench.engine --serve TASK

The task is the options of `vllm serve`. A question is prompts, how many of them at a time, and how to sample; the
answer is what was said, in which time, and what vLLM counted meanwhile. With `logprobs` among the sampling parameters
it also holds, for each token that was said, the likeliest tokens with their values.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, deque
from typing import Any

from vllm_orthrus.bench.process import answer, questions

ACCEPTED_AT = "vllm:spec_decode_num_accepted_tokens_per_pos"


def main() -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = json.loads(sys.argv[sys.argv.index("--serve") + 1])
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(arguments)))
    for prompts, at_once, sampling in questions():
        before = counted(engine)
        params = SamplingParams(detokenize=False, **sampling)
        started = time.perf_counter()
        said, likeliest, steps = run(engine, prompts, at_once, params)
        seconds = time.perf_counter() - started
        now = counted(engine)
        answer(
            {"said": said, "likeliest": likeliest, "steps": steps, "seconds": seconds, "counted": dict(now - before)}
        )


def run(
    engine: Any, prompts: list[list[int]], at_once: int, params: Any
) -> tuple[list[list[int]], list[list[list[tuple[int, float]]]], int]:
    """What is said to each prompt, what else was likely, and how many steps brought a request anything, summed up."""
    waiting = deque(enumerate(prompts))
    said: list[list[int]] = [[] for _ in prompts]
    likeliest: list[list[list[tuple[int, float]]]] = [[] for _ in prompts]
    running = steps = 0
    while waiting or running:
        while waiting and running < at_once:
            place, prompt = waiting.popleft()
            engine.add_request(str(place), {"prompt_token_ids": prompt}, params)
            running += 1
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
            steps += len(tokens) > len(said[int(output.request_id)])
            said[int(output.request_id)] = tokens
            if output.finished and output.outputs[0].logprobs:
                likeliest[int(output.request_id)] = [
                    sorted(((token, found.logprob) for token, found in place.items()), key=lambda one: -one[1])
                    for place in output.outputs[0].logprobs
                ]
            running -= output.finished
    return said, likeliest, steps


def counted(engine: Any) -> Counter[str]:
    """vLLM's counters of drafts, and this package's; accepted drafts also by place."""
    found: Counter[str] = Counter()
    for metric in engine.get_metrics():
        if metric.name == ACCEPTED_AT:
            found.update({f"accepted at {place}": count for place, count in enumerate(metric.values)})
        elif metric.name.startswith(("vllm:spec_decode_", "vllm:orthrus_")):
            found[metric.name] += int(metric.value)
    return found


if __name__ == "__main__":
    main()
