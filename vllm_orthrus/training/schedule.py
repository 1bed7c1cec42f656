"""What happens at which step, as pure functions of the settings and the step: the reason why resuming is exact."""

from __future__ import annotations

import math

import torch

from vllm_orthrus.training.config import OptimizerConfig, RunConfig


def total_steps(run: RunConfig, num_rows: int) -> int:
    return run.max_steps or max(1, math.ceil(run.epochs * num_rows / run.rows_per_step))


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Linear warm-up, then a cosine down to `final_ratio` of the peak."""
    warmup = max(1, round(optimizer.warmup * steps))
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    ratio = optimizer.final_ratio + (1 - optimizer.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.learning_rate * ratio


def rows_of_step(step: int, rows_per_step: int, num_rows: int, seed: int) -> list[tuple[int, int]]:
    """The (epoch, row) pairs of a step: epochs, each in its own order, laid end to end and cut into steps."""
    orders: dict[int, list[int]] = {}
    result = []
    for index in range(step * rows_per_step, (step + 1) * rows_per_step):
        epoch, place = divmod(index, num_rows)
        if epoch not in orders:
            orders[epoch] = torch.randperm(num_rows, generator=seeded(seed, epoch)).tolist()
        result.append((epoch, orders[epoch][place]))
    return result


def seeded(*parts: int) -> torch.Generator:
    """A generator that depends on nothing but `parts`."""
    state = 0
    for part in parts:  # a multiplicative mix keeps (1, 2) and (2, 1) apart
        state = (state * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(state)
