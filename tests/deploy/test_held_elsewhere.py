"""A weight that a list, a dictionary, an object or a function holds too is deployed as it runs, or a warning says not.

Broken once and seen red: a copy's list left with the placeholder, an export assigned instead of copied into place.
"""

import dataclasses
import functools
import warnings

import pytest
import torch
from torch import nn

import lotion_fx


@dataclasses.dataclass
class Box:
    w: nn.Parameter


WAYS = {
    "list": (lambda w: [w], lambda held, x: x @ held[0]),
    "dictionary": (lambda w: {"of": (w,)}, lambda held, x: x @ held["of"][0]),
    "object": (Box, lambda held, x: x @ held.w),
    "partial": (lambda w: functools.partial(torch.mm, mat2=w), lambda held, x: held(x)),
    "function": (lambda w: lambda x: x @ w, lambda held, x: held(x)),
}
COPIED = [way for way in WAYS if way != "function"]


class Net(nn.Module):
    def __init__(self, way, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.way, self.w, self.head = way, nn.Parameter(torch.randn(24, 16)), nn.Linear(16, 8)
        self.held = WAYS[way][0](self.w)

    def forward(self, x):
        return self.head(WAYS[self.way][1](self.held, x).relu())


def x():
    return torch.randn(40, 24, generator=torch.Generator().manual_seed(1))


def evaluated(way):
    model = lotion_fx.transform(Net(way), "int4/8", inner="aot_eager").eval()
    with torch.no_grad():
        out = model(x())
        assert not torch.allclose(out, Net(way)(x()))  # it is rounded
    return model, out


@torch.no_grad()
@pytest.mark.parametrize("way", COPIED)
def test_a_packed_copy_computes_as_the_model_does(way):
    model, wanted = evaluated(way)
    with pytest.warns(UserWarning, match="something besides its module holds 'w' too, and has it dense"):
        packed = lotion_fx.quantize(model)
    torch.testing.assert_close(packed(x()), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed.w.sum()  # a property still


@torch.no_grad()
def test_a_function_that_a_copy_shares_is_told_of():
    model, _ = evaluated("function")
    with pytest.warns(UserWarning, match="the function 'held' of the model holds a weight"):
        lotion_fx.quantize(model)


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("way", list(WAYS))
def test_a_loaded_model_computes_as_the_model_does(way, packed, tmp_path):
    model, wanted = evaluated(way)
    lotion_fx.export(model, tmp_path / "out")
    loaded = lotion_fx.load(tmp_path / "out", Net(way, seed=5), packed=packed)
    torch.testing.assert_close(loaded(x()), wanted)


@torch.no_grad()
def test_an_export_in_another_dtype_reaches_what_a_list_holds(tmp_path):
    model = lotion_fx.transform(Net("list").bfloat16(), "int4/8", inner="aot_eager").eval()
    wanted = model(x().bfloat16())
    lotion_fx.export(model, tmp_path / "out")
    loaded = lotion_fx.load(tmp_path / "out", Net("list", seed=5), packed=False)  # float32 so far
    torch.testing.assert_close(loaded(x().bfloat16()), wanted)


class Wrapped(nn.Module):
    """A part is compiled by its user."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.part = torch.compile(nn.Sequential(nn.Linear(24, 16), nn.ReLU()), backend="eager")
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        return self.head(self.part(x))


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
def test_a_compiled_part_is_verified_and_loaded_into(packed, tmp_path):
    model = lotion_fx.transform(Wrapped(), "int4/8", inner="aot_eager").eval()
    wanted = model(x())
    lotion_fx.export(model, tmp_path / "out")
    assert lotion_fx.verify(tmp_path / "out", model, x()).is_exact
    torch.testing.assert_close(lotion_fx.load(tmp_path / "out", Wrapped(seed=5), packed=packed)(x()), wanted)
