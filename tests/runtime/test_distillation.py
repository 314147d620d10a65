"""`distillation_loss` against torch's own divergence and sums in float64."""

import pytest
import torch
import torch.nn.functional as F

import lotion_fx


def logits(seed, dtype=torch.float32):
    return 3 * torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_the_mean_divergence(temperature):
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    loss = lotion_fx.distillation_loss(student, teacher, temperature)
    p, q = ((x.detach().double() / temperature).softmax(-1) for x in (teacher, student))
    assert loss.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    rows = [(x.flatten(0, 1) / temperature).log_softmax(-1) for x in (student, teacher)]
    torch.testing.assert_close(loss, F.kl_div(*rows, reduction="batchmean", log_target=True))
    loss.backward()
    torch.testing.assert_close(student.grad, ((q - p) / temperature / 20).float(), rtol=1e-4, atol=1e-7)
    assert teacher.grad is None


def test_masked_rows_are_left_out():
    student, teacher, mask = logits(0), logits(1), torch.rand(4, 5) < 0.5
    masked = lotion_fx.distillation_loss(student, teacher, mask=mask)
    torch.testing.assert_close(masked, lotion_fx.distillation_loss(student[mask], teacher[mask]))
    student[~mask] = float("nan")
    torch.testing.assert_close(lotion_fx.distillation_loss(student, teacher, mask=mask), masked)
    assert lotion_fx.distillation_loss(student, teacher, mask=torch.zeros(4, 5, dtype=torch.bool)) == 0


def test_it_keeps_float64_widens_bfloat16_and_takes_excluded_classes():
    assert lotion_fx.distillation_loss(logits(0, torch.float64), logits(1, torch.float64)).dtype == torch.float64
    assert lotion_fx.distillation_loss(logits(0, torch.bfloat16), logits(1, torch.bfloat16)).dtype == torch.float32
    student, teacher = logits(0), logits(1)
    teacher[..., 0] = -torch.inf
    assert lotion_fx.distillation_loss(student, teacher).isfinite()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((logits(0), logits(1)[0]), r"teacher_logits: of shape \(5, 7\), expected the student's \(4, 5, 7\)"),
        ((logits(0).long(), logits(1)), "student_logits=.*floating-point"),
        ((logits(0), logits(1), 0), "temperature=0: expected a finite number above 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lotion_fx.distillation_loss(*arguments)
    with pytest.raises(ValueError, match="mask=.*expected a bool tensor"):
        lotion_fx.distillation_loss(logits(0), logits(1), mask=torch.ones(4))
