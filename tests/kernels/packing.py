"""Packed weights and poisoned memory, for the tests of kernels that multiply by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format


def packed(w: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, stored scales and the tensor's scale of a weight rounded to nearest, by the format's own methods."""
    block_scale, tensor_scale = rounding.scale_parts(w, fmt)
    scale = block_scale if tensor_scale is None else block_scale * tensor_scale
    level = fmt.grid.nearest(rounding.to_blocks(w, fmt) / scale)
    codes = rounding.from_blocks(fmt.grid.encode(level), fmt, -1, w.shape)
    if fmt.grid.bits <= 4:
        # Nibbles past the end hold any code.
        codes = torch.cat([codes, codes[:, :1] | 9], 1) if codes.shape[1] % 2 else codes
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    stored = getattr(fmt.law, "type", None)
    scales = block_scale.squeeze(-1)
    return codes.contiguous(), scales if stored is None else stored.encode(scales), tensor_scale


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher allocates holds NaN, or 0xAA, until a kernel writes it."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *args: Any, **options: Any) -> Tensor:
        empty = new_empty(self, *args, **options)
        return empty.fill_(torch.nan if empty.is_floating_point() else 0xAA)

    monkeypatch.setattr(Tensor, "new_empty", filled)


def excess(y: Tensor, exact: Tensor, magnitude: Tensor) -> Tensor:
    """How far ``y`` is past one unit in the last place of its dtype, as a share of the terms' magnitudes.

    float32 has no such unit here: its share is the whole error.
    """
    ulp = 0.0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps
    return ((y.double() - exact).abs() - ulp * exact.abs()) / magnitude.clamp(min=1e-30)
