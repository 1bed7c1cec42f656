"""Self-generation: a base's own answers to a list of prompts, which is what its head should learn to draft."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_orthrus.training.config import ConfigError
from vllm_orthrus.training.reference import load_base
from vllm_orthrus.training.samples import encode_prompt, read_jsonl

Engine = Literal["vllm", "transformers"]
Answer = Callable[[list[list[int]]], list[list[int]]]


class AnswerSettings(NamedTuple):
    base: str
    prompts: Path
    output: Path
    engine: Engine = "vllm"
    temperature: float = 0.0
    max_new_tokens: int = 1024
    batch: int = 256
    limit: int | None = None
    seed: int = 0
    options: Mapping[str, Any] = MappingProxyType({})  # of vLLM's engine


def write_answers(settings: AnswerSettings) -> int:
    """Append an answer for every prompt that `output` doesn't hold yet; returns how many were written.

    A line keeps its prompt's columns and gains `prompt_token_ids` and `answer_token_ids`, which the trainer takes as
    they are: text would not always tokenise back to what the model said.
    """
    tokenizer = AutoTokenizer.from_pretrained(settings.base, trust_remote_code=False)
    records = list(read_jsonl(settings.prompts))[: settings.limit]
    if not records or "prompt" not in records[0]:
        columns = sorted(records[0]) if records else "no lines"
        raise ConfigError(f"{settings.prompts} has {columns}; it must have lines with a `prompt`.")
    done = sum(1 for _ in read_jsonl(settings.output)) if settings.output.is_file() else 0
    left = records[done:]
    if not left:
        return 0
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    answer = _with_vllm(settings) if settings.engine == "vllm" else _with_transformers(settings, tokenizer)
    with settings.output.open("a") as file, tqdm(total=len(records), initial=done, desc="answering") as bar:
        for start in range(0, len(left), settings.batch):
            part = left[start : start + settings.batch]
            prompts = [encode_prompt(tokenizer, record["prompt"]) for record in part]
            for record, prompt, tokens in zip(part, prompts, answer(prompts), strict=True):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                line = {**record, "answer": text, "prompt_token_ids": prompt, "answer_token_ids": tokens}
                file.write(json.dumps(line) + "\n")
            file.flush()
            bar.update(len(part))
    return len(left)


def _with_vllm(settings: AnswerSettings) -> Answer:
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ConfigError("--engine vllm needs vLLM: install it, or use --engine transformers.") from error
    engine = LLM(settings.base, seed=settings.seed, **settings.options)
    sampling = SamplingParams(temperature=settings.temperature, max_tokens=settings.max_new_tokens)

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return answer


def _with_transformers(settings: AnswerSettings, tokenizer: PreTrainedTokenizerBase) -> Answer:
    cuda = torch.cuda.is_available()
    model: Any = load_base(settings.base, torch.bfloat16 if cuda else torch.float32)
    model = model.to("cuda") if cuda else model
    torch.manual_seed(settings.seed)
    sampling = (
        {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {"do_sample": False}
    )
    end = tokenizer.eos_token_id

    @torch.inference_mode()
    def answer(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        # Left padding: every prompt ends where its answer begins.
        ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=end,
            pad_token_id=end,
            **sampling,
        )
        return [_until(row, end) for row in output[:, longest:].tolist()]

    return answer


def _until(tokens: list[int], end: int) -> list[int]:
    """Up to and including the first end token; what follows is padding."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
