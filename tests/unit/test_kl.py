"""The fused objectives against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vllm_orthrus.training import kl
from vllm_orthrus.training.kl import cross_entropy, forward_kl

ROWS, STATES, HIDDEN, VOCAB = 301, 77, 24, 50


@pytest.fixture
def problem() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "student": torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True),
        "teacher": torch.randn(STATES, HIDDEN, generator=generator, dtype=torch.float64),
        "of_row": torch.randint(0, STATES, (ROWS,), generator=generator),
        "weight": torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64),
        "row_weights": torch.rand(ROWS, generator=generator, dtype=torch.float64) + 0.1,
    }


def plain_kl(student, teacher, of_row, weight, row_weights):  # type: ignore[no-untyped-def]
    log_s = torch.log_softmax(student @ weight.T, -1)
    t = torch.softmax(teacher[of_row] @ weight.T, -1)
    per_row = functional.kl_div(log_s, t, reduction="none").sum(-1)
    return (per_row * row_weights).sum() / row_weights.sum(), per_row


@pytest.mark.parametrize("chunk", [16, 64, 10_000])
def test_loss_and_gradient_are_autograds(
    problem: dict[str, torch.Tensor], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kl, "chunk_rows", lambda weight: chunk)
    expected, per_row = plain_kl(**problem)
    (expected_grad,) = torch.autograd.grad(expected, problem["student"])
    result = forward_kl(**problem)
    (grad,) = torch.autograd.grad(3 * result.loss, problem["student"])
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.per_row, per_row)
    torch.testing.assert_close(grad, 3 * expected_grad)
    students, teachers = (problem["student"] @ problem["weight"].T).argmax(-1), problem["teacher"] @ problem["weight"].T
    assert torch.equal(result.agreed, students == teachers.argmax(-1)[problem["of_row"]])


def test_each_teacher_distribution_is_computed_once(
    problem: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kl, "chunk_rows", lambda weight: 10_000)
    projected: list[int] = []
    sound = kl._log_softmax
    monkeypatch.setattr(
        kl, "_log_softmax", lambda states, weight: projected.append(len(states)) or sound(states, weight)
    )
    forward_kl(**problem)
    assert projected == [ROWS, len(problem["of_row"].unique())]


def test_no_gradient_for_teacher_or_vocabulary(problem: dict[str, torch.Tensor]) -> None:
    problem["teacher"].requires_grad_(True)
    problem["weight"].requires_grad_(True)
    forward_kl(**problem).loss.backward()
    assert problem["teacher"].grad is None and problem["weight"].grad is None


def test_cross_entropy_is_autograds(problem: dict[str, torch.Tensor]) -> None:
    student, weight, row_weights = problem["student"], problem["weight"], problem["row_weights"]
    labels = torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(1))
    losses = functional.cross_entropy(student @ weight.T, labels, reduction="none")
    expected = (losses * row_weights).sum() / row_weights.sum()
    (expected_grad,) = torch.autograd.grad(expected, student)
    result = cross_entropy(student, labels, weight, row_weights)
    (grad,) = torch.autograd.grad(result.loss, student)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_perfect_student_has_no_loss_and_no_gradient(problem: dict[str, torch.Tensor]) -> None:
    student = problem["teacher"][problem["of_row"]].clone().requires_grad_(True)
    result = forward_kl(student, problem["teacher"], problem["of_row"], problem["weight"], problem["row_weights"])
    result.loss.backward()
    assert result.loss.abs() < 1e-12 and student.grad is not None and student.grad.abs().max() < 1e-12
    assert result.agreed.all()
