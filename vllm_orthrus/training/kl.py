"""The training objective, fused with the vocabulary projection so that no [rows, vocab] tensor outlives its chunk.

For a row with student state h, teacher distribution t and output weights W:

    KL(t || s) = sum_v t_v (log t_v - log s_v),   s = softmax(W h),   d KL / d h = W^T (s - t)

The gradient needs nothing but s and t, so it is computed in the forward pass and only [rows, hidden] is kept.
Cross-entropy is the same with t one-hot.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Objective(NamedTuple):
    loss: Tensor  # scalar: weighted mean over rows
    per_row: Tensor  # [R] KL (or cross-entropy) of each row
    agreed: Tensor  # [R] bool: the most probable tokens of student and teacher are the same


def forward_kl(student: Tensor, teacher: Tensor, of_row: Tensor, weight: Tensor, row_weights: Tensor) -> Objective:
    """KL from teacher states [M, d] to student states [R, d]; row r is taught by teacher state `of_row[r]`.

    Many rows share a teacher state (blocks overlap), and its distribution is computed once for all of them.
    """
    order = torch.argsort(of_row, stable=True)
    loss, per_row, agreed = _fused_loss(student[order], weight, row_weights[order], teacher, of_row[order])
    inverse = torch.argsort(order)
    return Objective(loss, per_row[inverse], agreed[inverse])


def cross_entropy(student: Tensor, labels: Tensor, weight: Tensor, row_weights: Tensor) -> Objective:
    """Cross-entropy of student states [R, d] against the tokens [R] that really followed."""
    return _fused_loss(student, weight, row_weights, None, labels)


class _FusedLoss(torch.autograd.Function):
    """`target` is, with a teacher, the ascending teacher state of each row; without one, its label."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, weight: Tensor, row_weights: Tensor, teacher: Tensor | None, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad = torch.empty_like(student)
        per_row = student.new_empty(len(student), dtype=_accumulation(student))
        agreed = torch.empty(len(student), dtype=torch.bool, device=student.device)
        share = (row_weights / row_weights.sum()).to(per_row.dtype)
        for start in range(0, len(student), rows := chunk_rows(weight)):
            part = slice(start, start + rows)
            log_s = _log_softmax(student[part], weight)  # [C, V]
            s, top = log_s.exp(), log_s.argmax(-1)
            if teacher is None:
                labels = target[part, None]
                per_row[part] = -log_s.gather(1, labels).squeeze(1)
                agreed[part] = top == labels.squeeze(1)
                s.scatter_add_(1, labels, s.new_full(labels.shape, -1.0))
            else:
                distinct, of_row = torch.unique_consecutive(target[part], return_inverse=True)
                log_t = _log_softmax(teacher[distinct], weight)  # [distinct, V]
                agreed[part] = top == log_t.argmax(-1)[of_row]
                log_t = log_t[of_row]
                t = log_t.exp()
                per_row[part] = (t * (log_t - log_s)).sum(-1)
                s -= t
            grad[part] = ((s * share[part, None]).to(weight.dtype) @ weight).to(grad.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(per_row, agreed)
        return (per_row * share).sum(), per_row, agreed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None, None


def _fused_loss(
    student: Tensor, weight: Tensor, row_weights: Tensor, teacher: Tensor | None, target: Tensor
) -> Objective:
    return Objective(*_FusedLoss.apply(student, weight, row_weights, teacher, target))  # type: ignore[no-untyped-call]


def _log_softmax(states: Tensor, weight: Tensor) -> Tensor:
    return torch.log_softmax((states.to(weight.dtype) @ weight.T).to(_accumulation(states)), dim=-1)


def _accumulation(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def chunk_rows(weight: Tensor) -> int:
    """Rows per chunk: about 128 MiB of fp32 logits, whatever the vocabulary."""
    return max(16, (1 << 25) // weight.shape[0])
