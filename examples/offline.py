"""Answers without a server, and how many tokens each step of the model gave.

    python examples/offline.py --model Qwen/Qwen3-8B "What is a KV cache?" "Count from 1 to 30."

Nothing but `speculative_config` makes it draft; leave it out (`--plain`) for vLLM as it was.
"""

import argparse
import json
import time

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--model", default="Qwen/Qwen3-8B")
    parser.add_argument("--head", help="folder or repository (default: by the model's name)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--plain", action="store_true", help="without drafts")
    parser.add_argument("--options", type=json.loads, default={}, help="further arguments of LLM, as JSON")
    args = parser.parse_args()

    head = {"model": args.head} if args.head else {}
    speculative = None if args.plain else {"method": "orthrus", **head}
    llm = LLM(args.model, speculative_config=speculative, disable_log_stats=False, **args.options)

    greedy = SamplingParams(temperature=0, max_tokens=args.tokens)
    conversations = [[{"role": "user", "content": prompt}] for prompt in args.prompts]
    started = time.perf_counter()
    answers = llm.chat(conversations, greedy, use_tqdm=False)
    seconds = time.perf_counter() - started

    for prompt, answer in zip(args.prompts, answers, strict=True):
        print(f"> {prompt}\n{answer.outputs[0].text}\n")
    said = sum(len(answer.outputs[0].token_ids) for answer in answers)
    counted = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    cycles = counted.get("vllm:spec_decode_num_drafts", 0)
    kept = counted.get("vllm:spec_decode_num_accepted_tokens", 0)
    print(f"{said} tokens in {seconds:.1f} s", end="")
    print(f", {1 + kept / cycles:.2f} tokens per cycle of {cycles}" if cycles else ", nothing drafted")


if __name__ == "__main__":
    main()
