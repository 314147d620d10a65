"""What is put into a model after `transform` is the model's too, under the same formats."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lotion_fx
from lotion_fx.compiling import compiles
from lotion_fx.numerics import rounding
from lotion_fx.state import registry, smoothings_of

X = torch.randn(6, 32)


@pytest.fixture(autouse=True)
def compiled_anew():
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 48), nn.GELU())
        self.head = nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def rounded(model: nn.Module, make=Net, skip=()) -> nn.Module:
    plain = make() if not isinstance(make, nn.Module) else make
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.dim() > 1 and name not in skip:
                parameter.copy_(rounding.rtn(parameter, lotion_fx.resolve("int4"), 1))
    return plain.eval()


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model(X), torch.arange(6) % 3).backward()
    optimizer.step()


def new_head(model: nn.Module, classes: int) -> nn.Module:
    model.head = nn.Linear(48, classes)
    return Net(classes)


def same_head(model: nn.Module) -> nn.Module:
    model.head = nn.Linear(48, 10)
    return Net()


def new_block(model: nn.Module) -> nn.Module:
    model.body.append(nn.Linear(48, 48))
    plain = Net()
    plain.body.append(nn.Linear(48, 48))
    return plain


def new_parameter(model: nn.Module) -> nn.Module:
    model.head.weight = nn.Parameter(torch.randn(7, 48))
    model.head.bias = nn.Parameter(torch.randn(7))
    return Net(7)


CHANGES = {
    "a head of more classes": lambda m: new_head(m, 12),
    "a head of the same shape": same_head,
    "a block": new_block,
    "a parameter of another shape": new_parameter,
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("what", CHANGES)
def test_what_comes_later_is_taken_in(what, trained, inner):
    model = lotion_fx.transform(Net(), "int4", inner=inner)
    if trained:
        step(model)
        model.eval()(X)
        model.train()
    plain = CHANGES[what](model)
    names = {row.name for row in lotion_fx.report(model).rows if row.format}  # a question takes in as well
    assert names == {name for name, parameter in plain.named_parameters() if parameter.dim() > 1}
    assert torch.equal(model.eval()(X), rounded(model, plain)(X))
    model.train()
    step(model)
    if inner != "eager":
        assert {row.estimator for row in lotion_fx.report(model).rows if row.format} == {"analytic"}
    assert torch.equal(model.eval()(X), rounded(model, plain)(X))
    assert len(smoothings_of(model)[0].weights) == len(list(model.parameters()))
    model.compile(backend="eager")
    with pytest.warns(UserWarning, match="leave compile"):
        model(X)


def test_a_change_without_a_question_in_between():
    model = lotion_fx.transform(Net(), "int4", inner="aot_eager")
    step(model)
    plain = same_head(model)  # no guard of the graph tells
    assert torch.equal(model.eval()(X), rounded(model, plain)(X))
    assert registry[model.head.weight] is not None


def test_what_was_left_out_stays_out():
    model = lotion_fx.transform(Net(), "int4", only={"head.*": None}, inner="aot_eager")
    model(X)
    plain = new_head(model, 12)
    assert torch.equal(model.eval()(X), rounded(model, plain, skip=("head.weight",))(X))
    assert lotion_fx.report(model)["head.weight"].reason == "excluded by only={'head.*': None}"


def test_a_key_may_lose_what_it_matched():
    model = lotion_fx.transform(Net(), "int4", only={"head.weight": "int8"}, inner="aot_eager")
    model.head = nn.Identity()
    model.eval()(X)
    assert [row.name for row in lotion_fx.report(model).rows] == ["body.0.weight", "body.0.bias"]


def test_a_weight_tied_later_is_one_weight():
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    lotion_fx.transform(model, "int4", inner="aot_eager")
    model["b"].weight = model["a"].weight
    lotion_fx.report(model)
    assert registry.owned[model["b"]]["weight"] is registry.owned[model["a"]]["weight"]
    tied = model.eval()["b"](X)
    by_hand = rounding.rtn(model["a"].weight.detach(), lotion_fx.resolve("int4"), 1)
    assert torch.equal(tied, F.linear(X, by_hand, model["b"].bias))


class Tied(nn.Module):
    """Its head comes first, and takes part in a lookup for as long as it is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.table = nn.Linear(32, 20, bias=False), nn.Embedding(20, 32)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.table.weight, self.b.weight = self.head.weight, self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.gelu(self.a(x + self.table(torch.arange(len(x)))))))


