"""LSQ: every block's scale is a parameter of its own, learned together with the weights.

Source: Esser, McKinstry, Bablani, Appuswamy, Modha, "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lotion_fx
from lotion_fx.numerics import rounding
from lotion_fx.numerics.grids import Grid
from lotion_fx.numerics.scales import HalfScale, PowerOfTwoScale, TwoLevelScale
from lotion_fx.numerics.searched import clipped


def rate(fmt: lotion_fx.Format) -> float:
    """A scale's learning rate over a weight's, as a share of its first value.

    Under SGD the paper's gradient scaling sets this ratio; Adam divides any factor of a gradient out, so here it has
    to be said. Of .02, .1, .5 and 2 the best of one seed: .5 at NVFP4 (MXFP4 has them equal up to .5), whose scales are
    stored in coarse steps, and 2 at INT4 per tensor and INT2, whose scales are float32.
    """
    return 0.5 if fmt.law.stored == torch.uint8 else 2.0


def rounded(w: Tensor, s: Tensor, stored: Tensor, grid: Grid) -> Tensor:
    """``stored nearest(w / stored)``, with the paper's gradients: straight through for ``w``, equation 3 for ``s``.

    Args:
        w: a weight in blocks, [..., blocks, block].
        s, stored: of each block, [..., blocks, 1]: its scale as it is learned, and as it is stored.
    """
    z = w.detach() / stored
    level = grid.nearest(z)
    inside = z == grid.clamp(z)
    by_scale = torch.where(inside, level - z, level) / math.sqrt(w.shape[-1] * grid.max)
    return level * stored + _only_gradient(w * inside) + _only_gradient(s * by_scale)


def _only_gradient(x: Tensor) -> Tensor:
    """Zeros, with the gradient of x."""
    return x - x.detach()


class LearnedScale(nn.Module):
    """A parametrization: a weight at its rounded values, the scale of each block a parameter.

    Args:
        w: the weight as it is now; blocks run along its last dimension.
        fmt: levels, blocks, and what a stored scale can be.
        searched: whether the first scales are those at which blocks err least, instead of those of absmax.
    """

    def __init__(self, w: Tensor, fmt: lotion_fx.Format, *, searched: bool = False) -> None:
        super().__init__()
        self.fmt = fmt
        scaled_as = clipped(w.detach(), fmt, -1) if searched else w.detach()
        block_scale, tensor_scale = rounding.scale_parts(scaled_as, fmt)
        self.register_buffer("first", block_scale if tensor_scale is None else block_scale * tensor_scale)
        self.register_buffer("tensor_scale", tensor_scale)
        self.relative = nn.Parameter(torch.ones_like(self.first))

    def stored(self) -> Tensor:
        """The scales as the format stores them, each the nearest number that it has; the tensor's own is held."""
        s = self.first * self.relative.detach()
        law = self.fmt.law
        if isinstance(law, TwoLevelScale):
            of_block = (s / self.tensor_scale).clamp(law.type.smallest, law.type.max)
            return law.type.nearest(of_block) * self.tensor_scale
        if isinstance(law, PowerOfTwoScale):
            return s.clamp(min=2.0**-126).log2().round().exp2()
        if isinstance(law, HalfScale):
            return s.clamp(min=2.0**-24).to(law.stored).float()
        return s.clamp(min=2.0**-126)

    def forward(self, w: Tensor) -> Tensor:
        blocks = rounding.to_blocks(w, self.fmt)
        deployed = rounded(blocks, self.first * self.relative, self.stored(), self.fmt.grid)
        return rounding.from_blocks(deployed, self.fmt, -1, w.shape)


def learn_scales(model: nn.Module, formats: Mapping[str, lotion_fx.Format], *, searched: bool = False) -> None:
    """Puts weights under `LearnedScale`, in place.

    Args:
        formats: of the weights to round, by their names in the model.
        searched: as that takes it.
    """
    for name, fmt in formats.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        learned = LearnedScale(getattr(owner, attribute), fmt, searched=searched)
        parametrize.register_parametrization(owner, attribute, learned)


def scales_of(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales of a model, as shares of their first values."""
    return [module.relative for module in model.modules() if isinstance(module, LearnedScale)]


def deployed_state(model: nn.Module) -> dict[str, Tensor]:
    """Takes the learned scales away, which rounds the weights in place, and gives the model's state dict."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)
    return model.state_dict()
