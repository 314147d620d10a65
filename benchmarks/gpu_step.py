"""What a training step of a transformed GPT costs beside the plain compiled step, on one device.

One process, all models from one seed, rounds interleaved in a random order (`timing`). Peak memory is that of a model's
own first steps, above what was allocated before it was made.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from lotion_fx.kernels.emit.emitted import Block
from lotion_fx.timing import interleaved, seconds

METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain again": None,  # its spread is the noise
    "ste": {"method": "ste"},
    "lotion factored": {"curvature": "factored"},
    "lotion full": {"curvature": "full"},
    "lotion fisher": {"curvature": "fisher"},
}


@dataclass(frozen=True)
class Size:
    """A model and its batch; by default GPT-2 small, 124 million parameters with the tied head, 8 x 1024 tokens."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    vocabulary: int = 50304
    length: int = 1024
    batch: int = 8


TINY = Size(width=32, depth=1, heads=2, vocabulary=64, length=8, batch=2)


class GPT(nn.Module):
    """A decoder whose head is its embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.length, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks(self.token(ids) + self.position.weight)
        return F.linear(self.norm(x), self.token.weight)


def step_of(
    settings: Mapping[str, Any] | None, size: Size, device: torch.device, inner: str
) -> tuple[nn.Module, Callable[[], None]]:
    """A model, bfloat16 under autocast with float32 parameters, and the function that takes one step with it."""
    torch.manual_seed(0)
    model = GPT(size).to(device)
    if settings is None:
        model.compile(backend=inner)
    else:
        lotion_fx.transform(model, "nvfp4", inner=inner, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    ids = torch.randint(size.vocabulary, (size.batch, size.length + 1), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(ids[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        optimizer.step()

    return model, step


def rows(
    device: torch.device, size: Size, *, inner: str = "inductor", rounds: int = 20, until: float = float("inf")
) -> list[dict[str, Any]]:
    """A row a method: its ratios, its peak memory over what was there before, the seconds of its first steps.

    Args:
        inner: what compiles.
        until: by `time.monotonic`, when to compile no further method; one left out says so.
    """
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], float]] = {}
    for name, settings in METHODS.items():
        if time.monotonic() > until:
            found[name] = {"error": "left out: the time was up"}
            continue
        try:
            found[name], steps[name] = _first_steps(settings, size, device, inner)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    if "plain" in steps:
        for name, timed in interleaved(steps, rounds).items():
            found[name] |= timed
    return [{"method": name, **row} for name, row in found.items()]


def _first_steps(
    settings: Mapping[str, Any] | None, size: Size, device: torch.device, inner: str
) -> tuple[dict[str, Any], Callable[[], float]]:
    """What a method's first steps cost, compilation included, and its step."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    model, step = step_of(settings, size, device, inner)
    for _ in range(3):  # Adam's second moment exists from the second on, and curvature="fisher" compiles once more
        step()
    row: dict[str, Any] = {"first_steps_s": time.perf_counter() - began}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if on_gpu:
        row["peak_memory_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return row, lambda: seconds(step, device)
