"""Random numbers that a seed and a place tell, whoever draws them."""

from __future__ import annotations

from torch import Tensor


def uniforms(seed: int, index: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float32 with 24 bits, told by the seed and each element's place alone.

    So that shards draw what the whole weight would. Source: Steele et al., "Fast splittable pseudorandom number
    generators", OOPSLA 2014 (its mixing function, variant 13 of Stafford's).
    """
    x = index * -0x61C8864680B583EB + (seed * 0x2545F4914F6CDD1D + 0x1234567) % (1 << 63)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((x >> 40) & 0xFFFFFF).float() * 2.0**-24
