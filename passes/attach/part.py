"""The part of a weight that one rank holds, and where its curvature lies in a vector of the whole weight.

Ranks that shard a weight all keep the vector of the whole: each puts what it knows into zeros, and a sum over ranks
joins them. So a state means the same whatever the number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx.passes.attach.probe import HEADER, Layout

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """A box of a weight.

    Args:
        layout: of the whole weight.
        spans: [start, stop) along each of its dimensions.
    """

    layout: Layout
    spans: Spans

    @staticmethod
    def whole(layout: Layout) -> Part:
        return Part(layout, tuple((0, length) for length in layout.shape))

    @property
    def is_whole(self) -> bool:
        return self == Part.whole(self.layout)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.spans)

    @property
    def own(self) -> Layout:
        """The layout that the part has by itself.

        Raises:
            ValueError: it holds unequal parts of the groups that are factored apart.
        """
        layout, (rows, _) = self.layout, self._lengths
        if layout.kind != "factored":
            return Layout(layout.kind, self.shape, 1, max(self.shape[0], 1), layout.direct)
        _, groups = self._group_span
        if rows % groups or (groups > 1 and rows // groups != layout.rows):
            raise ValueError(
                f"parameter of shape {layout.shape}: its shard {self.spans} cuts one of {layout.groups} groups; shard "
                "it between them, or leave it out by only="
            )
        return Layout(layout.kind, self.shape, groups, rows // groups, layout.direct)

    @property
    def _row_dims(self) -> int:
        """How many of the first dimensions are rows of the factorization; the others are its columns."""
        count, groups_and_rows = 0, self.layout.groups * self.layout.rows
        while math.prod(self.layout.shape[:count]) < groups_and_rows:
            count += 1
        if math.prod(self.layout.shape[:count]) != groups_and_rows:
            raise ValueError(
                f"parameter of shape {self.layout.shape}: its factored curvature has {groups_and_rows} rows, which no "
                "first dimensions are, so it cannot be sharded; use curvature='full' or leave it out by only="
            )
        return count

    @property
    def _lengths(self) -> tuple[int, int]:
        """Its numbers of rows and columns."""
        return math.prod(self.shape[: self._row_dims]), math.prod(self.shape[self._row_dims :])

    @property
    def _group_span(self) -> tuple[int, int]:
        """The first group that it holds rows of, and how many such groups there are."""
        shape, spans, count = self.layout.shape, self.spans, self._row_dims
        first = last = 0
        for length, (start, stop) in zip(shape[:count], spans[:count], strict=True):
            first, last = first * length + start, last * length + stop - 1
        return first // self.layout.rows, last // self.layout.rows - first // self.layout.rows + 1

    def rows(self, device: torch.device) -> Tensor:
        """Where its rows lie among all groups' rows, int64."""
        return self._index(0, self._row_dims, device)

    def columns(self, device: torch.device) -> Tensor:
        """Where its columns lie, int64."""
        return self._index(self._row_dims, len(self.spans), device)

    def _index(self, first: int, last: int, device: torch.device) -> Tensor:
        index = torch.zeros(1, dtype=torch.int64, device=device)
        for length, (start, stop) in zip(self.layout.shape[first:last], self.spans[first:last], strict=True):
            index = (index[:, None] * length + torch.arange(start, stop, device=device)).flatten()
        return index

    def cut(self, whole: Tensor) -> Tensor:
        """A view of the part in a tensor of the whole weight."""
        return whole[tuple(slice(start, stop) for start, stop in self.spans)]

    def placed(self, vector: Tensor) -> Tensor:
        """A probe vector of the part's `own` layout in zeros of the whole weight's, its header kept."""
        own, payload, header = self.own, vector[:-HEADER], vector[-HEADER:]
        if own.kind == "none":
            return vector
        if own.kind == "full":
            return torch.cat([self._filled(payload), header])
        rows, cols, norm = own.split(vector)
        return torch.cat([self._joined(rows.reshape(-1), cols, norm), header])

    def marginals(self, h: Tensor) -> Tensor:
        """The payload, in zeros, of an h over the part: its sums along rows and columns in a factored layout, or all.

        Args:
            h: float32, of the part's shape.
        """
        if self.layout.kind != "factored":
            return self._filled(h)
        count, flat = self._lengths[1], h.reshape(self._lengths)
        first, groups = self._group_span if h.numel() else (0, 1)
        member = self.rows(h.device) // self.layout.rows - first
        cols = h.new_zeros(groups, count).index_add(0, member, flat)
        return self._joined(flat.sum(1), cols, cols.sum(1))

    def _filled(self, h: Tensor) -> Tensor:
        sides = [(start, length - stop) for (start, stop), length in zip(self.spans, self.layout.shape, strict=True)]
        return F.pad(h.view(self.shape), [n for pair in reversed(sides) for n in pair]).flatten()

    def _joined(self, rows: Tensor, cols: Tensor, norm: Tensor) -> Tensor:
        """[rows | cols | norm] of the whole from those of the part's rows, its groups' columns, and its groups."""
        layout, device = self.layout, rows.device
        groups, each, columns = layout.factors
        first = self._group_span[0] if rows.numel() else 0
        member = torch.arange(first, first + norm.numel(), device=device)
        all_rows = rows.new_zeros(groups * each).index_copy(0, self.rows(device), rows)
        of_groups = rows.new_zeros(norm.numel(), columns).index_copy(1, self.columns(device), cols)
        all_cols = rows.new_zeros(groups, columns).index_copy(0, member, of_groups)
        return torch.cat([all_rows, all_cols.flatten(), rows.new_zeros(groups).index_copy(0, member, norm)])
