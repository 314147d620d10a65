"""What is read of a weight that no graph saw, off its module, its name and its shape.

The rule is that of graphs, as far as these tell: in is what the plainest forward would bring to a product.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from lotion_fx.attributes import attribute_of

_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PRODUCTS = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, *_CONVOLUTIONS, *_TRANSPOSED)
_TOLD_BY_NAME = re.compile(r"bias|pos_?emb|position|embedding|token|scale|gain|gamma|a_log")

Owner = tuple[Any, str]
"""A module that holds the weight, and as what."""


def why_not_unseen(owners: Iterable[Owner], shape: Sequence[int]) -> str:
    """Why a weight that no graph saw is left alone; empty where it is taken for a product's operand."""
    owners = [(module, attribute) for module, attribute in owners if module is not None]
    if any(isinstance(module, _LOOKUPS) or "Norm" in type(module).__name__ for module, _ in owners):
        return "a lookup table or norm"
    if any(_is_gain(module, attribute) for module, attribute in owners):
        return "seen by no compiled graph: the gain of a weight norm"
    if is_told_by_module(owners):
        return ""
    told = next((match[0] for _, attribute in owners if (match := _TOLD_BY_NAME.search(attribute.lower()))), None)
    if told is not None:
        return f"seen by no compiled graph: named as no product's weight is ({told})"
    if sum(length > 1 for length in shape) < 2:
        return "seen by no compiled graph: fewer than two dimensions longer than one, as tokens and scales have"
    if len(shape) > 2 and shape[0] == 1:
        return "seen by no compiled graph: the same for a whole batch, as tokens and position tables are"
    return ""


def is_told_by_module(owners: Iterable[Owner]) -> bool:
    """Whether a weight is a known module's operand of a product."""
    return any(isinstance(module, _PRODUCTS) and "weight" in attribute for module, attribute in owners)


def axis_unseen(owners: Iterable[Owner], shape: Sequence[int]) -> int:
    """The dimension that the weight's module sums over; the last one of a module that nobody knows."""
    told = axis_told(owners, shape)
    return len(shape) - 1 if told is None else told


def axis_told(owners: Iterable[Owner], shape: Sequence[int]) -> int | None:
    """The dimension that the weight's module sums over, None of a module that nobody knows."""
    last, owners = len(shape) - 1, list(owners)
    for module, _ in owners:
        kind = type(module).__name__
        if kind == "Conv1D" and len(shape) == 2:  # of transformers: [in, out]
            return 0
        if isinstance(module, _TRANSPOSED):
            return 0 if module.in_channels > module.groups else last
        if isinstance(module, _CONVOLUTIONS) or (kind == "ParametrizationList" and len(shape) > 2):
            return 1 if shape[1] > 1 else last  # a depthwise kernel sums over its window alone
        is_transposed = attribute_of(module, "is_transposed") if len(shape) == 3 else None
        if isinstance(is_transposed, bool):  # transformers' experts: [E, in, out], or [E, out, in]
            return 1 if is_transposed else last
    return last if is_told_by_module(owners) else None


def _is_gain(module: Any, attribute: str) -> bool:
    """Whether a parameter is the magnitude of `torch.nn.utils.weight_norm`'s, of either kind."""
    if attribute.endswith("_g") and isinstance(attribute_of(module, f"{attribute[:-2]}_v"), Tensor):
        return True
    parametrized = isinstance(module, nn.utils.parametrize.ParametrizationList) and attribute == "original0"
    return parametrized and any("WeightNorm" in type(each).__name__ for each in module)
