"""Blocks run along what the product sums over, whatever stands between it and the weight.

The oracle is the product's own gradient: that of one element of the output reaches, along a dimension that is summed
over, more than one element of the weight.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lotion_fx.passes.attach.usage import CONTRACTION, INNER
from tests.passes.attach.test_usage import of_parameters, uses

X = torch.randn(5, 6)


def order(count=6):
    """An index that is a constant of the graph."""
    return torch.tensor([3, 1, 0, 5, 4, 2])[:count]


def assigned(w):
    made = torch.zeros(6, 11)
    made[:, 2:9] = w
    return made[:, 2:9]


def assigned_turned(w):
    made = torch.zeros(6, 9)
    made.t()[1:8] = w
    return made


def assigned_members(w):
    """Of [2, 6, 3], written to every second column of an [6, 6]."""
    made = torch.zeros(6, 6)
    made.as_strided((2, 6, 3), (3, 6, 1)).copy_(w)
    return made


def added_in_place(w):
    made = torch.zeros(6, 7)
    made[order(), 1:] += w
    return made


HEADS = X.view(5, 2, 3)
CASES = {
    # rows by an index
    "gather": (lambda w, x: x @ w.gather(0, order()[:, None].expand(6, 7)), (6, 7), 0),
    "gather of a transpose": (lambda w, x: x @ w.t().gather(0, order()[:, None].expand(6, 7)), (7, 6), 1),
    "take_along_dim": (lambda w, x: x @ torch.take_along_dim(w, order()[:, None], 0), (6, 7), 0),
    # placed in others
    "index_put": (lambda w, x: x @ torch.zeros(6, 7).index_put((order(),), w), (6, 7), 0),
    "index_put, second": (lambda w, x: x @ torch.zeros(6, 9).index_put((order()[:, None], order()), w), (6, 6), 0),
    "index_put, turned": (lambda w, x: x @ torch.zeros(6, 9).index_put((order(), order()[:, None]), w), (6, 6), 1),
    "index_put, turned, all": (lambda w, x: x @ torch.zeros(6, 6).index_put((order(), order()[:, None]), w), (6, 6), 1),
    "index_put, row": (lambda w, x: x @ torch.zeros(6, 7, 1).index_put((order(4),), w[:, :, None])[..., 0], (4, 7), 0),
    "index_put, flat": (
        lambda w, x: x @ torch.zeros(6, 7).index_put((torch.ones(6, 7, dtype=torch.bool),), w.flatten()), (6, 7), None,
    ),
    "index_put, middle": (
        lambda w, x: torch.einsum("bi,eio->beo", x, torch.zeros(2, 8, 7).index_put((torch.arange(2), ), w)[:, :6]),
        (2, 8, 7), 1,
    ),
    "index_copy": (lambda w, x: x @ torch.zeros(6, 7).index_copy(0, order(), w), (6, 7), 0),
    "index_copy, some": (lambda w, x: x @ torch.zeros(6, 7).index_copy(0, order(4), w), (4, 7), 0),
    "index_copy in place": (lambda w, x: x @ torch.zeros(6, 7).index_copy_(0, order(), w), (6, 7), 0),
    "index_add": (lambda w, x: x @ torch.zeros(6, 7).index_add(0, order(4), w), (4, 7), 0),
    "scatter, some": (lambda w, x: x @ torch.zeros(6, 7).scatter(0, order(4)[:, None].expand(4, 7), w), (4, 7), 0),
    "slice_scatter": (lambda w, x: x @ torch.zeros(6, 7).slice_scatter(w, 0, 1, 5), (4, 7), 0),
    "select_scatter": (
        lambda w, x: torch.einsum("bi,eio->beo", x, torch.zeros(2, 6, 7).select_scatter(w, 0, 1)), (6, 7), 0,
    ),
    "diagonal_scatter": (
        lambda w, x: torch.einsum("be,eio->bio", x, torch.zeros(6, 7, 7).diagonal_scatter(w, 0, 1, 2)), (6, 7), 0,
    ),
    "a copy in every member": (
        lambda w, x: torch.einsum("bi,eio->beo", x, torch.empty(2, 6, 7).copy_(w)), (6, 7), 0,
    ),
    "slice": (lambda w, x: x @ assigned(w), (6, 7), 0),
    "slice of a transpose": (lambda w, x: x @ assigned_turned(w), (7, 6), 1),
    "slice of a view": (lambda w, x: x @ assigned_members(w), (2, 6, 3), 1),
    "added in place": (lambda w, x: x @ added_in_place(w), (6, 6), 0),
    "block_diag": (lambda w, x: x @ torch.block_diag(w[:2], w[2:]), (6, 7), 0),
    # by other ops
    "as_strided": (lambda w, x: x @ w.as_strided((6, 7), (7, 1)), (6, 7), 0),
    "as_strided, turned": (lambda w, x: x @ w.as_strided((6, 7), (1, 6)), (7, 6), 1),
    "complex": (lambda w, x: ((x + 0j) @ torch.complex(w, 2 * w)).real, (6, 7), 0),
    "pixel_shuffle": (lambda w, x: x @ F.pixel_shuffle(w[:, :, None], 1)[..., 0], (6, 7), 0),
    # two dimensions are summed over
    "heads joined": (lambda w, x: torch.einsum("bhd,hdo->bo", HEADS, w), (2, 3, 7), 1),
    "heads joined, out first": (lambda w, x: torch.einsum("bhd,ohd->bo", HEADS, w), (7, 2, 3), 2),
    "heads joined, out between": (lambda w, x: torch.einsum("bhd,hod->bo", HEADS, w), (2, 7, 3), 2),
    "tensordot": (lambda w, x: torch.tensordot(HEADS, w, 2), (2, 3, 7), 1),
    "by hand": (lambda w, x: (HEADS[..., None] * w).sum((1, 2)), (2, 3, 7), 1),
}  # fmt: skip


def summed_over(function, shape):
    """The dimensions along which one output's gradient reaches more than one element."""
    w = torch.randn(shape, requires_grad=True)
    out = function(w, X.abs())
    found = set()
    for element in out.flatten():
        (grad,) = torch.autograd.grad(element, w, retain_graph=True)
        found |= {d for d in range(len(shape)) if ((grad != 0).sum(d) > 1).any()}
    return found


