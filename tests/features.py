"""What people combine with Orthrus, and how a test says that it is evidence for it.

    @pytest.mark.feature("stop strings inside a block")
    @pytest.mark.feature("LoRA", "refused")
    @pytest.mark.feature("logit_bias", "stock")     vLLM itself refuses it, whatever the method

A run with `--features FOLDER` keeps there what its tests found, in a file for its vLLM, and
`python -m tests.compatibility` makes docs/compatibility.md of it. The tests marked `thorough` take part in such runs,
and in those that ORTHRUS_TEST_THOROUGH asks for.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
VERDICTS = ("works", "refused", "stock")

# The rows of the table, in their order.
FEATURES: dict[str, list[str]] = {
    "Scheduling and memory": [
        "chunked prefill",
        "prefix caching",
        "prefix caching: the same prompt again, sampled",
        "prefix caching: reset between requests",
        "prefix caching: 90 % of the prompt shared",
        "preemption",
        "asynchronous scheduling",
        "asynchronous scheduling with preemption",
        "requests aborted while others run",
        "KV connectors",
        "fp8 KV cache",
        "sleep and wake (level 0, scheduling)",
        "sleep levels 1 and 2",
        "weights loaded anew",
        "--enforce-eager",
        "compiled models",
        "numbers of drafts by batch size",
    ],
    "Where an answer ends": [
        "stop strings inside a block",
        "stop tokens inside a block",
        "max_tokens inside a block",
        "max_model_len inside a block",
        "min_tokens",
    ],
    "Sampling": [
        "temperature: the same distribution",
        "seeds",
        "n > 1",
        "beam search",
        "repetition, presence and frequency penalties",
        "bad words",
        "allowed tokens",
        "logprobs",
        "prompt_logprobs",
        "logprob_token_ids beside logprobs",
        "logprob_token_ids alone",
        "min_p",
        "logit_bias",
    ],
    "Structured output": [
        "structured output: JSON schema",
        "structured output: regex",
        "structured output: choice",
        "structured output: grammar",
        "structured output with preemption",
        "structured output behind reasoning",
    ],
    "Server": [
        "completions, streamed and not",
        "chat of several turns",
        "echo",
        "prompt embeddings",
        "tool calls: auto",
        "tool calls: required",
        "tool calls: named",
        "tool calls: streamed",
        "100 requests bound to schemas and tools",
        "several API servers",
        "metrics of each rank and each request",
    ],
    "Parallelism": [
        "tensor parallelism",
        "data parallelism",
        "Ray",
        "pipeline parallelism",
        "context parallelism",
    ],
    "Models": [
        "Qwen3",
        "Qwen2",
        "Llama",
        "Mistral",
        "tied embeddings",
        "untied embeddings",
        "merged checkpoints",
        "int8 targets (compressed-tensors, W8A8)",
        "int4 targets (compressed-tensors, W4A16)",
        "fp8 targets, quantized while loading",
        "heads in fp8",
        "a selector beside the head",
        "mixture of experts",
        "LoRA",
        "weights offloaded and prefetched",
        "sliding windows",
        "pooling models with method orthrus",
        "pooling models beside the plugin",
    ],
}


class Claim(NamedTuple):
    """A test's word that it is evidence for a feature."""

    feature: str
    verdict: str
    test: str  # path below tests/ and name


def listed() -> list[str]:
    return [name for names in FEATURES.values() for name in names]


def claims(folder: Path = TESTS) -> Iterator[Claim]:
    """Of all tests, read off their source: most cannot be imported without vLLM."""
    for path in sorted(folder.rglob("test_*.py")):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef):
                for decorator in function.decorator_list:
                    for node in ast.walk(decorator):
                        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.feature":
                            words = [ast.literal_eval(word) for word in node.args]
                            yield Claim(
                                words[0], *(words[1:] or ["works"]), f"{path.relative_to(folder)}::{function.name}"
                            )
