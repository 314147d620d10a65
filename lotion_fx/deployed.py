"""The weights that `eval()` runs at: each is rounded once for each version of its parameter, and kept.

A version is told by the parameter's storage, its counter of changes in place, and a sample of its values: what is
written through ``.data``, as many moving averages do, counts nowhere. The sample is looked at once in each call of a
model, for all weights of a device together.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lotion_fx import private
from lotion_fx.passes.attach.attach import STE, smooth
from lotion_fx.passes.lower import lower
from lotion_fx.state import Weight

SAMPLE = 256  # values of a weight at most by which a change through ``.data`` is noticed


@dataclass(frozen=True)
class Kept:
    """One weight's rounded values.

    Args:
        values: in the parameter's dtype and strides, no gradient.
        version: of the parameter and of how it is rounded.
        sample: a view of some of the parameter's values.
        seen: what they were.
        nbytes: of the parameter's storage.
    """

    values: nn.Parameter
    version: tuple[Any, ...]
    sample: Tensor
    seen: Tensor
    nbytes: int


_kept: weakref.WeakKeyDictionary[Weight, Kept] = weakref.WeakKeyDictionary()


def deployed(weight: Weight, parameter: Tensor, *, is_traced: bool = False) -> Tensor:
    """A weight rounded to nearest, made anew only where its parameter has changed.

    Args:
        parameter: the tensor that its owner holds, neither sharded nor a stand-in.
        is_traced: whether something traces the call.

    Returns:
        A parameter; where the call is traced, a tensor without a gradient, taken as a constant.
    """
    if is_traced:
        with private.outside_of_modes():
            return _current(weight, parameter).detach()
    return _current(weight, parameter)


def _current(weight: Weight, parameter: Tensor) -> nn.Parameter:
    version = _version(weight, parameter)
    known = _kept.get(weight)
    if known is not None and known.version == version:
        return known.values
    with private.outside_of_modes():
        values = nn.Parameter(rounded(weight, parameter), requires_grad=parameter.requires_grad)
        sample = _sample(parameter)
        if sample is None:
            _kept.pop(weight, None)
        else:
            _kept[weight] = Kept(values, version, sample, sample.clone(), sample.untyped_storage().nbytes())
    return values


def rounded(weight: Weight, parameter: Tensor) -> Tensor:
    """A weight rounded to nearest, whatever traces the caller."""
    with private.outside_of_modes(), torch.autocast(parameter.device.type, enabled=False):
        return smoothed(weight, parameter.detach(), STE)


def smoothed(weight: Weight, parameter: Tensor, mode: str) -> Tensor:
    """A weight as `smooth` makes it, outside of every graph.

    Args:
        mode: ``"ste"``, ``"ste_scale"``, ``"rr"`` or ``"mean"``.
    """
    quantizer, arch = weight.quantizer, lower.arch_of(parameter.device)
    fmt, axis, noise = quantizer.constants
    kernel = (
        arch is not None
        and mode in lower.RESULTS
        and lower.prefers_kernel(lower.RESULTS[mode], parameter, quantizer.format, axis, arch)
    )
    return smooth(parameter, None, mode, fmt, axis, "none", 1, 1, noise, kernel)


def linked(parameter: Tensor, values: Tensor) -> Tensor:
    """Values whose gradient passes on to a parameter."""
    return as_parameter(Linked.apply(parameter, values), parameter)


def as_parameter(made: Tensor, parameter: Tensor) -> Tensor:
    """What was made of a parameter, and is one to the guards of graphs that were compiled for one."""
    if type(parameter) is nn.Parameter and type(made) is Tensor:
        made.__class__ = nn.Parameter
    return made


class Linked(torch.autograd.Function):
    """``values`` in the place of ``weight``, whose gradient passes on to the weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, None

    @staticmethod
    def jvp(ctx: Any, weight: Tensor, values: Any) -> Tensor:  # type: ignore[override]
        return weight.view_as(weight)


def forget_changed(weights: Iterable[Weight]) -> None:
    """Drops what was kept of weights whose sample has changed. Reads each device once."""
    by_device: dict[torch.device, list[tuple[Weight, Kept]]] = {}
    for weight in weights:
        if (known := _kept.get(weight)) is not None:
            by_device.setdefault(known.sample.device, []).append((weight, known))
    for pairs in by_device.values():
        if not _same([kept for _, kept in pairs]):
            for weight, known in pairs:
                if not _same([known]):
                    _kept.pop(weight, None)


def forget(weights: Iterable[Weight]) -> None:
    """Frees what was kept, as training goes on."""
    if _kept:
        for weight in weights:
            _kept.pop(weight, None)


def _same(kept: list[Kept]) -> bool:
    """Whether all samples are what they were. FSDP2 frees the storage of a parameter that it has gathered."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for each in kept:
        if each.sample.untyped_storage().nbytes() < each.nbytes:
            return False
        now, before = by_dtype.setdefault(each.sample.dtype, ([], []))
        now.append(each.sample)
        before.append(each.seen)
    with private.outside_of_modes():
        return all(torch.equal(torch.cat(now), torch.cat(before)) for now, before in by_dtype.values())


def _version(weight: Weight, parameter: Tensor) -> tuple[Any, ...]:
    changes = -1 if parameter.is_inference() else private.version_of(parameter)
    place = (parameter.data_ptr(), parameter.dtype, parameter.device, parameter.shape, parameter.stride())
    return (*place, changes, parameter.requires_grad, weight.quantizer)


def _sample(parameter: Tensor) -> Tensor | None:
    """A view of values all over a parameter; None where its storage has holes."""
    strides = sorted(
        (stride, size) for stride, size in zip(parameter.stride(), parameter.shape, strict=True) if size > 1
    )
    expected = 1
    for stride, size in strides:
        if stride != expected:
            return None
        expected *= size
    count = parameter.numel()
    step = max(1, count // SAMPLE) | 1  # odd, so as not to keep to one column
    return parameter.detach().as_strided(((count + step - 1) // step,), (step,), parameter.storage_offset())
