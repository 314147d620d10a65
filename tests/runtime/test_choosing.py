"""`only` gives each parameter the format of the last key that matches it; presets are such mappings."""

import pytest
import torch
from torch import nn

import lotion_fx
from tests.models import LM, MLP, ids, lm_loss


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Code of torch's own is compiled here, for which all models share one limit of recompiles."""
    torch._dynamo.reset()


def formats(model, fmt="int4", **options):
    """Each parameter's format, from before any graph is known."""
    lotion_fx.transform(model, fmt, inner="aot_eager", **options)
    return {row.name: row.format for row in lotion_fx.report(model).rows}


def is_wide(name, parameter):
    return parameter.dim() > 1 and parameter.shape[1] == 40


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (
            {nn.Linear: "int8"},
            {"mlp.0.weight": "int8", "head.weight": "int8", "mlp.0.bias": None, "token.weight": None},
        ),
        ({nn.Sequential: None}, {"mlp.0.weight": None, "mlp.2.weight": None, "head.weight": "int4"}),
        ({nn.Embedding: "int8"}, {"token.weight": "int8", "head.weight": "int4"}),
        ({is_wide: "int8"}, {"mlp.2.weight": "int8", "mlp.0.weight": "int4"}),
        ({is_wide: "int8", "mlp.*": None}, {"mlp.2.weight": None}),
        ({"mlp.*": None, is_wide: "int8"}, {"mlp.2.weight": "int8", "mlp.0.weight": None}),
        ({nn.Linear: "int8", "*.0.*": "nvfp4"}, {"mlp.0.weight": "nvfp4", "mlp.2.weight": "int8"}),
        ({"*.0.*": "nvfp4", nn.Linear: "int8"}, {"mlp.0.weight": "int8", "mlp.2.weight": "int8"}),
        ({"*": None, "mlp.*.weight": ...}, {"mlp.0.weight": "int4", "head.weight": None}),
        ({"*": "int8"}, {"head.weight": "int8", "token.weight": None, "norm.weight": None, "mlp.0.bias": None}),
        ({nn.Module: "int8", "*": None, "head.weight": "int2"}, {"head.weight": "int2", "mlp.0.weight": None}),
    ],
)
def test_the_last_match_wins(only, expected):
    found = formats(LM(), only=only)
    assert {name: found[name] for name in expected} == expected


def test_a_predicate_is_asked_of_each_name_and_its_parameter():
    model, asked = LM(tied=True), {}

    def predicate(name, parameter):
        asked[name] = parameter
        return False

    with pytest.raises(ValueError, match="predicate is True for no parameter"):
        lotion_fx.transform(model, only={predicate: "int8"})
    assert asked == dict(model.named_parameters(remove_duplicate=False))


def test_formats_by_layer_are_those_that_eval_computes_with():
    model = LM()
    plain = LM()
    plain.load_state_dict(model.state_dict())
    lotion_fx.transform(model, "int4", only={"head.weight": "int8", "mlp.0.weight": None}, inner="aot_eager")
    with torch.no_grad():
        lm_loss(model, ids())
        for name, fmt in (("head", "int8"), ("mlp.2", "int4")):
            weight = plain.get_submodule(name).weight
            weight.copy_(lotion_fx.rounding.rtn(weight, lotion_fx.resolve(fmt), 1))
        assert torch.equal(model.eval()(ids()), plain.eval()(ids()))


