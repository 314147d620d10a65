"""A weight as `smooth` and `pack` see it: three dimensions, in pieces, and which tiles it is cut into.

A contiguous weight is ``[outer, length, inner]`` with blocks along ``length``. A piece is a block where a tile can hold
one, so that its absmax is found in the tile; blocks that are longer come in several pieces, and their absmax is given.
A tile is ``[pieces, PAD, INNER]`` elements, ``PAD`` the next power of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lotion_fx.kernels.config import Config
from lotion_fx.numerics.formats import Format

LONGEST = 1024  # elements of a block of a format that a tile can hold
LONGEST_ROW = 8192  # of a channel, where they lie side by side
PIECE = 2048  # of a longer one in a tile, a warp's
APART = 16  # of one whose elements lie apart in memory, so that the tile has many columns
LINE_FROM = 512  # of a row, for tiles that keep to one row: most of a tile must be in it

# How a factored curvature lies in a tile, 0 where it is dense: see `smooth.curvature`.
ELEMENTS, PIECES, LINE, ALONG = (tl.constexpr(i) for i in range(1, 5))


@dataclass(frozen=True)
class View:
    """A contiguous weight as the kernels see it.

    Args:
        outer, length, inner: its dimensions before, along and after the blocks' axis.
        block: elements of a piece.
        whole: whether a piece is a whole block.
        shared: whether one scale serves the tensor.
        rows, cols: of each group's matrix, for which a factored curvature has factors; 0 without.
    """

    outer: int
    length: int
    inner: int
    block: int
    whole: bool
    shared: bool
    rows: int = 0
    cols: int = 0

    @staticmethod
    def of(shape: Sequence[int], fmt: Format, axis: int, rows: int = 0, cols: int = 0) -> View:
        """How the kernels see a contiguous weight of this shape."""
        if fmt.block == "tensor":  # as rows, unless these are short
            length = math.prod(shape[1:]) if math.prod(shape[1:]) >= LINE_FROM else math.prod(shape)
            return View(math.prod(shape) // length, length, 1, min(length, PIECE), False, True, rows, cols)
        axis = axis % len(shape)
        inner = math.prod(shape[axis + 1 :])
        block, whole = (fmt.block, True) if isinstance(fmt.block, int) else _channel(shape[axis], inner)
        return View(math.prod(shape[:axis]), shape[axis], inner, block, whole, False, rows, cols)

    @property
    def pieces(self) -> int:
        """How many pieces there are along ``length``; the last may be short."""
        return -(-self.length // self.block)

    @property
    def count(self) -> int:
        """How many pieces there are, all columns ``inner`` as one."""
        return self.outer * self.pieces

    @property
    def scales(self) -> int:
        """How many scales there are of blocks that are longer than a tile."""
        return 1 if self.shared else self.outer * self.inner

    @property
    def flat(self) -> bool:
        """Whether pieces follow each other in memory."""
        return self.inner == 1 and self.length % self.block == 0

    @property
    def fours(self) -> bool:
        """Whether all elements of a tile come in fours, side by side, the first at a multiple of four in memory."""
        return self.inner % 4 == 0 if self.inner > 1 else self.length % 4 == 0 and self.block % 4 == 0

    @property
    def pad(self) -> int:
        """A tile's elements along a piece; even, for `pack` puts two codes into a byte."""
        return max(2, triton.next_power_of_2(self.block))

    @property
    def columns(self) -> int:
        """A tile's elements that lie side by side, each in a block of its own."""
        return min(triton.next_power_of_2(self.inner), max(1, 2048 // self.pad))

    @property
    def factored(self) -> int:
        """How a factored curvature lies in a tile; 0 without."""
        if not self.cols:
            return 0
        if self.inner > 1:
            return (ALONG if (self.rows, self.cols) == (self.length, self.inner) else ELEMENTS).value
        if self.cols != self.length:
            return ELEMENTS.value
        return (LINE if self.block < LINE_FROM <= self.cols else PIECES).value

    @property
    def line(self) -> int:
        """Pieces to which tiles keep: those of a row of a factored curvature, else all."""
        return self.pieces if self.factored == LINE.value else self.count

    @property
    def shape_class(self) -> str:
        """The kind of shape for which one config is chosen."""
        if self.inner > 1:
            return "strided"
        return "long" if not self.whole else "flat" if self.pad < LINE_FROM else f"rows/{self.pad}"

    @property
    def arguments(self) -> dict[str, int]:
        """The integers by which a kernel finds its way: sizes of the weight and of a factored curvature, by name."""
        sizes = {"count": self.count, "pieces": self.pieces, "length": self.length, "inner": self.inner}
        return {**sizes, "line": self.line, "rows": max(self.rows, 1), "cols": max(self.cols, 1)}

    @property
    def constants(self) -> dict[str, Any]:
        """The ``tl.constexpr`` arguments of a kernel that the view decides: the tile's shape, scales, curvature."""
        tile = {"BLOCK": self.block, "PAD": self.pad, "INNER": self.columns, "FLAT": self.flat}
        return {**tile, "SHARED": self.shared, "FACTORED": self.factored}

    def programs(self, meta: Mapping[str, int]) -> int:
        """How many programs there are, each of up to ``meta["TILES"]`` tiles of ``meta["SIZE"]`` elements."""
        rows, tiles = self._tiles(meta["SIZE"])
        return rows * triton.cdiv(tiles, meta["TILES"])

    def tiles(self, meta: Mapping[str, int]) -> int:
        """How many tiles a program has, on average, rounded."""
        rows, tiles = self._tiles(meta["SIZE"])
        return round(rows * tiles / self.programs(meta))

    def _tiles(self, size: int) -> tuple[int, int]:
        """Runs of tiles that no program reaches beyond, and the tiles of each: where strided, those side by side."""
        pieces = size // (self.pad * self.columns)
        if self.columns > 1:
            return triton.cdiv(self.count, pieces), triton.cdiv(self.inner, self.columns)
        return 1, self.count // self.line * triton.cdiv(self.line, pieces)


ROWS = (512, 1024, 2048, 4096, LONGEST_ROW)  # widths of tiles that hold rows as a whole, with a config for each


def configs(*sizes: tuple[int, int, int]) -> tuple[Config, ...]:
    """Candidates: elements of a tile, tiles of a program, warps."""
    return tuple(Config({"SIZE": size, "TILES": tiles}, num_warps=warps) for size, tiles, warps in sizes)


def _channel(length: int, inner: int) -> tuple[int, bool]:
    """A channel's piece, and whether that is all of it."""
    if inner > 1:
        return APART, False
    return (length, True) if length <= LONGEST_ROW else (PIECE, False)


def supports(w: Tensor, fmt: Format) -> bool:
    """Whether the kernels take this weight: at most float32, not empty, 32-bit offsets, no block cut by a tile."""
    short = fmt.block <= LONGEST if isinstance(fmt.block, int) else not fmt.law.two_level
    return short and w.dtype in (torch.float32, torch.bfloat16, torch.float16) and 0 < w.numel() <= 2**31 - 2**20


def check(w: Tensor, fmt: Format) -> None:
    """Refuses what `supports` says no to."""
    if not supports(w, fmt):
        raise ValueError(
            f"w: {w.dtype} of shape {tuple(w.shape)} in {fmt.name} (blocks of {fmt.block}) is not for the kernel; "
            f"expected 1 to 2^31 - 2^20 elements of float32, bfloat16 or float16, and blocks of at most {LONGEST}, "
            "'channel' or 'tensor'"
        )


def amaxes(w: Tensor, fmt: Format, axis: int) -> Tensor | None:
    """The absmaxes of a tensor or of its channels, float32; None where a format's scales need neither."""
    if fmt.law.two_level or fmt.block == "tensor":
        return torch.linalg.vector_norm(w, torch.inf, dtype=torch.float32)
    return torch.linalg.vector_norm(w, torch.inf, dim=axis, dtype=torch.float32) if fmt.block == "channel" else None


def absent_amaxes(w: Tensor, view: View, fmt: Format, axis: int, amax: Tensor | None) -> Tensor | None:
    """What a kernel must be given: the known ``amax`` or, made here, `amaxes`; None where it finds them all itself."""
    if view.whole and not fmt.law.two_level:
        return None
    return amaxes(w, fmt, axis) if amax is None else amax.to(torch.float32)
