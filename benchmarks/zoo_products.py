"""Which parameters meet a product with data, told without lotion_fx: an eager run follows what they become.

The judge of `zoo.py`: it compiles nothing, knows no module, and shares no code with what it judges. A parameter *meets*
a product where it, or what ops on parameters and constants alone make of it, is an operand of an op that sums over
products with data. An op of another library than ATen, or one with graphs inside, is taken for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# By the positions of their operands; the rest (biases, masks) is added.
_PRODUCTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_grouped_mm", "linear", "convolution"), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), (1, 2)),
    **dict.fromkeys(("_trilinear", "mkldnn_rnn_layer"), tuple(range(6))),
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist", "_linalg_solve_ex", "linalg_solve_triangular"), (0, 1)),
    "_scaled_dot_product_flash_attention_for_cpu": (0, 1, 2),
    "_sparse_mm": (0, 1),
}
_TRANSFORMED = ("_fft_r2c", "_fft_c2c", "_fft_c2r")
"""A kernel that is taken to the frequencies is to be multiplied there: a convolution by another way."""


class _Follow(TorchDispatchMode):
    """Sorts tensors into data, constants and what is made of parameters alone."""

    supports_higher_order_operators = True

    def __init__(self, parameters: Mapping[str, Tensor], data: list[Tensor]) -> None:
        super().__init__()
        self.made_of: dict[int, frozenset[str]] = {id(p): frozenset({name}) for name, p in parameters.items()}
        self.data = {id(x) for x in data}
        self.alive: list[Any] = [*parameters.values(), *data]  # ids stay unique while the tensors live
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        parts = frozenset[str]().union(*(self.made_of.get(id(x), frozenset()) for x in inputs))
        has_data = any(id(x) in self.data for x in inputs)
        if parts:
            self._meet(func, args, inputs, has_data)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.alive += results
        for result in results:
            if has_data:
                self.data.add(id(result))
                self.made_of.pop(id(result), None)
            elif parts:
                self.made_of[id(result)] = parts
        return out

    def _meet(self, func: Any, args: Any, inputs: list[Tensor], has_data: bool) -> None:
        namespace, name = _name(func)
        if name in _TRANSFORMED:
            operands = inputs
        elif not has_data:
            return
        elif namespace not in ("aten", "prims"):
            operands = inputs
        else:
            operands = [x for i in _PRODUCTS.get(name, ()) if i < len(args) for x in tree_leaves(args[i])]
        for operand in operands:
            self.found |= self.made_of.get(id(operand), frozenset())


def _name(func: Any) -> tuple[str, str]:
    """Namespace and name of an op; a higher-order one, such as `torch.cond`, hides what its graphs do."""
    namespace, _, name = getattr(
        getattr(func, "overloadpacket", None), "_qualified_op_name", "higher_order::"
    ).partition("::")
    return namespace, name


def meets_products(model: nn.Module, args: Any, kwargs: Any) -> set[str]:
    """The names of the parameters that meet a product in one call. The model's buffers may change."""
    data = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    follow = _Follow(dict(model.named_parameters()), data)
    with torch.no_grad(), follow:
        model(*args, **kwargs)
    return follow.found