BAD = [
    ("int4", TypeError, r"only='int4': expected a mapping.*is fmt"),
    (["int4"], TypeError, "expected a mapping"),
    ([], TypeError, "expected a mapping"),
    ({"mlp": None}, ValueError, r"'mlp' names a module.*did you mean 'mlp.\*'"),
    ({"mlp.0": None}, ValueError, r"did you mean 'mlp.0.\*'"),
    ({"ml?": None}, ValueError, r"did you mean 'ml\?.\*'"),
    ({"haed.weight": None}, ValueError, "matches no parameter.*'head.weight'"),
    ({"head.weight": 4}, TypeError, r"'head.weight' has 4; expected a format, None, or \.\.\."),
    ({"head.weight": "int44"}, ValueError, "only: 'head.weight': fmt='int44'"),
    ({nn.Linear(2, 2): None}, TypeError, "key Linear.* of type Linear; expected a glob"),
    ({3: None}, TypeError, "key 3 is of type int"),
    ({int: None}, TypeError, "is the class int"),
    ({nn.Conv2d: None}, ValueError, "no module is a Conv2d with parameters"),
    ({(lambda name: True): None}, TypeError, r"<lambda> is to be called with \(name, parameter\)"),
    ({(lambda name, parameter: 1): None}, TypeError, r"is 1; expected True or False"),
    ({"*": None}, ValueError, "no parameter is left"),
]


@pytest.mark.parametrize(("only", "error", "message"), BAD, ids=[str(bad[2]) for bad in BAD])
def test_bad_keys_and_values_are_named(only, error, message):
    with pytest.raises(error, match=message):
        lotion_fx.transform(LM(), only=only)


# ------------------------------------------------------------------------------------------------------------- presets


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.router = Router()
        self.experts = nn.Parameter(torch.randn(4, 16, 16))
        self.glu = nn.ModuleDict({"gate": nn.Linear(16, 64), "gate_proj": nn.Linear(16, 64)})


class Language(LM):
    def __init__(self, tied=False):
        super().__init__(tied)
        self.blocks = nn.ModuleList([Mixture()])
        self.conv = nn.Conv1d(16, 16, 1)


def test_the_preset_of_language_models():
    found = formats(Language(), only=lotion_fx.preset("lm"))
    out = {"head.weight", "token.weight", "blocks.0.gate.weight", "blocks.0.router.weight"}
    two = {name for name, p in Language().named_parameters() if p.dim() > 1}
    assert {name for name in two if found[name] is None} == out
    found = formats(Language(tied=True), only=lotion_fx.preset("lm"))
    assert found["token.weight"] is None


