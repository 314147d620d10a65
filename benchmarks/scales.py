"""What 16-bit block scales and a power-of-two tensor scale cost in signal to quantization noise.

python benchmarks/scales.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from lotion_fx.numerics.formats import resolve
from lotion_fx.numerics.rounding import rtn

FORMATS = ("int2", "int3", "int4", "int4/tensor", "int5", "int6", "int8", "int8/32", "fp4", "fp8", "nf4")


def weights(size: int = 1024) -> dict[str, Tensor]:
    """Normal weights, Student's with three degrees of freedom, and normal ones whose rows differ in size."""
    g = torch.Generator().manual_seed(0)
    normal, scaled, row, over = (torch.randn(size, n, generator=g) for n in (size, size, 1, size))
    chi = torch.randn(3, size, size, generator=g).square().mean(0).sqrt()
    return {"normal": 0.02 * normal, "student-t3": 0.02 * over / chi, "rows": 0.02 * scaled * row.exp()}


def sqnr(w: Tensor, fmt: str) -> float:
    """Decibels."""
    wide = w.double()
    return float(10 * torch.log10(wide.square().sum() / (rtn(w, resolve(fmt)).double() - wide).square().sum()))


def main() -> None:
    drawn = weights()
    pairs = [(fmt, f"{fmt}/{dtype}") for fmt in FORMATS for dtype in ("bf16", "fp16")] + [("nvfp4", "nvfp4/pow2")]
    print(f"| format | {' | '.join(drawn)} |\n| --- | {' | '.join('---' for _ in drawn)} |")
    for plain, fmt in pairs:
        found = [(sqnr(w, plain), sqnr(w, fmt)) for w in drawn.values()]
        print(f"| `{fmt}` | {' | '.join(f'{before:.2f} {after - before:+.3f}' for before, after in found)} |")


if __name__ == "__main__":
    main()