@pytest.mark.parametrize("names", [["b", "table"], ["a", "head"], ["a", "b", "head", "table"]])
def test_what_was_tied_comes_apart(names):
    model = lotion_fx.transform(Tied(), "int4", inner="aot_eager")
    step(model)
    assert lotion_fx.quantized(model).keys() == {"a.weight"}
    for name in names:
        module = model.get_submodule(name)
        module.weight = nn.Parameter(module.weight.detach().clone())
    step(model)
    report = lotion_fx.report(model)
    assert {row.name for row in report.rows} == {name for name, _ in model.named_parameters()}
    assert lotion_fx.quantized(model).keys() == {"a.weight", "b.weight", "head.weight"}
    assert {report[name].estimator for name in ("a.weight", "b.weight", "head.weight")} == {"analytic"}
    plain = Tied()
    plain.b.weight, plain.table.weight = nn.Parameter(torch.ones(32, 32)), nn.Parameter(torch.ones(20, 32))
    assert torch.equal(model.eval()(X), rounded(model, plain, skip=("table.weight",))(X))


def test_one_tied_module_takes_another_s_place():
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    model["b"].weight = model["a"].weight
    lotion_fx.transform(model, "int4", inner="aot_eager")
    model["b"] = nn.Linear(32, 32)
    model["b"].weight = model["a"].weight
    gc.collect()
    assert lotion_fx.quantized(model).keys() == {"a.weight"}
    assert registry.owned[model["b"]]["weight"] is registry.owned[model["a"]]["weight"]


PUT_ON = {  # for a while: how it is put on a module's weight, and taken off
    "spectral norm": (parametrizations.spectral_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "weight norm": (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.5), lambda m: prune.remove(m, "weight")),
    "old weight norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old spectral norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("what", PUT_ON)
def test_a_parametrization_is_put_on_and_taken_off(what):
    put_on, take_off = PUT_ON[what]
    model = lotion_fx.transform(Net(), "int4", inner="aot_eager")
    step(model)
    for _ in range(2):
        put_on(model.head)
        step(model)
        # torch copies no model with one of the others.
        for each in [model, copy.deepcopy(model)] if parametrize.is_parametrized(model.head) else [model]:
            assert {row.name for row in lotion_fx.report(each).rows} == {name for name, _ in each.named_parameters()}
        held = [model.head, *model.head.modules()]  # by whoever looks at them
        take_off(model.head)
        copies = [copy.deepcopy(model)]
        step(model)
        copies.append(copy.deepcopy(model))
        expected = rounded(model)(X)
        assert torch.equal(model.eval()(X), expected) and torch.equal(copy.deepcopy(model)(X), expected)
        report = lotion_fx.report(model)
        assert {row.name for row in report.rows} == {name for name, _ in model.named_parameters()}
        assert report["head.weight"].estimator == "analytic" and not report["head.weight"].reason, held
        assert lotion_fx.quantized(model).keys() == {"body.0.weight", "head.weight"}
        for each in copies:
            assert torch.equal(each.eval()(X), rounded(each)(X))
        model.train()


def test_a_module_that_is_taken_out_and_put_back_is_the_model_s_again():
    model = lotion_fx.transform(Net(), "int4", inner="aot_eager")
    step(model)
    head, model.head = model.head, nn.Identity()
    model.eval()(X)
    known = registry[head.weight]
    assert known not in smoothings_of(model)[0].weights
    model.head = head
    model.train()
    step(model)
    assert known in smoothings_of(model)[0].weights
    assert torch.equal(copy.deepcopy(model).eval()(X), rounded(model)(X))


def test_other_models_are_no_members():
    model = lotion_fx.transform(Net(), "int4", inner="aot_eager")
    before = copy.copy(smoothings_of(model)[0].weights)
    Net()
    model(X)
    assert smoothings_of(model)[0].weights == before


class _MakesModules(nn.Module):
    """Makes modules in its forward, as some losses and caches do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return nn.Sequential(nn.ReLU(), nn.Identity())(self.linear(x))


def test_modules_that_a_forward_makes_compile_nothing_anew():
    torch._dynamo.reset()
    model = lotion_fx.transform(_MakesModules(), "int4", inner="aot_eager")
    model(torch.randn(2, 8))
    before = compiles.copy()
    for _ in range(4):
        model(torch.randn(2, 8))
    assert compiles == before
