"""The codes and scales of a transformed model's weights: what `eval()` runs at, bit for bit."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lotion_fx.kernels.packed import Packed, in_pairs, pack_in_aten, unpack
from lotion_fx.numerics.formats import Format
from lotion_fx.progress import with_a_bar
from lotion_fx.state import Weight, names_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One weight as it is deployed. Blocks run along ``axis``, which codes and scales have last: ``rows`` below are the
    other dimensions, in their order, and K is ``shape[axis]``.

    Args:
        codes: uint8, [*rows, ceil(K / 2)] for codes of up to 4 bits, the even element in the low half of a byte, else
            [*rows, K].
        scales: of each block, [*rows, blocks], [1] for a "tensor" format; in the dtype that the scale law stores:
            uint8 codes (E4M3 or E8M0), bfloat16, float16 or float32.
        tensor_scale: 0-d float32, which multiplies every scale; None unless the scale law has two levels.
        format: levels, block and scale law.
        axis: the dimension that blocks run along.
        shape: of the weight.
        dtype: of the weight.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    format: Format
    axis: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(w: Tensor, fmt: Format, axis: int) -> QuantizedWeight:
        """A weight rounded to nearest.

        Args:
            w: float32, bfloat16 or float16.
            axis: the dimension that blocks run along.
        """
        packed = pack_in_aten(w.detach().movedim(axis, -1).contiguous(), fmt)
        scales = packed.scales if packed.scales.dtype == torch.uint8 else packed.scales.to(fmt.law.stored)
        return QuantizedWeight(packed.codes, scales, packed.tensor_scale, fmt, axis % w.dim(), tuple(w.shape), w.dtype)

    @property
    def packed(self) -> Packed:
        """As the kernels take it: 16-bit scales widened to float32."""
        scales = self.scales if self.scales.dtype == torch.uint8 else self.scales.float()
        return Packed(self.codes, scales, self.tensor_scale)

    @property
    def length(self) -> int:
        """K, along the blocks."""
        return self.shape[self.axis]

    def each_code(self) -> Tensor:
        """The codes one to a byte, uint8 [*rows, K]."""
        if not in_pairs(self.format):
            return self.codes
        return torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(-2)[..., : self.length]

    def block_scales(self) -> Tensor:
        """What levels are multiplied by, the whole of it: float32 [*rows, blocks], [1] for a "tensor" format."""
        type = getattr(self.format.law, "type", None)
        scales = self.packed.scales if type is None else type.decode(self.scales)
        return scales if self.tensor_scale is None else scales * self.tensor_scale

    def dequantize(self) -> Tensor:
        """The weight that `eval()` computes with, bit for bit, in its own shape and dtype."""
        return unpack(self.packed, self.format, self.length).movedim(-1, self.axis).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        parts = (self.codes, self.scales, self.tensor_scale)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def to(self, device: torch.device | str) -> QuantizedWeight:
        move = partial(Tensor.to, device=device)
        scale = None if self.tensor_scale is None else move(self.tensor_scale)
        return replace(self, codes=move(self.codes), scales=move(self.scales), tensor_scale=scale)


def quantized(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The codes and scales of every weight that is deployed rounded, by the weight's name in the model.

    A weight that several modules share is there once, under its first name. Of a sharded weight every rank gets the
    whole, and all ranks must call.

    Args:
        model: transformed.

    Raises:
        ValueError: the model is not under lotion_fx, has no rounded weight, or has one whose blocks' dimension no
            forward has told yet, whose values are no finite numbers, or whose dtype is not float32, bfloat16, float16.
        TypeError: it is no module.
    """
    names = {name: weight for weight, name in names_of(model).items() if weight.selected}
    if not names:
        raise ValueError(
            "model: no weight of it is rounded, so there is nothing to deploy; print(lotion_fx.report(model)) says why"
        )
    found = {name: _quantized(name, weight) for name, weight in with_a_bar("packing", names.items(), len(names))}
    if assumed := [name for name, weight in names.items() if not weight.is_known_operand]:
        warnings.warn(
            f"{assumed[0]!r} is blocked along dimension {names[assumed[0]].axis} by assumption, as it was in training "
            "and eval(): no graph shows what sums over it; print(lotion_fx.report(model)) says of which others too",
            stacklevel=3,
        )
    return found


@torch.no_grad()
def _quantized(name: str, weight: Weight) -> QuantizedWeight:
    parameter = checked_values(name, weight)
    if isinstance(parameter, DTensor):
        parameter = parameter.full_tensor()
    if parameter.dtype not in DTYPES:
        raise ValueError(
            f"model: {name!r} is {str(parameter.dtype).removeprefix('torch.')}; codes are made of float32, bfloat16 or "
            "float16 weights: call model.float() first"
        )
    return QuantizedWeight.of(parameter, weight.format, weight.axis)  # type: ignore[arg-type]  # selected


def checked_values(name: str, weight: Weight) -> Tensor:
    """The parameter that a weight is rounded from, where it can be for good.

    Raises:
        ValueError: its blocks' dimension is not known yet, or it has no values, or some that are no finite numbers.
    """
    if not weight.is_known_operand and not weight.smoothing.tally.forwards:
        raise ValueError(
            f"model: along which dimension {name!r} is blocked, no forward has told yet; call the model once, in eval()"
        )
    parameter = weight.master
    if parameter is None:
        parameter = weight.parameter()
    if parameter is None:
        raise ValueError(f"model: its weight {name!r} is gone from the module that held it; register one there again")
    if parameter.is_meta:
        raise ValueError(f"model: {name!r} has no values (it is on the meta device); load the trained weights first")
    if not parameter.isfinite().all():
        raise ValueError(f"model: {name!r} has values that are no finite numbers; what was trained cannot be deployed")
    return parameter
