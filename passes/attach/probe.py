"""The probe: the vector through which a compiled backward pass hands out a weight's curvature.

Every smoothed weight has a probe, a float32 vector of zeros that enters the graph as one more input. The gradient
that reaches it *is* the curvature, so autograd itself accumulates it over uses, micro-batches and recomputation.

    factored   [ rows G*R | cols G*C | norm G | calls | code | norms | energies | loss count ]
    full       [ h  numel(weight)             | calls | code | norms | energies | loss count ]
    kronecker  [ B  G*R*R | A  G*C*C          | calls | code | norms | energies | loss count ]
    none       [                                calls | code | norms | energies | loss count ]

The weight, reshaped row-major to [G, R, C], has curvature ``h[g, r, c] = T * rows[g, r] * cols[g, c] / norm[g]``.
A and B are the matrices of `passes.curvature.kronecker`, of sides up to `SIDE`; a longer one has none.
``calls`` counts emissions, ``code`` adds one `Code` per emission and the loss count the loss terms T that the graph
saw, so `code / calls` and `loss_count / calls` survive accumulation and a warm compile cache, where no pass runs again.
Norms and energies are sums over those terms: of the norm of each one's gradient where T is counted, and of its square;
0 unless the graph's outputs hold the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Code(IntEnum):
    """How one emission of a curvature was made; `analytic` is the only one that carries a payload."""

    UNRESOLVED = 0  # the op ran as itself: no joint graph (inner="eager")
    ANALYTIC = 1  # the contraction of squares
    NONLINEAR = 2  # the weight's gradient contains the weight: not linear in it
    NOT_A_CONTRACTION = 3  # the gradient comes out of an op with no contraction rule
    BY_CHOICE = 4  # curvature="fisher": nothing asked of the graph
    UNREACHED = 5  # no compiled graph saw the weight; never emitted
    MIXED = 6  # several graphs use the weight and do not agree; never emitted
    BY_PARAMETERS = 7  # it is multiplied with parameters or constants first: what that sums over are no positions
    MIXED_SIDES = 8  # of Kronecker factors: linear, but no pair of matrices says how

    @property
    def reason(self) -> str:
        """Why a weight with this code takes the Fisher form; empty for `ANALYTIC`."""
        return _REASONS[self]


_REASONS = {
    Code.UNRESOLVED: "no joint graph was compiled (inner='eager')",
    Code.ANALYTIC: "",
    Code.NONLINEAR: "the weight enters nonlinearly: its own gradient depends on it",
    Code.NOT_A_CONTRACTION: "its gradient comes from an op that is no contraction",
    Code.BY_CHOICE: "curvature='fisher' was asked for",
    Code.UNREACHED: "reached by no compiled graph",
    Code.MIXED_SIDES: "its gradient mixes the two sides of its contraction, which have no matrices of their own then",
    Code.MIXED: "several graphs use it, not all linearly",
    Code.BY_PARAMETERS: "it meets data only after a product with other parameters",
}


class Header(NamedTuple):
    """The last values of a probe vector, each 0-d."""

    calls: Tensor
    code: Tensor
    norms: Tensor
    energies: Tensor
    loss_count: Tensor

    @classmethod
    def of(cls, vector: Tensor) -> Header:
        return cls(*vector[-HEADER:].unbind())

    @property
    def common_code(self) -> Code:
        """What all emissions say, `MIXED` if they do not agree. Reads the device."""
        calls, code, *_ = torch.stack(self).tolist()
        mean = code / calls if calls else -1.0
        return Code(int(mean)) if mean in set(Code) else Code.MIXED


HEADER = 5  # its length
LOSS = 3  # of them, the last that tell of the loss
SIDE = 16384  # rows or columns up to which they have a matrix: one GiB in float32


@dataclass(frozen=True)
class Layout:
    """Where the parts of a probe lie.

    Args:
        kind: ``"factored"``, ``"full"``, ``"kronecker"`` or ``"none"``.
        shape: the weight's shape.
        groups: G, the leading groups with a factorization of their own (a grouped convolution's groups, experts).
        rows: R, rows per group; the columns are what is left. A linear weight [O, I] has (G, R, C) = (1, O, I), a
            convolution's [O, I/g, k...] (g, O/g, I/g*k), a stack of experts [E, R, C] (E, R, C).
        direct: whether every product that takes it takes data with it; else the vector has no payload to hope for.
    """

    kind: str
    shape: tuple[int, ...]
    groups: int
    rows: int
    direct: bool = True

    @property
    def factors(self) -> tuple[int, int, int]:
        """(G, R, C), the shape whose rows and columns are factored."""
        return self.groups, self.rows, math.prod(self.shape) // (self.groups * self.rows)

    @property
    def payload(self) -> int:
        """Number of values before the header."""
        if self.kind == "none":
            return 0
        groups, rows, cols = self.factors
        if self.kind == "kronecker":
            return groups * sum(side * side for side in (rows, cols) if side <= SIDE)
        return groups * rows * cols if self.kind == "full" else groups * (rows + cols + 1)

    @property
    def size(self) -> int:
        return self.payload + HEADER

    def scaled(self, payload: Tensor, factor: Tensor | float) -> Tensor:
        """A payload whose h is ``factor`` times as large: the rows of a factored one are, and all of a full one."""
        count = self.groups * self.rows if self.kind == "factored" else payload.numel()
        return torch.cat([payload[:count] * factor, payload[count:]])

    def matrices(self, vector: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Views (B [G, R, R], A [G, C, C]) of a Kronecker probe vector; None for a side longer than `SIDE`."""
        groups, *sides = self.factors
        lengths = [groups * side * side if side <= SIDE else 0 for side in sides]
        parts = vector[: self.payload].split(lengths)
        b, a = (part.view(groups, n, n) if n <= SIDE else None for part, n in zip(parts, sides, strict=True))
        return b, a

    def split(self, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views (rows [G, R], cols [G, C], norm [G]) of a factored probe vector."""
        groups, rows, cols = self.factors
        a, b, n = vector[: self.payload].split((groups * rows, groups * cols, groups))
        return a.view(groups, rows), b.view(groups, cols), n


@torch.library.custom_op("lotion_fx::curvature", mutates_args=())
def curvature(grad: Tensor, weight: Tensor, kind: str, groups: int, rows: int, direct: bool = True) -> Tensor:
    """The probe's gradient, given the weight's: header only, until `passes.curvature` resolves it.

    Run as itself it says ``UNRESOLVED``; the runtime then takes the Fisher form from the weight's ``.grad`` at the
    step, which unlike a square taken here is exact under accumulation.

    Args:
        grad: gradient of the loss with respect to the weight, any shape and floating dtype.
        weight: what `smooth` handed on, so that the joint graph shows its uses; no value of it is read.
        kind, groups, rows, direct: the probe's `Layout`, whose shape is that of ``grad``.

    Returns:
        float32 vector of `Layout.size` zeros with ``calls = 1``.
    """
    vector = grad.new_zeros(Layout(kind, tuple(grad.shape), groups, rows).size, dtype=torch.float32)
    vector[-HEADER] = 1
    return vector


@curvature.register_fake
def _(grad: Tensor, weight: Tensor, kind: str, groups: int, rows: int, direct: bool = True) -> Tensor:
    return grad.new_empty(Layout(kind, tuple(grad.shape), groups, rows).size, dtype=torch.float32)
