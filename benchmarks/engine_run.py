"""One vLLM engine, as JSON in and JSON out: what it says, or how long its steps take.

    python -m benchmarks.engine_run '{"engine": {"model": "..."}, "prompts": [[1, 2, 3]], "length": 64, "at_once": [1]}'
    python -m benchmarks.engine_run '{"engine": {"model": "..."}, "points": [[1, 1024]], "steps": 40}'

A process each: memory, graphs and compiled code of one engine shall not be another's. Every finding is a line of its
own, `PART` and JSON, as soon as there is one, so that nothing is lost if the rest has no time.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # steps are timed from where they are asked for
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from vllm import LLM, SamplingParams

from vllm_orthrus.bench.near_ties import CLOSE

COUNTERS = (
    "vllm:spec_decode_num_drafts",
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
    "vllm:orthrus_verifications",
    "vllm:orthrus_tokens",
    "vllm:orthrus_hits",
    "vllm:orthrus_rows",
    "vllm:orthrus_draft_passes",
)
WARM = 8  # steps before those that are timed
RUNNERS_UP = 4  # likeliest tokens that are looked at for near ties

Answer = dict[str, Any]


def tell(**part: Any) -> None:
    print("PART", json.dumps(part), flush=True)


def counted(llm: LLM) -> dict[str, float]:
    return {metric.name: metric.value for metric in llm.get_metrics() if metric.name in COUNTERS}


def since(before: dict[str, float], llm: LLM) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in counted(llm).items()}


def say(llm: LLM, prompts: list[list[int]], sampling: SamplingParams, at_once: int) -> list[Any]:
    """Greedy answers, so many at once."""
    outputs: list[Any] = []
    for first in range(0, len(prompts), at_once):
        chunk = [{"prompt_token_ids": prompt} for prompt in prompts[first : first + at_once]]
        outputs += [output.outputs[0] for output in llm.generate(chunk, sampling, use_tqdm=False)]
    return outputs


def answers(llm: LLM, task: dict[str, Any], at_once: int) -> dict[str, Any]:
    """Seconds and counts of a run that asks for nothing else; what it said; and where another token was close."""
    prompts, length = task["prompts"], task["length"]
    stop = task.get("stop", [])
    settings = {"temperature": 0, "stop_token_ids": stop, "ignore_eos": not stop, "detokenize": False}
    say(llm, prompts[:at_once], SamplingParams(**settings, max_tokens=8), at_once)
    before, start = counted(llm), time.perf_counter()
    outputs = say(llm, prompts, SamplingParams(**settings, max_tokens=length), at_once)
    found: dict[str, Any] = {
        "at_once": at_once,
        "seconds": time.perf_counter() - start,
        "counted": since(before, llm),
    }
    if task.get("close"):
        outputs = say(llm, prompts, SamplingParams(**settings, max_tokens=length, logprobs=RUNNERS_UP), at_once)
        found["close"] = [list(close_places(output.logprobs)) for output in outputs]
    return found | {"tokens": [list(output.token_ids) for output in outputs]}


def close_places(logprobs: list[dict[int, Any]]) -> Iterator[list[Any]]:
    """[place, token, deficit, token, deficit, ...] wherever a second token comes close to the best."""
    for place, tokens in enumerate(logprobs):
        best = max(found.logprob for found in tokens.values())
        deficits = {token: best - found.logprob for token, found in tokens.items()}
        near = sorted((deficit, token) for token, deficit in deficits.items() if deficit < CLOSE)
        if len(near) > 1:
            yield [place, *(value for deficit, token in near for value in (token, round(deficit, 7)))]


class Forwards:
    """How long the model runner's forwards take by themselves: by the device's clock, if it has one."""

    def __init__(self, llm: LLM) -> None:
        executor: Any = llm.llm_engine.engine_core.engine_core.model_executor
        self.runner = executor.driver_worker.worker.model_runner
        self.on_device = self.runner.device.type == "cuda"

    @contextmanager
    def timed(self) -> Iterator[Callable[[], list[float]]]:
        """Yields what tells the seconds of every forward since."""
        original, marks = self.runner.execute_model, list[tuple[Any, Any]]()

        def execute_model(*args: Any, **kwargs: Any) -> Any:
            start = self._mark()
            output = original(*args, **kwargs)
            marks.append((start, self._mark()))
            return output

        def seconds() -> list[float]:
            if not self.on_device:
                return [end - start for start, end in marks]
            torch.cuda.synchronize()
            return [start.elapsed_time(end) / 1e3 for start, end in marks]

        self.runner.execute_model = execute_model
        try:
            yield seconds
        finally:
            self.runner.execute_model = original

    def _mark(self) -> Any:
        if not self.on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds_per_step(llm: LLM, forwards: Forwards, requests: int, context: int, steps: int) -> dict[str, Any]:
    """Of decoding steps with this many requests at once, each behind a prompt of its own."""
    engine = llm.llm_engine
    config = engine.vllm_config
    vocabulary = config.model_config.get_vocab_size()
    point: dict[str, Any] = {"requests": requests, "context": context}
    longest = (WARM + steps + 2) * (1 + config.num_speculative_tokens)
    cache = config.cache_config.num_gpu_blocks * config.cache_config.block_size
    if requests * (context + longest) > cache or context + longest > config.model_config.max_model_len:
        return point | {"skipped": f"{requests} x {context + longest} tokens don't fit: the cache holds {cache}"}
    sampling = SamplingParams(temperature=0, max_tokens=longest, ignore_eos=True, detokenize=False)
    names = [f"{requests}x{context}-{request}" for request in range(requests)]
    for place, name in enumerate(names):
        prompt = [(7919 * place + 31 * token) % (vocabulary - 1) for token in range(context)]
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
    waiting = set(names)
    while waiting:
        waiting -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    for _ in range(WARM):
        engine.step()
    times = []
    before = counted(llm)
    with forwards.timed() as forward_seconds:
        for _ in range(steps):
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        forward = forward_seconds()
    new = since(before, llm)
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    verifications = new.get("vllm:orthrus_verifications", 0)
    # Steps that are scheduled ahead take turns in being waited for: the mean is what a step costs, whatever they hide.
    return point | {
        "mean": statistics.fmean(times),
        "median": statistics.median(times),
        "forward": statistics.median(forward),
        "rows": new["vllm:orthrus_rows"] / verifications if verifications else None,
        "counted": new,
    }


def main() -> None:
    task, start = json.loads(sys.argv[1]), time.perf_counter()
    if task["engine"].get("load_format") == "widened":
        import benchmarks.widened_loader  # noqa: F401 (registers itself)
    llm = LLM(
        **{"skip_tokenizer_init": True, "disable_log_stats": False, "enable_prefix_caching": False} | task["engine"]
    )
    config = llm.llm_engine.vllm_config
    forwards = Forwards(llm)
    speculator = getattr(forwards.runner, "speculator", None)
    graphs = getattr(speculator, "graphs", None)
    tell(
        started={
            "seconds": time.perf_counter() - start,
            "eager": config.model_config.enforce_eager,
            "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
            "draft_graphs": sorted(found.num_reqs for found in graphs.graphs) if graphs is not None else [],
            "asynchronous": config.scheduler_config.async_scheduling,
            "passes": getattr(config.speculative_config, "orthrus_passes", None),
        }
    )
    for at_once in task.get("at_once", []):
        tell(answers=answers(llm, task, at_once))
    for requests, context in task.get("points", []):
        tell(step=seconds_per_step(llm, forwards, requests, context, task["steps"]))
    tell(done=True)
    os._exit(0)  # taking an engine apart would take seconds, and nothing is left to be kept


if __name__ == "__main__":
    main()