@pytest.mark.parametrize("case", CASES)
def test_blocks_run_along_a_dimension_that_is_summed_over(case):
    function, shape, axis = CASES[case]
    (found,) = {use.axis for use in uses(function, shape, X) if use.is_product}
    assert found == axis
    assert axis is None or axis in summed_over(function, shape)


def test_heads_joined_are_rows():
    for function, shape, factors in (
        (lambda w, x: torch.einsum("bhd,hdo->bo", HEADS, w), (2, 3, 7), (1, 6)),
        (lambda w, x: torch.einsum("bhd,ohd->bo", HEADS, w), (7, 2, 3), (1, 7)),
        (lambda w, x: torch.einsum("bhd,hod->bo", HEADS, w), (2, 7, 3), (1, 2)),
    ):
        (use,) = uses(function, shape, X)
        assert (use.groups, use.rows) == factors


def test_a_norm_of_a_kernel_fixes_no_axis():
    def normed(w, x):
        flat = w.flatten(1)
        return F.conv1d(x[:, :, None].expand(5, 6, 4), w / (flat @ torch.ones(flat.shape[1])).norm())

    found = uses(normed, (8, 6, 3), X)
    assert found[0].axis == 1 and {use.axis for use in found if use.kind == INNER} == {None}


def test_what_normalizes_or_mixes_a_weight():
    """Every output depends on all of a row of the weight there, so the oracle is the product alone."""
    for norm in (lambda w: F.layer_norm(w, (7,)), lambda w: F.group_norm(w, 1)):
        (found,) = {use.axis for use in uses(lambda w, x, norm=norm: x @ norm(w), (6, 7), X) if use.is_product}
        assert found == 0
    found = uses(lambda w, x: x @ torch.matrix_exp(w), (6, 6), X)
    assert [use.axis for use in found] == [None]


def test_taking_an_op_apart_is_no_use_of_its_own():
    """What stands for a norm multiplies it by its gain: the graph does not."""
    gain, w = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(6, 7))
    for which in (gain, w):
        found = of_parameters(lambda x: x @ F.layer_norm(w, (7,), gain), which, w, X)
        assert {(use.kind, use.op) for use in found} == {(CONTRACTION, "mm")}


def test_rows_gathered_entry_by_entry_by_data_are_a_lookup():
    def function(w, x):
        index = x[:, :1, None].long().clamp(0, 1).expand(5, 6, 7)
        return torch.bmm(x[:, None], w.gather(0, index))

    assert [use.kind for use in uses(function, (2, 6, 7), X)] == ["lookup"]
