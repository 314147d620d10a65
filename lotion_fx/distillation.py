"""`distillation_loss`: how far a student's distribution is from its teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from lotion_fx.scalars import check_number, shown


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, mask: Tensor | None = None
) -> Tensor:
    """``KL(teacher || student)``, in nats, of softmax distributions along the last dimension, its mean over positions.

    Computed in float32 (float64 of float64 logits). No gradient goes to the teacher. The factor ``temperature^2`` by
    which some keep gradients alike is left to the caller.

    Args:
        student_logits, teacher_logits: of one shape [..., classes], floating-point.
        temperature: by which both are divided.
        mask: bool [...]; positions where it is False are left out. None takes all.

    Returns:
        0-d; 0 where no position is left.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, section 2.
    """
    for name, value in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
            raise TypeError(f"{name}={shown(value)}: expected a floating-point tensor [..., classes] of logits")
    shape = tuple(student_logits.shape)
    if tuple(teacher_logits.shape) != shape:
        raise ValueError(f"teacher_logits: of shape {tuple(teacher_logits.shape)}, expected the student's {shape}")
    check_number("temperature", temperature, lambda x: 0 < x < float("inf"), "a finite number above 0")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape[:-1]):
        raise ValueError(f"mask={shown(mask)}: expected a bool tensor of shape {shape[:-1]}, True where a row counts")
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    student = (student_logits.to(dtype) / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach().to(dtype) / temperature).log_softmax(-1)
    # A class that the teacher excludes, with a logit of -inf, adds 0 whatever the student's is.
    each = torch.where(teacher > -torch.inf, teacher.exp() * (teacher - student), 0.0).sum(-1)
    if mask is None:
        return each.mean()
    return torch.where(mask, each, 0.0).sum() / mask.sum().clamp(min=1)
