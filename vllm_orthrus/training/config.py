"""Settings of a training run. The defaults are the published recipe; `examples/` holds complete files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from vllm_orthrus.errors import UserError

Fraction = Annotated[float, Field(ge=0, le=1)]


class ConfigError(UserError):
    """A setting that cannot work; the message says which one, its value, and what to do."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Where the training text comes from. Prompts are read, answers are learned."""

    source: str
    """A .jsonl, .json, .parquet or .txt file, a folder of those, or the name of a Hugging Face dataset."""
    subset: str | None = None
    split: str = "train"
    messages_column: str = "messages"
    """A chat: a list of {"role", "content"}. Used where the column exists."""
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    """A single exchange, put through the chat template. Used where the columns exist and there is no chat."""
    text_column: str = "text"
    """Plain text, learned throughout. Used where there is neither a chat nor a prompt."""
    limit: PositiveInt | None = None
    """Read at most so many samples."""
    row_length: PositiveInt = 2048
    """Tokens per packed row; longer samples are cut."""


class HeadSettings(Section):
    block_size: PositiveInt = 32
    mask_token_id: int | None = None
    """Default: the tokenizer's mask token, else the first spare row of the embedding (as in the published heads)."""
    initial: str | None = None
    """A head to start from instead of copies of the base's attention."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the exported head. Checkpoints keep fp32."""


class ObjectiveConfig(Section):
    kind: Literal["kl", "ce"] = "kl"
    """`kl`: forward KL from the AR view. `ce`: cross-entropy on the tokens of the data."""
    anchors_per_row: PositiveInt = 256
    position_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Weight of row i is position_decay**i: below 1, early rows matter more, since a rejected draft ends its block."""


SelectorLoss = Literal["ce", "ce_tv", "kl"]


class SelectorSettings(Section):
    """What reads the draft before, on top of a head."""

    rank: PositiveInt = 64
    candidates: Annotated[int, Field(ge=2, le=64)] = 16
    """The likeliest tokens of a row that it chooses from."""
    loss: SelectorLoss = "ce"
    """`ce`: name the AR view's token; its probabilities then tell well how many drafts will be kept. `kl`: say what the
    AR view says of all candidates, for drafts that are drawn. `ce_tv`: 0.1 of the first and 0.9 of total variation."""
    initial: str | None = None
    """A selector to start from."""


class OptimizerConfig(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    final_ratio: Fraction = 0.1
    """The cosine ends at learning_rate * final_ratio."""
    warmup: Fraction = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0


class RunConfig(Section):
    rows_per_step: PositiveInt = 128
    """Packed rows per optimizer step, over all processes and accumulation rounds."""
    rows_per_device: PositiveInt = 1
    """Packed rows per forward pass of one process."""
    epochs: Annotated[float, Field(gt=0)] = 2.0
    max_steps: PositiveInt | None = None
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop (with a checkpoint) after so long; the learning-rate schedule still follows the number of steps."""
    precision: Literal["bf16", "fp32"] = "bf16"
    attention: Literal["auto", "dense", "flex"] = "auto"
    """`auto`: FlexAttention on a GPU, dense elsewhere."""
    recompute: bool = False
    """Trade time for memory: recompute the diffusion view's activations in the backward pass."""
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 10


class EvaluationConfig(Section):
    """Real tokens per cycle, by running the two-pass loop on prompts that were held out."""

    prompts: str | None = None
    """JSONL with `prompt` and optionally `class`; none: no evaluation."""
    every: PositiveInt = 500
    max_new_tokens: PositiveInt = 128
    per_class: PositiveInt = 8
    """Prompts of each class that are used while training; the last evaluation uses all."""
    batch: PositiveInt = 32


Trained = Literal["head", "selector", "both"]


class TrainConfig(Section):
    base: str
    output: Path
    revision: str | None = None
    seed: int = 0
    train: Trained = "head"
    """`selector`: of a head that stays as it is, `head.initial`."""
    data: DataConfig
    head: HeadSettings = HeadSettings()
    selector: SelectorSettings = SelectorSettings()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _block_fits_row(self) -> TrainConfig:
        if self.head.block_size >= self.data.row_length:
            raise ValueError(
                f"head.block_size={self.head.block_size} must be smaller than data.row_length={self.data.row_length}: "
                "a block needs a prefix. Lengthen the rows or narrow the block."
            )
        return self

    @model_validator(mode="after")
    def _selector_has_a_head(self) -> TrainConfig:
        if self.train == "selector" and self.head.initial is None:
            raise ValueError(
                "train=selector trains what chooses among a head's drafts, and head.initial names none. Name the head "
                "(--head on the command line), or set train to both."
            )
        return self

    @classmethod
    def read(cls, path: Path, overrides: list[str] | None = None) -> TrainConfig:
        """Read a YAML file, then apply overrides such as `run.max_steps=100`."""
        if not path.is_file():
            raise ConfigError(f"--config {path} is not a file. Start from examples/tiny-orthrus/train.yaml.")
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict):
            raise ConfigError(f"{path} must hold settings such as `base: Qwen/Qwen3-8B`, not {type(content).__name__}.")
        for override in overrides or []:
            _apply(content, override)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc'])) or 'config'}: {fault['msg']}" for fault in error.errors()]
            raise ConfigError(f"{path}: " + "; ".join(faults)) from error


def _apply(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override!r} must look like run.max_steps=100.")
    *sections, name = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {override!r}: {section} is not a section.")
    content[name] = yaml.safe_load(value)