def test_the_preset_of_linear_layers():
    found = formats(Language(), only=lotion_fx.preset("linear"))
    taken = {name for name, fmt in found.items() if fmt}
    model = Language()
    assert taken == {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    model = lotion_fx.transform(LM(tied=True), "int4", only=lotion_fx.preset("linear"), inner="aot_eager")
    model(ids())
    assert "tied" in lotion_fx.report(model)["token.weight"].reason


def test_the_preset_of_everything():
    model = lotion_fx.transform(LM(tied=True), "int4", only=lotion_fx.preset("all"), inner="aot_eager")
    lm_loss(model, ids()).backward()
    found = {row.name: row.format for row in lotion_fx.report(model).rows}
    assert {name for name, fmt in found.items() if fmt} == {"token.weight", "mlp.0.weight", "mlp.2.weight"}


def test_entries_after_a_preset_win():
    found = formats(LM(), only={**lotion_fx.preset("lm"), "mlp.0.*": None, "head.weight": "int8"})
    assert (found["mlp.0.weight"], found["mlp.2.weight"], found["head.weight"]) == (None, "int4", "int8")
    model = lotion_fx.transform(MLP(), only=lotion_fx.preset("lm"), inner="aot_eager")  # its keys may match nothing
    assert lotion_fx.report(model)["up.weight"].format == "nvfp4"


def test_what_a_preset_leaves_out_has_its_reason():
    model = lotion_fx.transform(LM(), only=lotion_fx.preset("lm"), inner="aot_eager")
    assert lotion_fx.report(model)["head.weight"].reason == "excluded by only={output head: None}"
    with pytest.raises(ValueError, match="preset='llm': expected one of lm, linear, all; did you mean 'lm'"):
        lotion_fx.preset("llm")


# -------------------------------------------------------------------------------------------------------- TorchScript


@pytest.mark.filterwarnings("ignore:no compiled graph contains 2.weight")  # Dynamo of torch 2.11 gives up there
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of BatchNorm's own code
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("make", [lambda module: torch.jit.trace(module, torch.randn(4, 20)), torch.jit.script])
def test_a_script_module_inside_is_left_out_with_its_reason(make):
    torch.manual_seed(0)
    inner, last = nn.Sequential(nn.Linear(20, 24), nn.BatchNorm1d(24)), nn.Linear(24, 7)
    model = nn.Sequential(make(inner), nn.GELU(), last)
    lotion_fx.transform(model, "int4", inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(8, 20)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    report = lotion_fx.report(model)
    assert {row.name for row in report.rows} == {name for name, _ in model.named_parameters()}
    for name in ("0.0.weight", "0.0.bias", "0.1.weight"):
        assert report[name].reason == "inside a ScriptModule, which no tracer of Python sees"
    assert report["2.weight"].estimator in ("analytic", "fisher")
    with torch.no_grad():
        hidden = nn.functional.gelu(model.eval()[0](x))
        rounded = lotion_fx.rounding.rtn(last.weight, lotion_fx.resolve("int4"), 1)
        torch.testing.assert_close(model(x), nn.functional.linear(hidden, rounded, last.bias))
    assert lotion_fx.state_dict(model)["weights"].keys() == dict(model.named_parameters()).keys()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_script_modules_that_cannot_be_left_out():
    scripted = torch.jit.script(nn.Linear(20, 7))
    with pytest.raises(TypeError, match=r"model: a RecursiveScriptModule is TorchScript.*transform the nn.Module"):
        lotion_fx.transform(scripted)
    with pytest.raises(ValueError, match="'0.weight' asks for .*int8.* of '0.weight', which is inside a ScriptModule"):
        lotion_fx.transform(nn.Sequential(scripted, nn.Linear(7, 7)), only={"0.weight": "int8"})
    with pytest.raises(ValueError, match="no parameter is left"):
        lotion_fx.transform(nn.Sequential(scripted))


# ----------------------------------------------------------------------------------------------- what cannot be rounded


class Odd(nn.Module):
    """A table that its own forward writes into, or whose gradient is sparse, and a parameter of no elements."""

    def __init__(self, **options):
        super().__init__()
        self.table, self.nothing = nn.Embedding(20, 16, **options), nn.Parameter(torch.randn(0, 16))
        self.head = nn.Linear(16, 20)

    def forward(self, i):
        h = self.table(i)
        return self.head(h) + (h @ self.nothing.t()).sum(1, keepdim=True)


ODD = {"max_norm": ({"max_norm": 1.0}, "with max_norm, whose forward writes"), "sparse": ({"sparse": True}, "sparse")}


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("options, why", ODD.values(), ids=ODD)
def test_what_cannot_be_rounded_is_left_out_with_its_reason(options, why, trains):
    model = lotion_fx.transform(Odd(**options), "int4", inner="aot_eager", only=lotion_fx.preset("all")).train(trains)
    out = model(torch.arange(4))
    if trains:
        out.square().mean().backward()
    report = lotion_fx.report(model)
    assert why in report["table.weight"].reason and report["nothing"].reason == "empty"
    assert report["table.weight"].format is None and report["head.weight"].format == "int4"


@pytest.mark.parametrize("options, why", ODD.values(), ids=ODD)
def test_asked_for_by_name_it_is_refused(options, why):
    with pytest.raises(ValueError, match=f"'table.weight' asks for .*int4.* of 'table.weight', which is of .*{why}"):
        lotion_fx.transform(Odd(**options), "int4", only={"table.weight": "int4"})


def test_a_format_that_cannot_be_deployed_says_so_at_once():
    with pytest.warns(UserWarning, match="fmt='int4/5': it trains, but .*two codes of a byte.*use an even block"):
        lotion_fx.transform(MLP(), "int4/5", inner="aot_eager")
