"""However a model comes to a weight, and whoever holds it, the first forward is at the rounded weights as all others
are, or says which weight is not. The oracle is the plain model, rounded by hand."""

import copy
import functools
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from lotion_fx import compiling
from lotion_fx.numerics import rounding
from lotion_fx.state import registry

X = torch.randn(6, 32)


@pytest.fixture(autouse=True)
def compiled_anew():
    torch.compiler.reset()


@torch.compiler.disable
def product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x @ weight.T)


@torch.compiler.disable
def product_of(x: Tensor, model: nn.Module) -> Tensor:
    return torch.tanh(x @ model.w.T)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(32, 32), nn.Linear(32, 8)
        self.w = nn.Parameter(torch.randn(32, 32) / 5)
        self.hold()

    def hold(self) -> None:
        """Takes hold of weights in other ways."""

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.linear(F.gelu(self.a(x)), self.read(x)))


class Disabled(Base):
    @torch.compiler.disable
    def forward(self, x):
        return self.o(F.linear(F.gelu(self.a(x)), self.w))


class Argument(Base):
    def forward(self, x):
        return self.o(product(F.gelu(self.a(x)), self.w))


class Owner(Base):
    def forward(self, x):
        return self.o(product_of(F.gelu(self.a(x)), self))


class First(Base):  # Python reads it before any graph does
    def forward(self, x):
        return self.o(self.a(product(x, self.w)))


class Sparse(Base):
    def forward(self, x):
        return self.o(torch.sparse.mm(torch.eye(6).to_sparse(), x @ self.w.T))


class AfterRecurrent(Base):
    def hold(self):
        self.r = nn.GRU(32, 32)

    def forward(self, x):
        return self.o(F.linear(self.r(x[None])[0][0], self.w))


class Threaded(Base):
    def forward(self, x):
        with ThreadPoolExecutor(1) as pool:
            return self.o(pool.submit(lambda: F.linear(F.gelu(x), self.w)).result())


class GraphThenPython(Base):  # one graph in all, and Python after it
    def forward(self, x):
        return product(F.linear(x, self.w), self.w)


class Hooked(Argument):
    def hold(self):
        self.register_forward_hook(lambda module, args, output: output + 0)


class Listed(Base):
    def hold(self):
        self.kept = [self.a.weight]

    def read(self, x):
        return self.kept[0]


class InTuple(Listed):
    def hold(self):
        self.kept = (self.a.weight,)


class InDict(Base):
    def hold(self):
        self.kept = {"of": self.w}

    def read(self, x):
        return self.kept["of"]


class InClosure(Base):
    def hold(self):
        w = self.w
        self.call = lambda x: F.linear(x, w)

    def forward(self, x):
        return self.o(self.call(F.gelu(self.a(x))))


class InPartial(InClosure):
    def hold(self):
        self.call = functools.partial(F.linear, weight=self.w)


PYTHON = [Disabled, Argument, Owner, First, Sparse, AfterRecurrent, Threaded, GraphThenPython, Hooked]
HELD = [Listed, InTuple, InDict, InClosure, InPartial]


def by_hand(model: nn.Module) -> nn.Module:
    """A plain model, its matrices rounded."""
    plain = type(model)()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() > 1:
                parameter.copy_(rounding.rtn(parameter, lotion_fx.resolve("int4"), 1))
    return plain


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("make", [*PYTHON, *HELD])
def test_eval_is_rounded_from_the_first_call_on(make, trained, with_grad):
    model = make()
    rounded = by_hand(model)
    lotion_fx.transform(model, "int4", inner="aot_eager")
    if trained:
        model(X).square().mean().backward()
    model.eval()
    with torch.set_grad_enabled(with_grad):
        for _ in range(3):
            torch.testing.assert_close(model(X), rounded(X))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [*PYTHON, *HELD])
def test_eval_differentiates_by_every_weight(make, inner):
    model = make()
    rounded = by_hand(model)
    lotion_fx.transform(model, "int4", inner=inner).eval()
    model(X).square().mean().backward()
    rounded(X).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, rounded.get_parameter(name).grad, msg=name)


@pytest.mark.parametrize("after_eval", [True, False])
@pytest.mark.parametrize("method", ["ste", "ste_scale"])
@pytest.mark.parametrize("make", [*PYTHON, *HELD])
def test_a_rounded_training_is_so_from_its_first_step_on(make, method, after_eval):
    model = make()
    rounded = by_hand(model)
    lotion_fx.transform(model, "int4", inner="aot_eager", method=method)
    if after_eval:
        model.eval()(X)
        model.train()
    for _ in range(3):
        model.zero_grad(), rounded.zero_grad()
        found, expected = model(X), rounded(X)
        torch.testing.assert_close(found, expected)
        found.square().mean().backward()
        expected.square().mean().backward()
        for name, parameter in model.named_parameters() if method == "ste" else ():
            torch.testing.assert_close(parameter.grad, rounded.get_parameter(name).grad, msg=name)


@pytest.mark.parametrize("method", ["ste", "lotion"])
def test_a_whole_graph_is_compiled_once_in_training(method):
    """What stands in for weights until a graph takes them costs no graph."""
    model = lotion_fx.transform(
        nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4)), "int4", inner="eager", method=method
    )
    before = compiling.compiles["eager"]
    for _ in range(3):
        model(X).sum().backward()
    assert compiling.compiles["eager"] == before + 1


