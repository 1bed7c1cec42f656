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
    window = max(1, len(training) // 20)  # a single step sees too few blocks to tell
    for shade, part in enumerate((0.0, 0.25, 0.5, 1.0)):
        end = max(window, round(part * len(training)))
        lines = training[end - window : end]
        rates = [sum(row) / len(row) for row in zip(*(line["agreement"] for line in lines), strict=False)]
        axes.plot(range(1, len(rates) + 1), rates, color="tab:green", alpha=0.25 + 0.25 * shade)
        axes.annotate(f"to step {lines[-1]['step']}", (len(rates), rates[-1]), fontsize=8)
    axes.set(title="rows whose first choice is the teacher's", xlabel="row of the block", ylim=(0, 1))
    axes.grid(alpha=0.3)


def _draw_cycles(axes: Any, training: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    """Lines: the sample of prompts that is decoded while training. Stars: all prompts, at the end."""
    if not evaluations:
        expected = [line["teacher_forced_tokens_per_cycle"] for line in training]
        axes.plot([line["step"] for line in training], _smooth(expected), label="teacher-forced estimate")
    last = training[-1]["step"]
    for kind in evaluations[-1]["tokens_per_cycle"] if evaluations else ():
        points = [(line["step"], line["tokens_per_cycle"].get(kind)) for line in evaluations]
        sampled, final = [point for point in points if point[0] < last], points[-1]
        style = {"linewidth": 2.5, "color": "black"} if kind == "all" else {}
        label = f"{kind} ({final[1]:.2f})"
        (line,) = axes.plot(*zip(*(sampled or [final]), strict=True), marker="o", markersize=3, label=label, **style)
        if final[0] == last:
            axes.plot(*final, marker="*", markersize=10, color=line.get_color())
    axes.set(title="tokens per cycle, held out (stars: all prompts)", xlabel="step", ylim=(1, None))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, without the pull towards the first value."""
    smoothed, running, seen = [], 0.0, 0.0
    for value in values:
        running = weight * running + (1 - weight) * value
        seen = weight * seen + (1 - weight)
        smoothed.append(running / seen)
    return smoothed
