"""The transformers whose layers kernels are audited on: the one list of shapes."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int]  # outputs and inputs of a layer


@dataclass(frozen=True)
class Model:
    """The matrices of a transformer.

    Args:
        name: its size.
        layers: how many it has.
        width: of the residual stream.
        inner: of the feed-forward layer.
        keys: of all heads' keys, and of their values.
        ups: matrices from ``width`` to ``inner``: 2 where one gates.
    """

    name: str
    layers: int
    width: int
    inner: int
    keys: int
    ups: int

    @property
    def square(self) -> Shape:
        """The matrices of queries and of attention's output."""
        return self.width, self.width

    @property
    def key(self) -> Shape:
        """The matrices of keys and of values."""
        return self.keys, self.width

    @property
    def up(self) -> Shape:
        """The matrices into the feed-forward layer, the model's largest."""
        return self.inner, self.width

    @property
    def down(self) -> Shape:
        """The matrix out of it."""
        return self.width, self.inner

    @property
    def layer(self) -> list[Shape]:
        """All matrices of one layer."""
        return [self.square] * 2 + [self.key] * 2 + [self.up] * self.ups + [self.down]


SMALL = Model("150M", 12, 768, 3072, 768, 1)
MIDDLE = Model("8B", 32, 4096, 14336, 1024, 2)
LARGE = Model("70B", 80, 8192, 28672, 1024, 2)
MODELS = (SMALL, MIDDLE, LARGE)
