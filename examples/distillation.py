"""Distillation: a 2-bit student learns the full-precision model's own outputs, by the divergence of one from the other.

python examples/distillation.py
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import lotion_fx


def divergence(student: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    """Mean KL divergence of the student's distribution from the teacher's, in nats."""
    with torch.no_grad():
        target = teacher(x)
    return lotion_fx.distillation_loss(student(x), target)


def main(steps: int = 300, method: str = "lotion") -> float:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10)).requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)

    lotion_fx.transform(student, "int2", method=method)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(steps):
        divergence(student, teacher, torch.randn(64, 32)).backward()
        optimizer.step()
        optimizer.zero_grad()
    student.eval()  # at its rounded weights
    return float(divergence(student, teacher, torch.randn(1024, 32, generator=torch.Generator().manual_seed(1))))


if __name__ == "__main__":
    for method in ("ptq", "lotion"):
        print(f"divergence of the 2-bit model from its teacher, {method}: {main(method=method):.4f} nats")
