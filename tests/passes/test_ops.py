"""The table of ops: one row an op, and what is read off it."""

from collections import Counter

import pytest
import torch

from lotion_fx.passes import ops
from lotion_fx.passes.ops import OPS, Backward, Forward

aten = torch.ops.aten


def test_every_overload_has_one_row():
    assert Counter(target for op in OPS for target in op.targets).most_common(1)[0][1] == 1


def test_every_row_names_an_op_that_torch_has_and_arguments_that_it_takes():
    for op in OPS:
        for target in op.targets:
            assert callable(target)
            if hasattr(target, "_schema") and op.backward:
                assert max(op.through) < len(target._schema.arguments)


@pytest.mark.parametrize(
    "op", [op for op in OPS if op.dims and op.forward is Forward.PERMUTE], ids=lambda op: str(op.packet)
)
def test_permuted_dimensions_are_where_the_op_puts_them(op):
    args = {aten.permute: ([2, 0, 1],), aten.transpose: (0, 2), aten.t: ()}[op.packet]
    x = torch.zeros(3, 5) if op.packet is aten.t else torch.zeros(3, 5, 7)
    y = op.packet(x, *args)
    held = op.dims(tuple(frozenset({d}) for d in range(x.dim())), (x, *args), tuple(x.shape), tuple(y.shape))
    assert [x.shape[next(iter(dim))] for dim in held] == list(y.shape)


def test_a_contraction_sums_over_the_dimension_that_its_row_says():
    sizes = {"mm": [(3, 5), (5, 7)], "bmm": [(2, 3, 5), (2, 5, 7)], "mv": [(3, 5), (5,)], "dot": [(5,), (5,)]}
    sizes |= {"addmm": [(3, 7), *sizes["mm"]], "baddbmm": [(2, 3, 7), *sizes["bmm"]]}
    for name, shapes in sizes.items():
        contracted = ops.CONTRACTED[getattr(aten, name)]
        assert {shapes[argument][dim] for argument, dim in contracted.items()} == {5}
        getattr(aten, name)(*(torch.zeros(shape) for shape in shapes))


def test_squares_pass_back_as_the_row_says():
    """By the op itself where it places or adds up, by the squared factor where it scales."""
    g, factor = torch.randn(4, 6), torch.randn(4, 6)
    assert ops.WALKED[aten.flip.default] == (0,) and aten.flip.default not in ops.SCALED | ops.UNSIGNED
    torch.testing.assert_close(g.flip(0).square(), g.square().flip(0))
    assert aten.mul.Tensor in ops.SCALED
    torch.testing.assert_close((g * factor).square(), g.square() * factor.square())
    assert aten.neg.default in ops.UNSIGNED
    torch.testing.assert_close((-g).square(), g.square())


def test_kinds_do_not_overlap():
    rows = {target: op for op in OPS for target in op.targets}
    assert all(rows[target].forward in (Forward.SUM, Forward.SCALE) for target in ops.ELEMENTWISE)
    assert all(rows[target].backward is Backward.SCALE for target in ops.SCALED)
    assert not ops.VIEWS & ops.CONTRACTIONS and not ops.GATHERS & ops.VIEWS
    assert {aten.addmm.default, aten.baddbmm.default, aten.addmv.default} == ops.ADDING
