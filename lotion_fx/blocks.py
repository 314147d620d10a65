"""The modules that ``regions="blocks"`` compiles: what a deep model repeats, once for all of its copies.

Dynamo compiles the forward of equal modules once and runs it with the weights of each, so that the first step of a
model of 64 layers takes as long as that of one of two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

BLOCKS = "blocks"
MANY = 4
"""Alike blocks from which on a user who waits for their graph is told of ``regions="blocks"``."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of each list of alike modules, and beside them whatever else holds a parameter of two dimensions.

    A list is an ``nn.ModuleList`` or ``nn.Sequential`` two of whose members are of one class and have modules of their
    own; of lists in one another it is the outermost.

    Args:
        model: what is to be compiled.

    Returns:
        In the model's own order. A parameter of a module that has such a list inside it is in none of them.

    Raises:
        ValueError: no list of the model is one.
    """
    if not any(map(_repeats, model.modules())):
        raise ValueError(
            f"regions={BLOCKS!r}: this {type(model).__name__} has no nn.ModuleList or nn.Sequential of alike blocks; "
            "name the modules to compile one by one, or leave regions out"
        )
    return list(dict.fromkeys(_within(model)))


def _within(module: nn.Module) -> Iterator[nn.Module]:
    is_list = _repeats(module)
    for child in module.children():
        goes_on = any(map(_repeats, child.modules())) or type(child) in (nn.ModuleList, nn.ModuleDict)
        if goes_on and not is_list:
            yield from _within(child)
        elif any(parameter.dim() > 1 for parameter in child.parameters()):
            yield child


def depth(model: nn.Module) -> int:
    """How many alike blocks the longest of a model's lists has."""
    return max(map(_alike, model.modules()), default=0)


def _repeats(module: nn.Module) -> bool:
    return _alike(module) > 1


def _alike(module: nn.Module) -> int:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return 0
    members = (member for member in module if member is not None)
    classes = Counter(type(member) for member in members if any(True for _ in member.children()))
    return max(classes.values(), default=0)
