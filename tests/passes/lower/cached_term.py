"""Adds a term by the op that a lowered update holds, compiled, and prints how far it is from the reference.

Usage: python cached_term.py FIRST. FIRST is the lowest level of a format that every process names the same, so that a
compile cache that knew graphs by names alone would give one process another's kernel.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import lotion_fx.kernels.smooth  # noqa: F401  registers the op
from lotion_fx.compiling import compile_function
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import codebook, register_format


def main() -> None:
    fmt = register_format("mine", codebook((float(sys.argv[1]), -0.3, 0.0, 0.4, 1.0), block=16))
    torch.manual_seed(0)
    w, h, grad, factor = torch.randn(8, 32), torch.rand(8, 32), torch.zeros(8, 32), torch.tensor(1.0)

    def add(grad: Tensor, w: Tensor, h: Tensor, factor: Tensor) -> None:
        torch.ops.lotion_fx.add_term(grad, w, h, None, 1, factor, "mine", -1, "randomized")

    compile_function(add, [grad, w, h, factor], "inductor")(grad, w, h, factor)
    print(float((grad - rounding.variance_vjp(w, h, fmt)).abs().max()))


if __name__ == "__main__":
    main()
