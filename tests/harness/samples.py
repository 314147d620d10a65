"""Small kernels that the tests of compiling, predicting and gating use: one that streams, one that multiplies."""

from __future__ import annotations

import triton
import triton.language as tl

from lotion_fx.kernels.audit.work import Work
from lotion_fx.kernels.config import Config


@triton.jit
def doubled_kernel(x, y, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def product_kernel(x, w, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        left = tl.load(x + m[:, None] * K + (start + k)[None])
        right = tl.load(w + n[None] * K + (start + k)[:, None])
        total = tl.dot(left, right, total)
    tl.store(y + m[:, None] * N + n[None], total.to(tl.bfloat16))


def doubled(n: int = 2**24) -> Work:
    """``y = 2 x`` on ``n`` bf16 numbers."""
    return Work(
        kernel="doubled",
        shape=f"{n} bf16",
        fn=doubled_kernel,
        signature={"x": "*bf16", "y": "*bf16", "n": "i32"},
        constants={},
        configs=tuple(Config({"SIZE": size}, warps, 1) for size, warps in ((1024, 4), (2048, 4), (256, 4))),
        programs=lambda config: -(-n // config.constants["SIZE"]),
        bytes=lambda config: 4 * n,
        minimum_bytes=4 * n,
        aligned=("n",),
    )


def product(m: int = 4096, n: int = 4096, k: int = 4096) -> Work:
    """``y = x w^T`` in bf16, all lengths multiples of the tiles."""

    def tiles(config: Config) -> tuple[int, int]:
        return m // config.constants["BM"], n // config.constants["BN"]

    return Work(
        kernel="product",
        shape=f"{m}x{n}x{k} bf16",
        fn=product_kernel,
        signature={"x": "*bf16", "w": "*bf16", "y": "*bf16", "M": "i32", "N": "i32", "K": "i32"},
        constants={},
        configs=(
            Config({"BM": 128, "BN": 128, "BK": 64}, 4, 3),
            Config({"BM": 64, "BN": 64, "BK": 64}, 4, 3),
        ),
        programs=lambda config: tiles(config)[0] * tiles(config)[1],
        bytes=lambda config: 2 * (tiles(config)[1] * m * k + tiles(config)[0] * n * k + m * n),
        minimum_bytes=2 * (m * k + n * k + m * n),
        tensor_flops={"bf16": 2 * m * n * k},
        iterations=lambda config: k // config.constants["BK"],
        requires={arch: ("LDGSTS", "HMMA") for arch in (80, 86, 89, 120)}
        | {90: ("HGMMA",), 100: ("UTCHMMA",), 103: ("UTCHMMA",)},
        aligned=("M", "N", "K"),
    )
