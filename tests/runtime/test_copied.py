"""`copied`: what a model is given, for a pass of ours."""

import threading
from collections import OrderedDict, UserDict, deque
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from lotion_fx.copied import Given, copied


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


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Asking:
    """Without its state it can answer nothing, not even whether it has an attribute."""

    def __init__(self, x):
        self.values = {"x": x}

    def __getattr__(self, name):
        return self.values[name]


HOLDERS = {
    "mapping": lambda x: UserDict(x=x),
    "dataclass": Frozen,
    "slots": Slots,
    "namespace": lambda x: SimpleNamespace(x=x),
    "asking": Asking,
    "nested": lambda x: SimpleNamespace(x=x, all=[{"x": UserDict(x=x)}], again=(x,)),
}


def x_of(held):
    return held["x"] if isinstance(held, UserDict) else held.x


@pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS)
def test_objects_are_of_their_own_with_what_they_hold(make):
    x = torch.arange(3.0)
    given = make(x)
    found = copied([given, x, {"again": given}])
    assert type(found[0]) is type(given) and found[0] is not given and found[2]["again"] is found[0]
    assert x_of(found[0]) is found[1] is not x and torch.equal(found[1], x) and x_of(given) is x


def test_what_is_inside_of_objects_is_taken_apart_too():
    x, y = torch.ones(1), torch.zeros(1)
    given = {"held": SimpleNamespace(all=[UserDict(x=x), x], n=2), "y": y}
    taken = Given(given)
    assert list(map(id, taken.tensors)) == list(map(id, (y, x, x)))
    filled = taken.filled(["a", "b", "c"])
    assert filled["y"] == "a" and filled["held"].all == [{"x": "b"}, "c"] and filled["held"].n == 2
    assert given["held"].all[1] is x


def test_what_torch_packs_and_queues():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    found, queue = copied((packed, deque([packed.data])))
    assert found.data is queue[0] is not packed.data and torch.equal(found.batch_sizes, packed.batch_sizes)


class Unpicklable:
    def __init__(self, x):
        self.x = x

    def __reduce_ex__(self, protocol):
        raise RuntimeError


class MadeOnce:
    def __init__(self, x):
        self.x = x

    def __reduce__(self):
        return self.fail, ()

    @staticmethod
    def fail():
        raise RuntimeError


def test_what_cannot_be_copied_or_is_known_by_itself_stays():
    x, weight = torch.ones(2), nn.Parameter(torch.ones(2))
    stay = [weight, nn.Linear(2, 2), lambda: x, threading.Lock(), object(), (i for i in "ab"), Unpicklable(x)]
    held = SimpleNamespace(stay=stay, x=x)
    once = MadeOnce(x)
    found, same, *rest = copied([held, once, *stay])
    assert same is once and found is not held and found.x is not x
    assert all(a is b is c for a, b, c in zip(stay, found.stay, rest, strict=True))
