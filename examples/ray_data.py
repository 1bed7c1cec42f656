"""Answers to all prompts of a Parquet file, by as many replicas as there is room for.

    python examples/ray_data.py --model Qwen/Qwen3-8B --replicas 4 prompts.parquet answers

The file has a column `prompt`; the folder gets Parquet files with all its columns, `answer` and `tokens`. Rows come in
any order. Nothing but `speculative_config` makes the replicas draft; leave it out (`--plain`) for vLLM as it was.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import ray.data
from ray.data.llm import Processor, build_processor, vLLMEngineProcessorConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="a Parquet file, or a folder of some")
    parser.add_argument("answers", type=Path, help="a folder")
    parser.add_argument("--model", default="Qwen/Qwen3-8B")
    parser.add_argument("--head", help="folder or repository (default: by the model's name)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--replicas", type=int, default=1, help="at most")
    parser.add_argument("--cpus", type=int, default=0, help="cores of a replica that has no GPU")
    parser.add_argument("--plain", action="store_true", help="without drafts")
    parser.add_argument("--options", type=json.loads, default={}, help="further arguments of LLM, as JSON")
    asked = parser.parse_args()

    rows = ray.data.read_parquet(str(asked.prompts.resolve()))
    answered = processor(asked, rows.columns())(rows).materialize()
    answered.write_parquet(str(asked.answers.resolve()))
    print(f"{answered.count()} answers in {asked.answers}")


def processor(asked: argparse.Namespace, columns: list[str]) -> Processor:
    head = {"model": located(asked.head)} if asked.head else {}
    drafts = {} if asked.plain else {"speculative_config": {"method": "orthrus", **head}}
    greedy = {"temperature": 0, "max_tokens": asked.tokens}

    def chat(row: dict[str, Any]) -> dict[str, Any]:
        messages = [{"role": "user", "content": row["prompt"]}]
        return {"messages": messages, "sampling_params": greedy, "asked": row["prompt"]}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        # By now `prompt` is what the model saw, with its chat's marks.
        kept = {name: row[name] for name in columns} | {"prompt": row["asked"]}
        return kept | {"answer": row["generated_text"], "tokens": row["num_generated_tokens"]}

    return build_processor(
        vLLMEngineProcessorConfig(
            model_source=located(asked.model),
            engine_kwargs=asked.options | drafts,
            concurrency=asked.replicas,
            # vLLM tokenizes; and the templates of chats are filled in beside it, without a core of their own.
            chat_template_stage={"enabled": True, "num_cpus": 0},
            tokenize_stage={"enabled": False},
            detokenize_stage={"enabled": False},
            **(on_cpus(asked.cpus) if asked.cpus else {}),
        ),
        preprocess=chat,
        postprocess=answer,
    )


def on_cpus(cores: int) -> dict[str, Any]:
    """Replicas share a machine, so none may take its cores for itself, which is what vLLM would do."""
    threads = {"OMP_NUM_THREADS": str(cores), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {
        "placement_group_config": {"bundle_per_worker": {"CPU": cores}},
        "runtime_env": {"env_vars": threads},
    }


def located(name: str) -> str:
    """A folder by its whole path: replicas need not run where this was called."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


if __name__ == "__main__":
    main()
