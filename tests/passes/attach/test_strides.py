"""What a view holds, against the numbers of the elements that it shows."""

import pytest
import torch

from lotion_fx.passes.attach.strides import Box, along, seen, written
from lotion_fx.passes.attach.values import whole

BASES = {
    "contiguous": torch.arange(2 * 3 * 4).view(2, 3, 4),
    "turned": torch.arange(2 * 3 * 4).view(4, 3, 2).permute(2, 1, 0),
    "a slice": torch.arange(4 * 5 * 6).view(4, 5, 6)[1:3, 1:4, 2:6],
    "a single row": torch.arange(3 * 4).view(1, 3, 4),
}
VIEWS = {
    "itself": lambda x: x,
    "slice": lambda x: x[:, 1:, ::2],
    "select": lambda x: x[0],
    "permuted": lambda x: x.permute(2, 0, 1),
    "a new dimension": lambda x: x[:, None],
    "expanded": lambda x: x[..., None].expand(*x.shape, 5),
    "diagonal": lambda x: x.diagonal(0, 1, 2),
    "windows": lambda x: x.unfold(2, 2, 1),
    "split": lambda x: x.unflatten(2, (2, 2)),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("view", VIEWS)
def test_a_walk_along_a_view_moves_in_these_dimensions(base, view):
    base, numbers = BASES[base], torch.arange(BASES[base].numel()).view(BASES[base].shape)
    view, shown = VIEWS[view](base), VIEWS[view](numbers)
    coordinates = torch.stack(torch.unravel_index(shown, base.shape))
    expected = tuple(
        frozenset((coordinates != coordinates.narrow(place + 1, 0, 1)).flatten(1).any(1).nonzero().flatten().tolist())
        for place in range(view.dim())
    )
    found = along(Box.of(view), Box.of(base))
    assert found == expected
    part = whole(base.shape)
    assert seen(part, Box.of(view), Box.of(base)).dims == expected


def test_what_is_written_lies_where_the_view_does():
    made = torch.zeros(6, 9)
    view = made.t()[1:8]
    assert written(whole((7, 6)), Box.of(view), Box.of(made)).dims == (frozenset({1}), frozenset({0}))
    diagonal = torch.zeros(6, 6)
    part = written(whole((6,)), Box.of(diagonal.diagonal()), Box.of(diagonal))
    assert part.dims == (frozenset({0}), frozenset({0}))
