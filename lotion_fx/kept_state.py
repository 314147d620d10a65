"""What a forward that nobody asked for must leave as it was: buffers, and parameters that are not trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lotion_fx import private
from lotion_fx.state import registry

LARGEST = 1 << 21
"""Elements of the largest untrained parameter that is kept by value: a codebook, but no layer of a large frozen model,
which would be copied in each pass for nothing."""


class Kept:
    """One tensor as it was.

    Its version does not tell all changes: writes through ``.data`` and of batch norm's kernels are not counted.

    Args:
        tensor: which may be written to from here on.
        by_value: whether its values are copied, to be compared and put back.
    """

    def __init__(self, tensor: Tensor, *, by_value: bool = True) -> None:
        self.tensor, self.version = tensor, _version(tensor)
        self.data = tensor.data if by_value and _is_plain(tensor) else None
        self.memory = None if self.data is None else _memory(self.data)
        self.values: Tensor | None = None
        if by_value and not tensor.is_inference():  # one that inference mode made cannot be written to
            self.values = tensor.detach().clone() if self.memory is None else self.memory.clone()

    @property
    def is_changed(self) -> bool:
        """Whether it was written to since."""
        if _version(self.tensor) != self.version:
            return True
        if self.memory is None or self.values is None:
            return False
        return not torch.equal(self.memory.view(torch.uint8), self.values.view(torch.uint8))

    def put_back(self) -> None:
        """Gives it its memory and its values again; where nothing was counted as a change, neither is this."""
        if self.data is not None and self.memory is not None and self.values is not None:
            if self.tensor.data_ptr() != self.data.data_ptr() or self.tensor.shape != self.data.shape:
                self.tensor.data = self.data
            self.memory.copy_(self.values)  # unasked whether it differs, for which a GPU would be waited for
        elif self.values is not None and _version(self.tensor) != self.version:
            with torch.no_grad():
                self.tensor.copy_(self.values)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else private.version_of(tensor)


def _is_plain(tensor: Tensor) -> bool:
    """Whether all its values are in memory of its own."""
    is_own = type(tensor) in (Tensor, nn.Parameter) and not private.is_wrapped(tensor)
    is_odd = tensor.is_meta or tensor.is_inference() or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return is_own and tensor.layout is torch.strided and not is_odd


def _memory(tensor: Tensor) -> Tensor:
    """The memory that a tensor lies in, one-dimensional: an expanded one cannot be written to as it is."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span if tensor.numel() else 0,), (1,))


@contextlib.contextmanager
def kept_state(model: nn.Module) -> Iterator[dict[Tensor, Kept]]:
    """Puts every buffer back at the end, as a tensor and in its values, and the values of untrained parameters.

    Not of quantized weights, nor of parameters that are larger than `LARGEST`.

    Returns:
        All buffers and parameters as they were.
    """
    kept: dict[Tensor, Kept] = {}
    places = []
    for module in model.modules():
        for name, buffer in private.buffers_of(module).items():
            if buffer is not None:
                places.append((private.buffers_of(module), name, buffer))
                kept.setdefault(buffer, Kept(buffer))
        owned = registry.owned.get(module, {})
        for name, parameter in private.parameters_of(module).items():
            if parameter is not None and parameter not in kept:
                is_rounded = name in owned and owned[name].selected
                kept[parameter] = Kept(parameter, by_value=not is_rounded and _is_small_and_untrained(parameter))
    try:
        yield kept
    finally:
        for owner, name, buffer in places:
            owner[name] = buffer
        for each in kept.values():
            each.put_back()


def _is_small_and_untrained(parameter: Tensor) -> bool:
    return not parameter.requires_grad and _is_plain(parameter) and parameter.numel() <= LARGEST
