"""The quotient is torch's float32 quotient, bit for bit, on random and on the hardest operands."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lotion_fx.kernels.division import inverse, quotient


@triton.jit
def divide(w, s, z, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    one_over_p, m, r, t = inverse(tl.load(s + i, mask=i < n, other=1.0))
    tl.store(z + i, quotient(tl.load(w + i, mask=i < n, other=0.0), one_over_p, m, r, t), mask=i < n)


def divided(w: Tensor, s: Tensor, device: str) -> Tensor:
    z = torch.full_like(w, torch.nan, device=device)
    size = 2**17
    divide[(triton.cdiv(w.numel(), size),)](w.to(device), s.to(device), z, w.numel(), SIZE=size)
    return z.cpu()


def mantissas(n: int, g: torch.Generator) -> Tensor:
    return 1 + torch.randint(0, 2**23, (n,), generator=g).float() * 2.0**-23


@pytest.fixture
def seed() -> int:
    return int(torch.seed() % 2**31)


def test_random_operands(device: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n = 2**20
    s = mantissas(n, g) * torch.exp2(torch.randint(-126, 127, (n,), generator=g).float())
    w = s * mantissas(n, g) * torch.exp2(torch.randint(-60, 10, (n,), generator=g).float())
    w = torch.where(torch.rand(n, generator=g) < 0.5, -w, w)
    keep = w.isfinite() & (w.abs() > 2.0**-120 * s)
    assert keep.sum() > n / 2
    assert torch.equal(divided(w[keep], s[keep], device), w[keep] / s[keep]), f"seed {seed}"


def test_quotients_as_near_to_a_tie_as_there_are(device: str, seed: int) -> None:
    """``w / s`` is a midpoint between two floats give or take ``1 / S``, with S the odd mantissa of ``s``.

    Of a midpoint M (25 bits, odd) the product M S is a 24-bit mantissa shifted left, plus or minus 1, where M is the
    inverse of plus or minus S modulo 2^25.
    """
    g = torch.Generator().manual_seed(seed)
    mantissa = 2**23 + 2 * torch.randint(0, 2**22, (2**18,), generator=g) + 1
    inverse_mod = mantissa  # Newton's iteration: each step doubles the bits, the first has 3
    for _ in range(4):
        inverse_mod = inverse_mod * (2 - mantissa * inverse_mod) % 2**25
    assert bool((mantissa * inverse_mod % 2**25 == 1).all())
    for sign in (1, -1):
        middle = sign * inverse_mod % 2**25
        product = middle * mantissa - sign
        shifted = product >> 25
        keep = (middle >= 2**24) & (product % 2**25 == 0) & (shifted >= 2**23) & (shifted < 2**24)
        assert keep.sum() > 1000
        w, s = shifted[keep].float(), mantissa[keep].float()
        assert torch.equal(divided(w, s, device), w / s), f"seed {seed}"


def test_levels_and_zeros_are_exact(device: str) -> None:
    s = torch.tensor([3.1e-3, 7.7, 2.0**-126, 1.9999999, 1.0]).repeat_interleave(7)
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 3.0, 6.0, -4.0]).repeat(5)
    w = s * levels
    assert torch.equal(divided(w, s, device), w / s)
