"""The phase ``"scales"``: weights keep their codes, and the scales of their blocks are trained.

A block ``w = s c`` with codes c moves along c alone. Of its gradient g the part along w, ``w <g, w> / <w, w>``, is what
the loss says of s, put back into the weight's place; and of what an optimizer makes of it, element by element or not,
the part along w is taken after the step. So any optimizer trains scales, with the moments and the learning rate that it
has for weights. What is deployed is the weight rounded to nearest, as ever, which gives these codes again.

A scale that is a power of two has nowhere near to go: such weights stay as they are. One in E4M3 moves in full
precision, and rounds to E4M3 in each forward. In between, a step needs room for one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.quantizer import Quantizer
from lotion_fx.numerics.rounding import compute_dtype, from_blocks, to_blocks
from lotion_fx.numerics.scales import PowerOfTwoScale
from lotion_fx.passes.attach.sharded import is_cut
from lotion_fx.shards import local_of, settle, shared_amax
from lotion_fx.state import Weight

LEAST = 0.5
"""No step makes a scale smaller than by this: none is to become zero, or change its sign."""

_moving: dict[Tensor, tuple[Quantizer, Tensor]] = {}
"""Parameters whose optimizer is stepping, with how they are rounded and their rounded values before."""


def check_scales(weights: Iterable[Weight]) -> None:
    """Refuses a model whose scales have nowhere near to go.

    Raises:
        ValueError: all of them are powers of two.
    """
    formats = [weight.format for weight in weights if weight.format is not None]
    if formats and all(_is_discrete(fmt) for fmt in formats):
        raise ValueError(
            f"phase 'scales': those of {formats[0].name!r} are powers of two, which cannot be trained; freeze the "
            "weights (requires_grad_(False)) and train the rest, or take a format with other scales"
        )


def _is_discrete(fmt: Format) -> bool:
    return isinstance(fmt.law, PowerOfTwoScale)


@torch.no_grad()
def before_step(pairs: Sequence[tuple[Weight, Tensor]], *, begins: bool) -> None:
    """Leaves of each gradient what it says of the scales, just before an optimizer steps.

    Args:
        pairs: weights with their parameters, which have a ``.grad``.
        begins: whether the step does; else its closure is called once more.

    Raises:
        ValueError: shards cut a weight's blocks in two.
    """
    for weight, parameter in pairs:
        if is_cut(weight.quantizer, parameter):
            raise ValueError(
                f"phase 'scales': {weight.name!r} is sharded so that blocks are cut in two, and no rank can step its "
                "part alone; train scales in one process, under DistributedDataParallel, or in a format whose blocks "
                "shards leave whole"
            )
        settle(parameter)
        quantizer = weight.quantizer
        if begins:
            amax = next(iter(shared_amax(quantizer, parameter)), None)
            _moving[parameter] = quantizer, quantizer.rtn(local_of(parameter), amax_tensor=amax)
        assert parameter.grad is not None
        grad, rounded = local_of(parameter.grad), _moving[parameter][1]
        grad.copy_(torch.zeros_like(grad) if _is_discrete(quantizer.format) else _along(grad, rounded, quantizer))


@torch.no_grad()
def after_step(parameters: Iterable[Any]) -> None:
    """Puts what an optimizer has stepped back on its codes."""
    for parameter in parameters if _moving else ():
        if (known := _moving.pop(parameter, None)) is not None:
            (quantizer, rounded), local = known, local_of(parameter)
            local.copy_(rounded if _is_discrete(quantizer.format) else _along(local, rounded, quantizer, LEAST))


def _along(x: Tensor, rounded: Tensor, quantizer: Quantizer, least: float | None = None) -> Tensor:
    """The part of each block that lies along its rounded values, no less than so many of these."""
    fmt, axis = quantizer.format, quantizer.axis
    values, blocks = (to_blocks(each, fmt, axis).to(compute_dtype(x)) for each in (x, rounded))
    share = (values * blocks).sum(-1, keepdim=True) / blocks.square().sum(-1, keepdim=True).clamp(min=1e-30)
    share = share if least is None else share.clamp(min=least)
    return from_blocks(blocks * share, fmt, axis, x.shape).to(x.dtype)
