"""How a kernel is launched: its tile's sizes, warps and stages. One of a kernel's candidates, or the table's choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel.

    Args:
        constants: the tile's sizes, values of the kernel's ``tl.constexpr`` arguments.
        num_warps: warps of 32 threads in a program.
        num_stages: depth of the software pipeline of its loop.
    """

    constants: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3

    @property
    def options(self) -> dict[str, Any]:
        """The config as keyword arguments of a launch."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}

    @staticmethod
    def of(options: Mapping[str, int]) -> Config:
        """The config that has these `options`."""
        constants = dict(options)
        warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
        return Config(constants, warps, stages)
