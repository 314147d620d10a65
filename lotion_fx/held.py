"""A parameter that holds noisy values for a step, and for how many forwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lotion_fx import private
from lotion_fx.numerics.uniforms import uniforms
from lotion_fx.passes.attach.sharded import is_cut
from lotion_fx.shards import index_of, local_of, sample

if TYPE_CHECKING:
    from lotion_fx.state import Weight


SCALED = 0.99
"""Cosine of a gradient's samples before and after, from which on it was scaled or clipped rather than replaced."""


class Forwards:
    """How many training forwards the step under way has had, and at most any before it.

    Two more, if no gradient of the step is there, or many more tell that its optimizer is not to come: a loop leaves
    out what is far from the losses before, which in a step that measures all to come would be.

    Attributes:
        steps: before the one under way.
        most: of any step before.
        gave_up: on this step.
    """

    def __init__(self) -> None:
        self.steps, self.most, self.gave_up, self._now = -1, 1, False, 0

    @property
    def most_by_now(self) -> int:
        """Of any step, the one under way among them."""
        return self.most if self.gave_up else max(self.most, self._now)

    def come(self, steps: int, *, is_first: bool) -> None:
        """One more, in the step after so many; ``is_first`` where it is made anew."""
        if steps != self.steps or is_first:
            self.most = self.most_by_now
            self.steps, self.gave_up, self._now = steps, False, 0
        self._now += 1

    def give_up(self, held: Mapping[Weight, Held]) -> bool:
        """Whether they are too many, of these weights that are held."""
        if self._now > self.most + 1:
            self.gave_up |= self._now > 4 * self.most + 8 or not _has_gradients(held)
        return self.gave_up


def _has_gradients(held: Mapping[Weight, Held]) -> bool:
    """Whether a backward pass has left gradients since weights are held. Reads the device."""
    seen = [weight.master for weight, each in held.items() if each.seen is not None]
    grads = [p.grad for p in seen if p is not None and p.grad is not None and not is_partial(p.grad)]
    return any(bool(sample(grad).any()) for grad in grads)


def can_be_measured(weight: Weight) -> bool:
    """Whether an optimizer will tell of a weight that its term is to be added to."""
    parameter, in_hook = weight.master, weight.gathered.steps > 0 and weight.gathered.certificate is None
    if parameter is None or not (parameter.requires_grad and weight.training and weight.selected and in_hook):
        return False
    has_curvature = weight.curvature.ema is not None or weight.smoothing.settings.reads_moment
    return has_curvature and not is_cut(weight.quantizer, parameter)  # of which no rank could round its own part


@dataclass
class Held:
    """A parameter that holds other values for the step under way.

    Args:
        own: its own values while it holds rounded ones; else the rounded ones.
        version: of the parameter when it came to hold them.
        seed: by which they were drawn.
        amax: the absmax of the whole weight, where it is needed of a shard; else None.
        amplitude: of the noise, in units of that of randomized rounding.
        is_back: whether it has its own.
        seen: some of its gradient as the backward pass left it, the loss scale included; None where nobody looked.
    """

    own: Tensor
    version: int
    seed: int
    amax: Tensor | None
    amplitude: float
    is_back: bool = False
    seen: Tensor | None = None

    def noisy(self, weight: Weight, parameter: Tensor, own: Tensor) -> Tensor:
        """The values that a parameter comes to hold, given its own on this rank."""
        uniform = uniforms(self.seed, index_of(parameter))
        rounded = weight.quantizer.rr(own, uniform=uniform, amax_tensor=self.amax)
        if self.amplitude == 1:
            return rounded
        mean = weight.quantizer.mean(own)
        return mean + self.amplitude * (rounded - mean)

    def back_from_moved(self, weight: Weight, parameter: Tensor, own: Tensor) -> Tensor | None:
        """What takes the noise out of a parameter that was changed while it was noisy; None of one that was not.

        Its counter tells of a change that is undone by now, its values of one through ``.data``, which counts nowhere.
        """
        local = local_of(parameter)
        if (local.device, local.dtype, local.shape) != (own.device, own.dtype, own.shape):
            return None
        noisy = self.noisy(weight, parameter, own)
        is_same = private.version_of(local) == self.version and torch.equal(local, noisy)
        return None if is_same else own - noisy

    def has_moved(self, weight: Weight, parameter: Tensor) -> bool:
        """Whether a parameter that has its own values was changed since, through ``.data`` perhaps."""
        local, noisy = local_of(parameter), self.own
        if (local.device, local.dtype, local.shape) != (noisy.device, noisy.dtype, noisy.shape):
            return True
        is_same = private.version_of(local) == self.version
        return not (is_same and torch.equal(self.noisy(weight, parameter, local.detach()), noisy))


