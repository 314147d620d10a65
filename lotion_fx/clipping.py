"""What an optimizer's second moment holds of squared gradients, where it averages clipped ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Clipping:
    """The squared clipping factor, averaged as Adam averages squared gradients.

    Args:
        mean: of the squares, 0-d float32, its bias corrected; None before the first step.
        mass: the weight of the steps that are in it: 1 less what bias is left.
    """

    mean: Tensor | None = None
    mass: float = 0.0

    def told(self, factor: Tensor, decay: float, before: Tensor | float) -> None:
        """One more step's factor, 0-d.

        Args:
            decay: of the optimizer's average.
            before: how many steps that had already; of those that nobody saw none was clipped.
        """
        squared = factor.float().square()
        if self.mean is None:
            self.mean, self.mass = torch.ones_like(squared), 1 - decay ** float(before)
        self.mass = decay * self.mass + 1 - decay
        self.mean = self.mean.to(squared.device).lerp(squared, (1 - decay) / self.mass)

    def over_moment(self, count: Tensor, steps: Tensor | float, decay: float) -> Tensor:
        """By what a second moment is multiplied for ``count`` times the mean square of unclipped gradients, 0-d.

        Args:
            count: 0-d.
            steps: that the moment averages; without any the factor is 0.
            decay: of its average.
        """
        taken = torch.as_tensor(steps, dtype=torch.float32, device=count.device)
        share = -torch.expm1(taken * math.log(max(decay, 1e-30)))  # 1 - decay ** steps, to the last bits
        share = share if self.mean is None else share * self.mean.to(count.device)
        # At most so much: of gradients that nearly vanished squares are 0, and infinitely many times that is no number.
        return torch.where(share > 0, (count / share).clamp(max=1e30), 0.0)

    def saved(self) -> dict[str, Any]:
        """What `restored` takes."""
        return dict(vars(self))

    @classmethod
    def restored(cls, saved: Mapping[str, Any] | None) -> Clipping:
        """As `saved` told; anew of a state that knows none."""
        return cls(**saved) if saved is not None else cls()
