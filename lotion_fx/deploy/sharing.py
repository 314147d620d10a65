"""One tensor scale for weights that a client multiplies as one: q, k and v; gate and up.

vLLM and ModelOpt stack such weights and hold one tensor scale for the stack. Where tensor scales are powers of two,
this is a change of where a power of two is written: each takes the group's largest, ``t``, and of a weight whose own
was ``t / 2^n`` every E4M3 block scale is divided by ``2^n``. That is exact down to E4M3's smallest numbers, below which
a weight is refused. A block of zeros is zero at any scale and keeps its own.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.scales import TwoLevelScale

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
_PART = re.compile(rf"(?:^|\.)({'|'.join(part for parts in TOGETHER for part in parts)})\.weight$")


def groups_of(weights: dict[str, QuantizedWeight]) -> list[list[str]]:
    """The names of weights of two-level formats that stand side by side under the usual names, two or more each."""
    found: dict[tuple[str, int], list[str]] = {}
    for name, weight in weights.items():
        if weight.format.law.two_level and (match := _PART.search(name)):
            which = next(i for i, parts in enumerate(TOGETHER) if match[1] in parts)
            found.setdefault((name[: match.start(1)], which), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def is_power_of_two(fmt: Format) -> bool:
    """Whether tensor scales are powers of two by the format, and not by chance."""
    return isinstance(fmt.law, TwoLevelScale) and fmt.law.tensor == "pow2"


def shared(weights: dict[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """The same weights, bit for bit, with one tensor scale in each group of those with powers of two; the rest as is.

    Raises:
        ValueError: a block's scale is too small to be divided.
    """
    made = dict(weights)
    for names in groups_of(weights):
        scales = [weights[name].tensor_scale for name in names]
        if all(is_power_of_two(weights[name].format) for name in names):
            largest = torch.stack([scale for scale in scales if scale is not None]).max()
            made.update({name: _rescaled(name, weights[name], largest) for name in names})
    return made


def _rescaled(name: str, weight: QuantizedWeight, tensor_scale: Tensor) -> QuantizedWeight:
    law, block = weight.format.law, weight.format.block
    assert isinstance(law, TwoLevelScale) and isinstance(block, int) and weight.tensor_scale is not None
    ratio = float(tensor_scale / weight.tensor_scale)
    if ratio == 1:
        return weight
    old = law.type.decode(weight.scales)
    new = law.type.nearest(old / ratio)
    codes = weight.each_code()
    padded = torch.nn.functional.pad(codes, (0, -weight.length % block))
    is_zero = (weight.format.grid.decode(padded) == 0).unflatten(-1, (-1, block)).all(-1)
    if lost := int(((new * ratio != old) & ~is_zero).sum()):
        raise ValueError(
            f"model: {name!r} cannot take the tensor scale of the weights beside it, 2^{math.log2(ratio):.0f} times "
            f"its own: {lost} of its {old.numel()} block scales are too small for E4M3 then; train with one tensor "
            "scale for both (share='auto'), or export with share=False where the client needs none"
        )
    stored = torch.where(is_zero, weight.scales, law.type.encode(new))
    return replace(weight, scales=stored, tensor_scale=tensor_scale.clone())
