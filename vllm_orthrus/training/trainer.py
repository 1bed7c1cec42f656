"""The training loop: a frozen base teaches its own diffusion view, on one process or many (`accelerate launch`)."""

from __future__ import annotations

import contextlib
import copy
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

from vllm_orthrus.training import checkpoints
from vllm_orthrus.training.blocks import anchor_places, draw_anchors, make_blocks
from vllm_orthrus.training.checkpoints import Progress
from vllm_orthrus.training.config import ConfigError, TrainConfig
from vllm_orthrus.training.dual_view import DualViewModel
from vllm_orthrus.training.evaluate import Acceptance, Setting, decode, first_per_class, read_prompts, summarise, table
from vllm_orthrus.training.kl import cross_entropy, forward_kl
from vllm_orthrus.training.metrics import MetricsLog, RowAgreement
from vllm_orthrus.training.packing import PackedRows, prepare_rows
from vllm_orthrus.training.parts import load_parts
from vllm_orthrus.training.reference import Reference
from vllm_orthrus.training.schedule import learning_rate, rows_of_step, seeded, total_steps
from vllm_orthrus.training.selector import Selector, SelectorWeights, Taught, selector_loss
from vllm_orthrus.training.views import published_name

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Trainer:
    def __init__(self, config: TrainConfig, resume: bool = False) -> None:
        self.config = config
        self.accelerator = Accelerator(
            gradient_accumulation_steps=self._rounds(1), cpu=not torch.accelerator.is_available()
        )
        self.accelerator.gradient_accumulation_steps = self._rounds(self.accelerator.num_processes)
        self.device: torch.device = self.accelerator.device
        self.main: bool = self.accelerator.is_main_process
        self.sharded = str(self.accelerator.distributed_type).endswith("FSDP")
        if self.sharded and config.evaluation.prompts:
            raise ConfigError(
                "evaluation.prompts cannot be used with FSDP: decoding calls parts of layers, which sharding does not "
                "allow. Unset it, and measure checkpoints with `vllm-orthrus head verify`."
            )
        if self.sharded and config.train != "head":
            raise ConfigError(
                f"train={config.train} cannot be used with FSDP: a selector's loss reads the base's embedding, which "
                "sharding takes away. Train it on each GPU whole (accelerate without FSDP); it is small."
            )
        self.tokenizer, self.base, self.head, self.head_config, self.selector = load_parts(
            config, self.device, self.sharded
        )
        held_out = config.evaluation.prompts
        self.prompts = read_prompts(Path(held_out), self.tokenizer) if held_out is not None else []
        self.rows = self._prepare_rows()
        self.steps = total_steps(config.run, len(self.rows))
        self.progress = Progress(0, 0, 0.0)
        self.folder = config.output / "checkpoints"
        newest = checkpoints.newest(self.folder)
        if newest is not None and not resume:
            raise ConfigError(
                f"output={config.output} already holds {newest.name} of an earlier run. Continue it with --resume, or "
                "choose another output."
            )
        optimizer_state = None
        if newest is not None:
            self.progress, optimizer_state = checkpoints.restore(newest, config, self.head, self.selector)
        # The output weights are borrowed by the loss; sharding must not take them away from it.
        self.output_weight: Tensor = (
            self.base.lm_head.weight.detach().clone() if self.sharded else self.base.lm_head.weight
        )
        model = DualViewModel(self.base, self.head, self._attention(), config.run.recompute, self.selector)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        settings = config.optimizer
        optimizer = torch.optim.AdamW(
            trained, settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if optimizer_state is not None:
            set_optimizer_state_dict(self._plain_model(), self._plain_optimizer(), optimizer_state, options=_WHOLE)
        self.metrics = MetricsLog(config.output / "metrics.jsonl", self.progress.step) if self.main else None

    # Setting up

    def _rounds(self, processes: int) -> int:
        """Forward passes per optimizer step and process."""
        per_round = self.config.run.rows_per_device * processes
        rounds, rest = divmod(self.config.run.rows_per_step, per_round)
        if rest or not rounds:
            raise ConfigError(
                f"run.rows_per_step={self.config.run.rows_per_step} is not a multiple of run.rows_per_device="
                f"{self.config.run.rows_per_device} times {processes} processes. Change one of them."
            )
        return rounds

    def _prepare_rows(self) -> PackedRows:
        with self.accelerator.main_process_first():  # the others then find the packed rows on disk
            rows = prepare_rows(
                self.config.data,
                self.tokenizer,
                self.head_config.mask_token_id,
                self.config.output / "data",
                self.main,
            )
        return rows

    def _attention(self) -> Any:
        kind = self.config.run.attention
        return kind if kind != "auto" else "flex" if self.device.type == "cuda" else "dense"

    def _plain_model(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer

    # The loop

    def run(self) -> Path:
        """Train to the end (or to `max_minutes`), export the head, and return its folder."""
        started = time.monotonic() - self.progress.seconds
        bar = tqdm(total=self.steps, initial=self.progress.step, desc="training", unit="step", disable=not self.main)
        for step in range(self.progress.step, self.steps):
            loss, agreement = self._step(step)
            tokens = self.progress.tokens + self.config.run.rows_per_step * self.config.data.row_length
            self.progress = Progress(step + 1, tokens, time.monotonic() - started)
            bar.update()
            self._log(loss, agreement, bar)
            limit = self.config.run.max_minutes
            over = self._anywhere(limit is not None and self.progress.seconds > 60 * limit)
            if self.progress.step % self.config.run.checkpoint_every == 0 or over or self.progress.step == self.steps:
                self._save_checkpoint()
            if over:
                break
            if self.progress.step % self.config.evaluation.every == 0 and self.progress.step < self.steps:
                self._evaluate(self.config.evaluation.per_class)
        bar.close()
        return self._finish()

    def _step(self, step: int) -> tuple[float, RowAgreement]:
        """One optimizer step on this process's share of the step's rows."""
        run = self.config.run
        drawn = rows_of_step(step, run.rows_per_step, len(self.rows), self.config.seed)
        mine = drawn[self.accelerator.process_index :: self.accelerator.num_processes]
        rate = learning_rate(step, self.steps, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total, agreement = 0.0, RowAgreement.empty(self.head_config.block_size)
        for start in range(0, len(mine), run.rows_per_device):
            with self.accelerator.accumulate(self.model):
                loss, seen = self._loss(mine[start : start + run.rows_per_device])
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += float(loss.detach()) * run.rows_per_device / len(mine)
            agreement = agreement + seen
        return total, agreement

    def _loss(self, drawn: list[tuple[int, int]]) -> tuple[Tensor, RowAgreement]:
        """The objective on a few packed rows, given as (epoch, row)."""
        objective, width = self.config.objective, self.head_config.block_size
        rows = self.rows.take([row for _, row in drawn])
        places = anchor_places(rows, width)
        # Anchors depend on epoch and row alone, not on the batch, the process or what was drawn before.
        anchors, real = (
            torch.cat(part)
            for part in zip(
                *(
                    draw_anchors(places[i : i + 1], objective.anchors_per_row, seeded(self.config.seed, epoch, row, 1))
                    for i, (epoch, row) in enumerate(drawn)
                ),
                strict=True,
            )
        )
        rows = rows.to(self.device)
        blocks = make_blocks(rows, anchors.to(self.device), real.to(self.device), width, self.head_config.mask_token_id)
        with self._precision():
            states = self.model(rows, blocks)
            taught = blocks.taught
            if not taught.any():  # nothing to learn here, but every process must take part in the backward pass
                nothing: Tensor = sum(weight.sum() for weight in self.model.parameters() if weight.requires_grad) * 0.0
                return nothing, RowAgreement.empty(width)
            place = torch.arange(width, device=self.device).expand_as(taught)[taught]
            row = torch.arange(len(taught), device=self.device)[:, None, None].expand_as(taught)[taught]
            batch = Taught(
                states.student[taught],
                place,
                rows.tokens.flatten(),
                states.teacher.flatten(0, 1),
                row * rows.tokens.shape[1] + blocks.teacher[taught],
                objective.position_decay ** place.float(),
            )
            if self.selector is None:
                return self._head_loss(batch)
            loss, agreement = self._selector_loss(self.selector, batch)
            if self.config.train == "both":
                alone, agreement = self._head_loss(batch)
                loss = loss + alone
            return loss, agreement

    def _head_loss(self, batch: Taught) -> tuple[Tensor, RowAgreement]:
        if self.config.objective.kind == "kl":
            result = forward_kl(batch.student, batch.teacher, batch.of_row, self.output_weight, batch.weights)
        else:
            labels = batch.tokens[batch.of_row + 1]
            result = cross_entropy(batch.student, labels, self.output_weight, batch.weights)
        return result.loss, RowAgreement.count(batch.place, result.agreed, self.head_config.block_size)

    def _selector_loss(self, selector: SelectorWeights, batch: Taught) -> tuple[Tensor, RowAgreement]:
        result = selector_loss(
            selector, batch, self.base.model.embed_tokens.weight, self.output_weight, self.config.selector.loss
        )
        return result.loss, RowAgreement.count(batch.place, result.right, self.head_config.block_size)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16")

    def _anywhere(self, flag: bool) -> bool:
        """Whether any process says so: all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.device)).item())

    # Metrics, checkpoints and the finished head

    def _log(self, loss: float, agreement: RowAgreement, bar: Any) -> None:
        if self.progress.step % self.config.run.log_every and self.progress.step != self.steps:
            return
        if self.accelerator.num_processes > 1:
            loss = float(self.accelerator.reduce(torch.tensor(loss, device=self.device), "mean"))
            agreement = agreement.summed(self.accelerator.reduce, self.device)
        if self.metrics is None:
            return
        expected = agreement.tokens_per_cycle()
        bar.set_postfix(loss=f"{loss:.3f}", teacher_forced=f"{expected:.2f}")
        self.metrics.write(
            step=self.progress.step,
            loss=loss,
            teacher_forced_tokens_per_cycle=expected,
            agreement=agreement.rates(),
            learning_rate=learning_rate(self.progress.step - 1, self.steps, self.config.optimizer),
            tokens=self.progress.tokens,
            seconds=self.progress.seconds,
        )

    def _weights(self) -> checkpoints.Weights:
        """What is trained under its published names, gathered from all processes."""
        state: dict[str, Any] = get_model_state_dict(
            self._plain_model(),
            options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True),
        )
        head = {published_name(name): tensor for name, tensor in state.items() if not name.startswith("selector.")}
        with torch.no_grad():
            selector = {} if self.selector is None else self.selector.parts()
        return checkpoints.Weights(head, {part: tensor.cpu() for part, tensor in selector.items()})

    def _save_checkpoint(self) -> None:
        weights = self._weights()  # every process takes part in gathering
        optimizer = get_optimizer_state_dict(self._plain_model(), self._plain_optimizer(), options=_WHOLE)
        if self.main:
            checkpoints.save(self.folder, self.progress, weights, self.head_config, optimizer, self.config)
        self.accelerator.wait_for_everyone()

    def _reference(self) -> Reference:
        # A copy in the base's dtype: decoding needs neither fp32 masters nor autocast.
        selector = None
        if self.selector is not None:
            with torch.no_grad():
                parts, embedding = self.selector.parts(), self.base.model.embed_tokens.weight
                selector = Selector.of(self.selector.shape, parts, embedding)
        return Reference(self.base, copy.deepcopy(self.head).to(self.base.dtype), self.head_config, selector)

    def _evaluate(self, per_class: int | None) -> dict[str, Acceptance]:
        """Decode held-out prompts, every process its share of them, and log tokens per cycle."""
        if not self.prompts:
            return {}
        prompts, processes = first_per_class(self.prompts, per_class), self.accelerator.num_processes
        shares = [prompts[rank::processes] for rank in range(processes)]
        settings = self.config.evaluation
        mine = decode(
            self._reference(),
            shares[self.accelerator.process_index],
            [self.tokenizer.eos_token_id],
            Setting(max_new_tokens=settings.max_new_tokens, batch=settings.batch),
            show_progress=self.main and per_class is None,
        )
        results = summarise(list(chain(*shares)), gather_object(mine))
        if self.metrics is not None:
            measured = {kind: result.tokens_per_cycle for kind, result in results.items()}
            self.metrics.write(step=self.progress.step, tokens_per_cycle=measured)
            summary = ", ".join(f"{kind} {value:.2f}" for kind, value in measured.items())
            tqdm.write(f"step {self.progress.step}: tokens per cycle: {summary}")
        return results

    def _finish(self) -> Path:
        target = self.config.output / ("selector" if self.config.train == "selector" else "head")
        weights = self._weights()
        if self.main:
            dtype = torch.bfloat16 if self.config.head.dtype == "bf16" else torch.float32
            checkpoints.export(target, weights.to(dtype), self.head_config)
        results = self._evaluate(None)
        if results and self.main:
            tqdm.write(table(results))
        self.accelerator.end_training()
        return target


def train(config: TrainConfig, resume: bool = False) -> Path:
    return Trainer(config, resume).run()
