"""What a benchmark was asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_orthrus.bench.ways import Way
from vllm_orthrus.errors import UserError

# What the benchmark sets itself, for all ways alike.
OWN = ("--dtype", "--speculative-config", "-sc", "--model", "--host", "--port", "--served-model-name", "--api-key")
SHARE = {"gpu": 0.9, "cpu": 0.6}  # of the memory, for all engines that are up


@dataclass(frozen=True)
class Settings:
    model: str
    ways: list[Way]
    tokens: int
    temperature: float
    dtype: str
    options: list[str]  # of `vllm serve`
    ignore_eos: bool
    logs: Path
    further: Mapping[str, str] = field(default_factory=dict)  # variables for all ways alike

    @property
    def exact(self) -> bool:
        """vLLM's own choice is never float32, not even for checkpoints that are."""
        return self.dtype == "float32"

    @property
    def variables(self) -> dict[str, str]:
        """Triton's products of float32 are otherwise TF32 on a GPU, and near ties would fall either way."""
        return dict(self.further) | ({"TRITON_F32_DEFAULT": "ieee"} if self.exact else {})

    def serve_options(self, at_once: int) -> list[str]:
        """For each of so many engines that are up together. The user's own come last, and win."""
        import torch

        share = SHARE["gpu" if torch.cuda.is_available() else "cpu"] / at_once
        ours = ["--dtype", self.dtype, "--no-enable-prefix-caching", "--gpu-memory-utilization", f"{share:.3f}"]
        return ours + self.options


def check_options(options: Sequence[str]) -> list[str]:
    for option in options:
        name = option.partition("=")[0]
        if name in OWN or name.startswith("--spec"):
            raise UserError(
                f"{option}: not among the further options, as the benchmark sets it for each way. There are --model, "
                "--dtype and --against for that."
            )
    return list(options)
