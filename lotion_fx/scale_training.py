"""The phase ``"scales"``: weights keep their codes, and the scales of their blocks are trained.

A block ``w = s c`` with codes c moves along c alone. Of its gradient g the part along w, ``w <g, w> / <w, w>``, is what
the loss says of s, put back into the weight's place; and of what an optimizer makes of it, element by element or not,
the part along w is taken after the step. So any optimizer trains scales, with the moments and the learning rate that it
has for weights. What is deployed is the weight rounded to nearest, as ever, which gives these codes again.

Codes of up to 6 bits stay to the last one. Of 8 bits some move by one where weights or scales are in half precision.
A scale that is a power of two has nowhere near to go: such weights stay as they are. One in E4M3 moves in full
precision, and rounds to E4M3 in each forward. A step needs room for one copy of the weights. Weights are back on their
codes when `step` returns, not yet for hooks that an optimizer itself runs after its step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lotion_fx import alike
from lotion_fx.alike import Make, make_of
from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.quantizer import Quantizer
from lotion_fx.numerics.rounding import compute_dtype, from_blocks, to_blocks
from lotion_fx.numerics.scales import PowerOfTwoScale
from lotion_fx.passes.attach.sharded import is_cut
from lotion_fx.shards import absmax, local_of, settle
from lotion_fx.state import Weight

LEAST, FLOOR = 0.5, 2.0**-10
"""No step makes a scale smaller than by the first of these, and none makes it smaller than the second of the largest: a
scale that would change its sign stays where a gradient can bring it back from."""

TINY = 1e-30
ALONG = 0.01
"""How far from its codes, relatively, a block may lie and be taken to lie on them: half precision. One that does not,
as before the first step, takes its rounded values."""


@dataclass(frozen=True)
class _Projection:
    """One weight's part of a step, called with what `_Before.job` chooses.

    Args:
        when: ``"begins"``, ``"again"`` where the step's closure is called once more, ``"ends"``.
        quantizer: the weight's.
        is_shard: of a weight; its scales may need to know the largest of all shards.
        tensors: of the arguments.
    """

    when: str
    quantizer: Quantizer
    is_shard: bool
    tensors: Make

    def __call__(self, args: Sequence[Tensor]) -> None:
        if self.when == "begins":
            local, grad, rounded, least, largest = args
            amax = largest if self.is_shard and self.quantizer.format.law.two_level else None
            rounded.copy_(self.quantizer.rtn(local, amax_tensor=amax))
            _put_on_codes(self.quantizer, local, rounded, least, largest)
            _leave_scales(self.quantizer, grad, rounded)
        elif self.when == "again":
            _leave_scales(self.quantizer, *args)
        else:
            _put_back(self.quantizer, *args)


@dataclass(frozen=True)
class _Before:
    """A parameter before a step.

    Args:
        weight: that it is.
        rounded: its values, rounded to nearest: of this rank's part.
        least: how much of these each block may come to, [..., blocks, 1].
        largest: magnitude of the parameter over all its shards, 0-d float32.
    """

    weight: Weight
    rounded: Tensor
    least: Tensor
    largest: Tensor

    @staticmethod
    def empty(weight: Weight, parameter: Tensor) -> _Before:
        local, fmt, axis = local_of(parameter), weight.quantizer.format, weight.quantizer.axis
        shape = (*to_blocks(local, fmt, axis).shape[:-1], 1)
        least = local.new_empty(shape, dtype=compute_dtype(local))
        return _Before(weight, torch.empty_like(local), least, absmax(parameter))

    def job(self, when: str, parameter: Tensor) -> tuple[_Projection, list[Tensor]]:
        local, grad = local_of(parameter), [] if parameter.grad is None else [local_of(parameter.grad)]
        args = {
            "begins": [local, *grad, self.rounded, self.least, self.largest],
            "again": [*grad, self.rounded],
            "ends": [local, self.rounded, self.least],
        }[when]
        return _Projection(when, self.weight.quantizer, isinstance(parameter, DTensor), make_of(args)), args


_moving: dict[Tensor, _Before] = {}
"""Parameters whose optimizer is stepping."""


def check_scales(weights: Iterable[Weight]) -> None:
    """Refuses a model whose scales have nowhere near to go, and formats that no code can be kept in.

    Raises:
        ValueError: all of them are powers of two, or a format's levels reach further on one side of zero.
    """
    formats = [weight.format for weight in weights if weight.format is not None]
    if lopsided := [fmt for fmt in formats if -fmt.grid.levels[0] != fmt.grid.levels[-1]]:
        levels = lopsided[0].grid.levels
        raise ValueError(
            f"phase 'scales': a block rounded to {lopsided[0].name!r}, whose levels go from {levels[0]:g} to "
            f"{levels[-1]:g}, may change when it is rounded again, so its codes cannot be kept; take a format whose "
            "levels reach equally far on both sides"
        )
    if formats and all(_is_discrete(fmt) for fmt in formats):
        raise ValueError(
            f"phase 'scales': those of {formats[0].name!r} are powers of two, which cannot be trained; freeze the "
            "weights (requires_grad_(False)) and train the rest, or take a format with other scales"
        )


def _is_discrete(fmt: Format) -> bool:
    return isinstance(fmt.law, PowerOfTwoScale)


@torch.no_grad()
def before_step(pairs: Sequence[tuple[Weight, Tensor]], optimizer: Any, *, begins: bool) -> None:
    """Leaves of each gradient what it says of the scales, just before an optimizer steps.

    Args:
        pairs: weights with their parameters, which have a ``.grad``.
        begins: whether the step does; else its closure is called once more.

    Raises:
        ValueError: shards cut a weight's blocks in two, or nothing tells when the step is over.
    """
    found: dict[str, list[Tensor]] = {"begins": [], "again": []}
    for weight, parameter in pairs:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"phase 'scales': {weight.name!r} is updated by hand, and has to be put back on its codes after each "
                "step; step with a torch.optim optimizer"
            )
        if is_cut(weight.quantizer, parameter):
            raise ValueError(
                f"phase 'scales': {weight.name!r} is sharded so that blocks are cut in two, and no rank can step its "
                "part alone; train scales in one process, under DistributedDataParallel, or in a format whose blocks "
                "shards leave whole"
            )
    for weight, parameter in pairs:
        settle(parameter)
        is_new = begins or parameter not in _moving
        if is_new:
            _moving[parameter] = _Before.empty(weight, parameter)
        found["begins" if is_new else "again"].append(parameter)
    for when, parameters in found.items():
        _run(when, {parameter: _moving[parameter] for parameter in parameters})


@torch.no_grad()
def after_step(parameters: Iterable[Any]) -> None:
    """Puts what an optimizer has stepped back on its codes."""
    stepped = dict.fromkeys(parameter for parameter in parameters if parameter in _moving) if _moving else {}
    _run("ends", {parameter: _moving.pop(parameter) for parameter in stepped})


def _run(when: str, known: Mapping[Tensor, _Before]) -> None:
    jobs: dict[str, list[tuple[_Projection, list[Tensor]]]] = {}
    for parameter, before in known.items():
        if before.rounded.numel():
            jobs.setdefault(before.weight.smoothing.settings.inner, []).append(before.job(when, parameter))
    for inner, each in jobs.items():
        alike.run(inner, each)


def forget(parameters: Iterable[Any]) -> None:
    """Another step begins: what one that raised has left is of no use."""
    for parameter in parameters if _moving else ():
        _moving.pop(parameter, None)


def _put_on_codes(quantizer: Quantizer, local: Tensor, rounded: Tensor, least: Tensor, largest: Tensor) -> None:
    """Puts a weight's blocks on their codes, each that does not lie there, and fills in how small they may get."""
    values, nearest, share = _blocks(local, quantizer), _blocks(rounded, quantizer), _share(local, rounded, quantizer)
    rest = (values - nearest * share).square().sum(-1, keepdim=True)
    is_along = rest <= ALONG**2 * values.square().sum(-1, keepdim=True)
    start = from_blocks(torch.where(is_along, values, nearest), quantizer.format, quantizer.axis, local.shape)
    local.copy_(start.to(local.dtype))
    share = torch.where(is_along, share, 1.0)
    floor = FLOOR * largest / nearest.abs().amax(-1, keepdim=True).clamp(min=TINY)
    least.copy_(torch.maximum(LEAST * share, torch.minimum(floor, share)))


