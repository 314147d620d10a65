"""Runs the printed Triton of every law through Triton's interpreter, chosen at import: a process of its own.

Usage: python noise_worker.py inputs.pt outputs.pt, where the inputs hold laws' (name, up, beyond) and z, lo, hi, third.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import sympy
import torch
import triton
import triton.language as tl

from lotion_fx.kernels.device_code import device_function
from lotion_fx.numerics.formats import resolve
from lotion_fx.numerics.noise import D, NoiseLaw


@triton.jit
def apply(z, lo, hi, third, out, n, function: tl.constexpr, outputs: tl.constexpr, block: tl.constexpr):
    """Each output of a law's function, one after another, at n points."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < n
    values = function(tl.load(z + at, inside), tl.load(lo + at, inside), tl.load(hi + at, inside),
                      tl.load(third + at, inside))  # fmt: skip
    for k in tl.static_range(outputs):
        tl.store(out + k * n + at, values[k], inside)


def main() -> None:
    laws, points = torch.load(sys.argv[1])
    n, found = len(points[0]), {}
    for name, *parts in laws:
        up, beyond = (sympy.sympify(part, locals={"D": D}) if part else None for part in parts)
        law = NoiseLaw(name, up, beyond)
        for function, outputs in law.expressions.items():
            out = torch.empty(len(outputs), n)
            arguments = (*points, out, n, device_function(function, resolve("int4"), law), len(outputs), 1024)
            apply[(triton.cdiv(n, 1024),)](*arguments)
            found[name, function] = out
    torch.save(found, sys.argv[2])


if __name__ == "__main__":
    main()
