"""The random numbers of random rounding: Philox 4x32 with 10 rounds, in a kernel and, the same, in ATen.

A weight's element ``e`` draws word ``e % 4`` of the counter ``e // 4``, with the seed as key (64 bits); the word's sign
bit is folded and the rest scaled to 31 bits, as Triton's ``tl.rand4x`` does.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def uniforms(seed, offset, FOURS: tl.constexpr):
    """Uniform numbers in [0, 1) of the elements at ``offset``.

    With FOURS each draw serves four elements, which must lie side by side in ``offset`` [R, P, I], flattened.
    """
    if FOURS:
        fours: tl.constexpr = offset.shape[0] * offset.shape[1] * offset.shape[2] // 4
        first, _ = tl.split(tl.reshape(offset, (2 * fours, 2)))
        first, _ = tl.split(tl.reshape(first, (fours, 2)))
        a, b, c, d = tl.rand4x(seed, first // 4)
        return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), offset.shape)
    a, b, c, d = tl.rand4x(seed, offset // 4)
    word = offset % 4
    return tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))


def philox(seed: Tensor, count: int) -> Tensor:
    """The numbers that `uniforms` draws for elements 0 to ``count - 1``, float32 [count], in [0, 1).

    Args:
        seed: 0-d int64.
        count: how many.
    """
    low = 2**32 - 1
    index = torch.arange(-(-count // 4), device=seed.device)
    c0, c1, c2, c3 = index & low, *(torch.zeros_like(index) for _ in range(3))
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        (h0, l0), (h2, l2) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h2 ^ c1 ^ k0, l2, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    word = torch.stack([c0, c1, c2, c3], 1).reshape(-1)[:count]
    folded = torch.where(word >= 2**31, low - word, word)
    return folded.to(torch.float32) * 4.6566127342e-10


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a b``, both below 2^32, in int64 that holds 63."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