def test_nothing_stands_in_where_graphs_round_all():
    seen = []

    class Looks(Base):
        def forward(self, x):
            seen.append(self.w)
            return self.o(F.linear(F.gelu(self.a(x)), self.w))

    model = lotion_fx.transform(Looks(), "int4", inner="eager", method="ste")
    for _ in range(3):
        model(X)
    assert seen[-1] is model.w and registry[model.w].standing is None


def test_a_graph_s_random_numbers_are_those_that_come_next():
    """What stands in until a graph takes the weight draws apart from them."""

    class Sole(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 32))

        def forward(self, x):
            return F.linear(x, self.w)

    model = lotion_fx.transform(Sole(), "int4", inner="aot_eager", method="rr")
    x = torch.randn(8, 32)
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)


class ReadBothWays(Base):
    """Python reads rows of a weight that a graph sums over columns afterwards."""

    def forward(self, x):
        return self.o(product(x, self.w) @ self.w)


def test_blocks_that_a_graph_corrects_are_told_of(caplog):
    model = lotion_fx.transform(ReadBothWays(), "int4", inner="aot_eager").eval()
    with caplog.at_level("INFO", "lotion_fx"):
        model(X)
    assert "'w' is rounded in blocks along dimension 0, as a graph has told only now" in caplog.text
    rounded = copy.deepcopy(model)
    expected = type(model)()
    expected.load_state_dict(rounded.state_dict())
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if parameter.dim() > 1:
                axis = 0 if name == "w" else 1
                parameter.copy_(rounding.rtn(parameter, lotion_fx.resolve("int4"), axis))
    assert torch.equal(model(X), expected(X))


class HeldInPython(Base):
    def hold(self):
        self.kept = {"all": [self.w]}

    def forward(self, x):
        return self.o(product(F.gelu(self.a(x)), self.kept["all"][0]))


class HoldsView(Base):
    def hold(self):
        self.kept = self.w.detach()

    def forward(self, x):
        return self.o(F.linear(self.a(x), self.kept) + x @ self.w.T)


class BuffersView(HoldsView):
    def hold(self):
        self.register_buffer("kept", self.w.detach())


NOT_ROUNDED = {
    HeldInPython: "'w' is held by kept too: where Python",
    HoldsView: "'w': kept is a view of its values that was made once",
    BuffersView: "'w': kept is a view of its values that was made once",
}


@pytest.mark.parametrize("make", NOT_ROUNDED)
@pytest.mark.parametrize("how", ["eval", "ste"])
def test_what_cannot_be_rounded_is_named_once(how, make):
    model = lotion_fx.transform(make(), "int4", inner="aot_eager", method="ste").train(how == "ste")
    with pytest.warns(UserWarning, match=NOT_ROUNDED[make]) as said:
        model(X), model(X)
    assert len([each for each in said if "w" in str(each.message) and "kept" in str(each.message)]) == 1


def test_an_export_names_what_it_takes_from_elsewhere():
    model = lotion_fx.transform(InDict(), "int4", inner="aot_eager").eval()
    model(X)
    with pytest.warns(UserWarning, match="'w' is held by kept too"):
        torch.export.export(model, (X,))


@pytest.mark.parametrize("make", [Listed, InDict, Argument])
def test_all_is_in_its_place_afterwards(make):
    model = make()
    before, versions = dict(model.named_parameters()), {n: p._version for n, p in model.named_parameters()}
    lotion_fx.transform(model, "int4", inner="aot_eager", method="ste")
    model(X).sum().backward()
    model.eval()(X)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert {name: parameter._version for name, parameter in model.named_parameters()} == versions
    torch.testing.assert_close(copy.deepcopy(model)(X), model(X))


class Coder(nn.Module):
    """Its methods read a parameter of its own, and call a module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.inner = nn.Parameter(torch.randn(32, 16)), nn.Linear(16, 8)

    def encode(self, x):
        return self.inner(x @ self.e)

    def forward(self, x):
        return self.encode(x)


@pytest.mark.parametrize("call", [Coder.encode, Coder.forward])
@pytest.mark.parametrize("method, trains", [("lotion", False), ("ste", True)])
def test_a_method_called_past_its_module_is_told_of(call, method, trains):
    model = lotion_fx.transform(Coder(), "int4", method=method, inner="aot_eager").train(trains)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a method of")
        model(X)  # and what forward calls is no such method
    with pytest.warns(UserWarning, match=r"a method of Coder runs .* there 'e' is not rounded"):
        call(model, X)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a method of")
        call(model, X)  # once


def test_a_part_that_is_called_itself_is_none():
    model = lotion_fx.transform(nn.Sequential(Coder(), nn.Linear(8, 4)), "int4", inner="aot_eager").eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a method of")
        model[0](X)
        model[1](torch.randn(3, 8))


class Uncounted(tuple):
    """Has no length, as e3nn's Irreps."""

    def __len__(self):
        raise NotImplementedError


def test_a_container_without_a_length_is_looked_into():
    model = nn.Linear(8, 8)
    model.irreps = Uncounted((1, 2))
    lotion_fx.transform(model, "int4", inner="aot_eager").eval()
    x = torch.randn(2, 8)
    assert torch.allclose(model(x), F.linear(x, lotion_fx.quantized(model)["weight"].dequantize(), model.bias))