def sums_of(
    weight: Weight,
    parameter: Tensor,
    held: Held,
    grad: Tensor,
    slope: Tensor | None,
    h: Tensor | None,
    loss_scale: Tensor | None,
) -> Tensor:
    """What one weight adds to a measurement, float64 [12]: see `Measuring`."""
    local, quantizer = local_of(parameter), weight.quantizer
    noise = (held.own - quantizer.mean(local)).float()
    variance = held.amplitude**2 * quantizer.variance(local).float()
    slope = torch.zeros_like(grad) if slope is None or slope.shape != grad.shape else slope
    now = sample(grad)
    seen = torch.zeros_like(now) if held.seen is None or held.seen.shape != now.shape else held.seen.float()
    seen = seen if loss_scale is None else seen / loss_scale.to(seen.device)
    products = (
        noise * grad,
        noise * slope,
        variance * grad.square(),
        variance * grad * slope,
        variance * slope.square(),
        variance.new_zeros(()) if h is None else variance * h.view(variance.shape),
        variance,
        local.float().square(),
        variance.new_zeros(()) if h is None else h,
        now * seen,
        seen.square(),
        now.square(),
    )
    return torch.stack([product.sum(dtype=torch.float64) for product in products])


def clipping_of(samples: Sequence[Tensor], before: Sequence[float]) -> tuple[Tensor, Tensor]:
    """By what each weight's gradient was scaled or clipped between backward and step, and whether samples tell it.

    Args:
        samples: float64 [weights] each, the sums of ``g b``, ``b^2`` and ``g^2``: see `Measuring`.
        before: the factors told last, which hold where samples tell none: of a gradient that nobody saw or that is
            zero there, or where it is not scaled but another one.
    """
    product, seen, now = samples
    told = (seen > 0) & (now > 0) & (product.abs() > SCALED * (seen * now).sqrt())
    last = torch.tensor(before, dtype=torch.float64)
    return torch.where(told, product.abs() / torch.where(seen > 0, seen, 1.0), last), told


def is_partial(grad: Tensor) -> bool:
    """Whether ranks hold summands of a gradient still, so that it is another one once they are summed."""
    return isinstance(grad, DTensor) and any(placement.is_partial() for placement in grad.placements)


def narrowed(spread: Tensor, energy: Tensor, amplitude: float) -> Tensor:
    """What rounding's own noise adds to the loss, over what wider noise shows of it: of each weight, of its shape.

    To second order that is 1. But wide noise of one weight meets that of others. Where two linear layers follow each
    other and noise is r times the weights, squares, a loss L of their product's square grows by L ((1 + r)^2 - 1), and
    1/2 eps . grad has the mean 2 L r (1 + r). That is what is taken out: of one layer alone it is too much, of a longer
    chain too little.

    Args:
        spread: the sum of the noise's variance, its amplitude included.
        energy: that of the weight's squares.
        amplitude: of the noise, in units of that of rounding.
    """
    wide = torch.where(energy > 0, spread / energy, 0.0)
    return (1 + 0.5 * wide / amplitude**2) / (1 + wide)


def gradient_of(parameter: Tensor, pending: Tensor | None) -> Tensor:
    """This rank's part of a gradient in float32, without the loss scale."""
    assert parameter.grad is not None
    grad = local_of(parameter.grad).float()
    return grad if pending is None else grad / pending.to(grad.device)
