"""The dimension that each op contracts, and the factors that follow, from the graph alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lotion_fx.passes.attach.usage import CONTRACTION, ELEMENTWISE, EMBEDDING, OTHER, weight_uses


def uses(function, shape, *data):
    """The uses of one weight in a function of it and of data, as Dynamo's graph gives it."""
    found = []

    def look(gm, inputs):
        index = next(i for i, x in enumerate(inputs) if isinstance(x, nn.Parameter))
        found.extend(weight_uses(gm, inputs, [index])[index])
        return gm.forward

    torch._dynamo.reset()
    weight = nn.Parameter(torch.randn(shape))
    torch.compile(function, backend=look, fullgraph=True)(weight, *data)
    return found


X = torch.randn(5, 6)
CASES = {
    "linear": (lambda w, x: F.linear(x, w), (7, 6), CONTRACTION, 1, (1, 7)),
    "x @ w": (lambda w, x: x @ w, (6, 7), CONTRACTION, 0, (1, 6)),
    "w @ x": (lambda w, x: w @ x, (7, 5), CONTRACTION, 1, (1, 7)),
    "3-d input": (lambda w, x: F.linear(x[None].expand(3, 5, 6), w), (7, 6), CONTRACTION, 1, (1, 7)),
    "permuted": (lambda w, x: x @ w.permute(2, 0, 1).reshape(6, -1), (2, 3, 6), CONTRACTION, 2, (1, 6)),
    "heads": (lambda w, x: torch.einsum("nd,hdk->nhk", x, w), (2, 6, 3), CONTRACTION, 1, (2, 6)),
    "sliced": (lambda w, x: F.linear(x, w[2:5]), (7, 6), CONTRACTION, 1, (1, 7)),
    "split": (lambda w, x: F.linear(x, w.split(3)[1]), (9, 6), CONTRACTION, 1, (1, 9)),
    "cast": (lambda w, x: F.linear(x.bfloat16(), w.bfloat16()), (7, 6), CONTRACTION, 1, (1, 7)),
    "scaled": (lambda w, x: F.linear(x, w * 0.5), (7, 6), CONTRACTION, 1, (1, 7)),
    "stack [E, in, out]": (lambda w, x: torch.bmm(x[None].expand(3, 5, 6), w), (3, 6, 7), CONTRACTION, 1, (3, 6)),
    "stack [E, out, in]": (
        lambda w, x: torch.bmm(x[None].expand(3, 5, 6), w.transpose(1, 2)), (3, 7, 6), CONTRACTION, 2, (3, 7),
    ),
    "gathered": (
        lambda w, x: torch.bmm(x[:, None], w[torch.tensor([0, 2, 1, 1, 0])]), (3, 6, 7), CONTRACTION, 1, (3, 6),
    ),
    "conv": (lambda w, x: F.conv1d(x[None], w), (8, 5, 3), CONTRACTION, 1, (1, 8)),
    "grouped conv": (lambda w, x: F.conv1d(x.view(1, 6, 5), w, groups=3), (9, 2, 3), CONTRACTION, 1, (3, 3)),
    "depthwise conv": (lambda w, x: F.conv1d(x.view(1, 6, 5), w, groups=6), (6, 1, 3), CONTRACTION, 2, (6, 1)),
    "transposed conv": (lambda w, x: F.conv_transpose1d(x[None], w), (5, 8, 3), CONTRACTION, 0, (1, 5)),
    "grouped transposed conv": (
        lambda w, x: F.conv_transpose1d(x.view(1, 6, 5), w, groups=3), (6, 4, 3), CONTRACTION, 0, (3, 2),
    ),
    "depthwise transposed conv": (
        lambda w, x: F.conv_transpose1d(x.view(1, 6, 5), w, groups=6), (6, 1, 3), CONTRACTION, 2, (6, 1),
    ),
    "embedding": (lambda w, x: F.embedding(x.abs().long().clamp(max=6), w), (7, 6), EMBEDDING, 1, (1, 7)),
    "elementwise": (lambda w, x: w * x, (5, 6), ELEMENTWISE, 1, (1, 5)),
    "softmax": (lambda w, x: x @ w.softmax(0), (6, 7), OTHER, None, (1, 6)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_axis_and_factors(case):
    function, shape, kind, axis, factors = CASES[case]
    first = uses(function, shape, X)[0]
    assert (first.kind, first.axis, (first.groups, first.rows)) == (kind, axis, factors)


def test_every_use_is_seen():
    def twice(w, x):
        return F.linear(F.embedding(x.abs().long().clamp(max=6), w).sum(1), w)

    assert [use.kind for use in uses(twice, (7, 6), X)] == [EMBEDDING, CONTRACTION]


def test_checkpointed_uses_are_seen():
    from torch.utils.checkpoint import checkpoint

    def block(w, x):
        return checkpoint(lambda x, w: F.linear(x, w).relu(), x, w, use_reentrant=False)

    assert [(use.kind, use.axis) for use in uses(block, (7, 6), X)] == [(CONTRACTION, 1)]