def _leave_scales(quantizer: Quantizer, grad: Tensor, rounded: Tensor) -> None:
    """Leaves of a gradient what it says of the scales."""
    if _is_discrete(quantizer.format):
        grad.zero_()
    else:
        grad.copy_(_scaled(quantizer, rounded, _share(grad, rounded, quantizer)))


def _put_back(quantizer: Quantizer, local: Tensor, rounded: Tensor, least: Tensor) -> None:
    """Leaves of a weight what it is along its codes."""
    if _is_discrete(quantizer.format):
        local.copy_(rounded)
    else:
        local.copy_(_scaled(quantizer, rounded, torch.maximum(_share(local, rounded, quantizer), least)))


def _blocks(x: Tensor, quantizer: Quantizer) -> Tensor:
    return to_blocks(x, quantizer.format, quantizer.axis).to(compute_dtype(x))


def _share(x: Tensor, rounded: Tensor, quantizer: Quantizer) -> Tensor:
    """Of each block of x, how much of the rounded values it has along them."""
    values, nearest = _blocks(x, quantizer), _blocks(rounded, quantizer)
    largest = nearest.abs().amax(-1, keepdim=True).clamp(min=TINY)
    nearest = nearest / largest  # whose squares underflow nowhere
    return (values * nearest).sum(-1, keepdim=True) / nearest.square().sum(-1, keepdim=True).clamp(min=TINY) / largest


def _scaled(quantizer: Quantizer, rounded: Tensor, share: Tensor) -> Tensor:
    """The rounded values, so much of each block, in their dtype."""
    values = _blocks(rounded, quantizer) * share
    return from_blocks(values, quantizer.format, quantizer.axis, rounded.shape).to(rounded.dtype)
