"""One op of a run, as the rules see it: what it is given, and whom to tell of weights that meet something."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lotion_fx.passes.attach.values import Part, Value

aten = torch.ops.aten

CONTRACTION, INNER, PRODUCT = "contraction", "inner contraction", "product"
EMBEDDING, LOOKUP, PLACED, OVERWRITTEN = "embedding", "lookup", "placed", "overwritten"
SUM, ELEMENTWISE, SCALE, DEVIATION, INPUT = "sum", "elementwise", "scale", "deviation", "input"
PRODUCTS = frozenset({CONTRACTION, INNER, PRODUCT})
"""The kinds of use by which a weight is in; see `passes.attach.usage.Use`."""


class Operand(NamedTuple):
    """One tensor that an op is given: at which of its arguments, a list's members all at the list's."""

    position: int
    tensor: Tensor
    value: Value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


class Meeting(NamedTuple):
    """One op that meets a weight with something, see `passes.attach.usage.Use`.

    Of a product ``summed`` are the weight's dimensions that it sums over, ``free`` those that its result still has,
    beside any batch; None where the op's rule does not say.
    """

    kind: str
    op: str
    part: Part
    summed: frozenset[int] = frozenset()
    own: bool = True
    stacked: bool = False
    groups: int = 0
    free: frozenset[int] | None = None


@dataclass(frozen=True)
class Call:
    """One op of a run.

    Args:
        func: the ATen op.
        args: its arguments in the order of its schema, defaults included.
        operands: the tensors among these.
        shapes: of its results.
        record: told of each meeting, with the weight's index.
    """

    func: Any
    args: Sequence[Any]
    operands: Sequence[Operand]
    shapes: Sequence[tuple[int, ...]]
    record: Callable[[int, Meeting], None]

    @property
    def packet(self) -> Any:
        return functional(self.func.overloadpacket)

    @property
    def out_of_place(self) -> Any:
        """The same overload of `packet`, the op itself where there is none."""
        return getattr(self.packet, str(self.func).rpartition(".")[2], self.func)

    @property
    def name(self) -> str:
        return str(self.packet).removeprefix("aten.").lstrip("_")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    @property
    def data(self) -> bool:
        return any(operand.value.data for operand in self.operands)

    def at(self, position: int) -> list[Operand]:
        return [operand for operand in self.operands if operand.position == position]

    def meets(self, kind: str, operands: Iterable[Operand]) -> None:
        """Weights of these operands meet data, or other weights, in no sum of products."""
        for operand in operands:
            for weight, part in operand.value.parts.items():
                if not part.scaled:
                    self.record(weight, Meeting(kind, self.name, part))

    def contracts(
        self, operand: Operand, summed: Sequence[int], free: Sequence[int], *, data: bool, **more: Any
    ) -> None:
        """An operand's weights are summed over, with data or with parameters alone."""
        for weight, part in operand.value.parts.items():
            if not part.scaled or (data and part.is_matrix(summed, free)):
                kind = CONTRACTION if data else INNER
                held, stacked = part.held_at(summed), part.dims is not None and len(part.dims) > 2
                more["free"] = part.held_at(free)
                self.record(weight, Meeting(kind, self.name, part, held, stacked=stacked, **more))


def functional(packet: Any) -> Any:
    """The op out of place."""
    namespace, _, name = str(packet).rpartition(".")
    if namespace != "aten" or not name.endswith("_") or name.startswith("__"):
        return packet
    return getattr(aten, name.rstrip("_"), packet)
