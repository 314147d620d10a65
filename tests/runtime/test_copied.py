"""`copied`: what a model is given, for a pass of ours."""

from collections import OrderedDict

import torch
from torch import nn

from lotion_fx.copied import copied


def test_values_containers_and_what_is_one_tensor():
    x, weight = torch.randn(3), nn.Parameter(torch.randn(2))
    given = (x, [x], {"n": 1, "weight": weight}, OrderedDict(name="a"), None)
    found = copied(given)
    assert torch.equal(found[0], x) and found[0] is not x and found[1][0] is found[0]
    assert found[2] == given[2] and found[2] is not given[2] and found[2]["weight"] is weight
    assert found[3:] == given[3:] and type(found[3]) is OrderedDict
    found[0].add_(1)
    found[1].append(x)
    assert not torch.equal(found[0], x) and len(given[1]) == 1


def test_what_graphs_are_compiled_for_stays():
    """Strides, what a gradient is asked of, and the marks of dynamic sizes."""
    wide = torch.randn(4, 6, 2)
    given = [
        wide[:, 1:],
        wide.transpose(0, 2),
        wide[:1].expand(3, -1, -1),
        wide[:, ::2],
        wide[:0, 1:],
        torch.tensor(1.0),
    ]
    given += [wide.to_sparse(), wide.clone().requires_grad_(), wide.clone().requires_grad_()[1:]]
    torch._dynamo.mark_dynamic(given[0], 0)
    for x, found in zip(given, copied(given), strict=True):
        assert found.layout is x.layout and found.requires_grad == x.requires_grad
        assert torch.equal(found.to_dense(), x.to_dense())
        if x.layout is torch.strided:
            assert x.numel() == 0 or found.stride() == x.stride()
            assert found.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() or not x.numel()
        assert vars(found).keys() == vars(x).keys()
