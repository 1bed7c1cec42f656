"""The curves of a run as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_orthrus.training.config import ConfigError
from vllm_orthrus.training.metrics import read_metrics


def draw_report(run: Path, picture: Path) -> None:
    """Loss, teacher-forced agreement by block row, and real tokens per cycle, from `run/metrics.jsonl`."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("`vllm-orthrus report` draws with matplotlib: pip install 'vllm-orthrus[train]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist. Give the `output` folder of a training run.")
    lines = read_metrics(path)
    training = [line for line in lines if "loss" in line]
    if not training:
        raise ConfigError(f"{path} holds no training steps yet.")
    figure, (loss, rows, cycles) = pyplot.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    figure.suptitle(f"{run}: {training[-1]['tokens'] / 1e6:.1f} M tokens in {training[-1]['seconds'] / 60:.0f} minutes")
    _draw_loss(loss, training)
    _draw_rows(rows, training)
    _draw_cycles(cycles, training, [line for line in lines if "tokens_per_cycle" in line])
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)


def _draw_loss(axes: Any, training: list[dict[str, Any]]) -> None:
    steps, losses = [line["step"] for line in training], [line["loss"] for line in training]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25)
    axes.plot(steps, _smooth(losses), color="tab:blue")
    axes.set(title="loss (KL from the AR view)", xlabel="step", yscale="log")
    axes.grid(alpha=0.3)


def _draw_rows(axes: Any, training: list[dict[str, Any]]) -> None:
    """One line per stage of the run: how far down the block the drafts are right."""
    stages = sorted({round(part * (len(training) - 1)) for part in (0.05, 0.25, 0.5, 1.0)})
    for shade, index in enumerate(stages):
        line = training[index]
        places = range(1, len(line["agreement"]) + 1)
        axes.plot(places, line["agreement"], color="tab:green", alpha=0.25 + 0.75 * shade / max(1, len(stages) - 1))
        axes.annotate(f"step {line['step']}", (places[-1], line["agreement"][-1]), fontsize=8)
    axes.set(title="rows whose first choice is the teacher's", xlabel="row of the block", ylim=(0, 1))
    axes.grid(alpha=0.3)


def _draw_cycles(axes: Any, training: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    if not evaluations:
        expected = [line["teacher_forced_tokens_per_cycle"] for line in training]
        axes.plot([line["step"] for line in training], expected, label="teacher-forced estimate")
    for kind in evaluations[-1]["tokens_per_cycle"] if evaluations else ():
        points = [
            (line["step"], line["tokens_per_cycle"][kind]) for line in evaluations if kind in line["tokens_per_cycle"]
        ]
        style = {"linewidth": 2.5, "color": "black"} if kind == "all" else {}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{kind} ({points[-1][1]:.2f})", **style)
    axes.set(title="tokens per cycle on held-out prompts", xlabel="step", ylim=(1, None))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average."""
    smoothed, running = [], values[0]
    for value in values:
        running = weight * running + (1 - weight) * value
        smoothed.append(running)
    return smoothed
