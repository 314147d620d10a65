"""E2M1, the four bits of NVFP4 and MXFP4: levels and codes by Blackwell's conversion, elsewhere by the grid's own bits.

Both give the same: nearest, ties to even, past the grid to the last level, and 0 for what rounds to 0 from below. The
conversion saturates, so there is nothing to clamp. Its text stands on one line, for Inductor escapes line ends twice.
"""

from __future__ import annotations

import triton.language as tl

from lotion_fx.kernels.device_code import encode, nearest, template

# Two float32 in grid units to the nearest levels; -0.0 for what rounds to 0 from below.
LEVELS = tl.constexpr(
    "{ .reg .b8 code; "
    ".reg .b32 pair; "
    ".reg .b16 even, odd; "
    "cvt.rn.satfinite.e2m1x2.f32 code, $3, $2; "
    "cvt.rn.f16x2.e2m1x2 pair, code; "
    "mov.b32 {even, odd}, pair; "
    "cvt.f32.f16 $0, even; "
    "cvt.f32.f16 $1, odd; "
    "}"
)

# Eight float32, four pairs, to four bytes of two codes each. A nibble of -0.0 has only its sign bit set: the sum
# carries into the sign bits of the nibbles with a magnitude, and only those keep theirs.
PAIRS = tl.constexpr(
    "{ .reg .b8 b0, b1, b2, b3; "
    ".reg .b32 all, low, keep; "
    "cvt.rn.satfinite.e2m1x2.f32 b0, $5, $1; "
    "cvt.rn.satfinite.e2m1x2.f32 b1, $6, $2; "
    "cvt.rn.satfinite.e2m1x2.f32 b2, $7, $3; "
    "cvt.rn.satfinite.e2m1x2.f32 b3, $8, $4; "
    "mov.b32 all, {b0, b1, b2, b3}; "
    "and.b32 low, all, 0x77777777; "
    "add.u32 keep, low, 0x77777777; "
    "or.b32 keep, keep, 0x77777777; "
    "and.b32 $0, all, keep; "
    "}"
)


@template
def nearest_level(z, E2M1_CVT: tl.constexpr):
    """The level nearest to ``z``, by the hardware's conversion where E2M1_CVT; of any format where not."""
    if E2M1_CVT:
        level = tl.inline_asm_elementwise(LEVELS, "=f,=f,f,f", [z], dtype=tl.float32, is_pure=True, pack=2)
        return level + 0.0  # never -0.0
    return nearest(z)


@template
def nearest_pair(even, odd, E2M1_CVT: tl.constexpr):
    """The byte of two codes, ``even``'s in the low half, of the levels nearest to both; codes of 4 bits or fewer."""
    if E2M1_CVT:
        return tl.inline_asm_elementwise(PAIRS, "=r,r,r,r,r,r,r,r,r", [even, odd], dtype=tl.uint8, is_pure=True, pack=4)
    return encode(nearest(even)) | (encode(nearest(odd)) << 4)
