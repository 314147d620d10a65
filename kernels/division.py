"""IEEE division by a block's scale, for a kernel that divides many weights by each scale.

``z = w / s`` decides codes, so it must be the correctly rounded quotient that PyTorch computes. Triton's ``/`` is not;
`tl.div_rn` is, at some ten instructions and a branch for every weight. Here the costly part is done once a block,

    p = 2^floor(log2 s)     m = s / p, in [1, 2)     r = RN(1 / m)     t = r (1 - m r)        r + t = 1/m to 2^-46

and five instructions remain for a weight:

    v = w / p    q = RN(v r + RN(v t))    z = RN(q + r RN(v - q m))

``q`` is within one unit in the last place of ``v / m``, the residual ``v - q m`` is then exact, and with ``r`` the
correctly rounded reciprocal the last step rounds correctly (Markstein, "Computation of elementary functions on the IBM
RISC System/6000 processor", IBM J. Res. Dev. 34 (1990), theorem 8.5 of Muller et al., "Handbook of Floating-Point
Arithmetic"). The powers of two keep every step clear of overflow and of subnormal numbers; only where ``|w|`` is below
``2^-126 p``, far below the finest level of any grid, may a ``v`` lose bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inverse(s):
    """What `quotient` needs of scales: ``1 / p``, ``m``, ``r`` and ``t``.

    Args:
        s: float32, ``2^-126`` to ``2^126``, any shape.
    """
    one_over_p = (0x7F000000 - (s.to(tl.int32, bitcast=True) & 0x7F800000)).to(tl.float32, bitcast=True)
    m = s * one_over_p
    r = tl.div_rn(tl.full(m.shape, 1.0, tl.float32), m)
    return one_over_p, m, r, r * tl.fma(-m, r, 1.0)


@triton.jit
def quotient(w, one_over_p, m, r, t):
    """``w / s``, correctly rounded.

    Args:
        w: float32, any shape against which the others broadcast; these are `inverse` of the scale.
    """
    v = w * one_over_p
    q = tl.fma(v, r, v * t)
    return tl.fma(tl.fma(-q, m, v), r, q)
