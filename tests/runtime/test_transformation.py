"""`transform` and its switches leave the model the user's own."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.compiling import compiles
from lotion_fx.examples.quickstart import GPT
from lotion_fx.numerics import rounding
from lotion_fx.state import registry
from tests.models import LM, MLP, VOCAB, ids, lm_loss


def train(model, steps=3, lr=1e-2, optimizer=None, start=0):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(start, start + steps):
        optimizer.zero_grad()
        lm_loss(model, ids(seed=step)).backward()
        optimizer.step()
    return optimizer


def latent(model):
    """A plain `LM` with this one's weights."""
    plain = LM().train(model.training)
    plain.load_state_dict(model.state_dict())
    return plain


def quantized(model, fmt):
    """A plain `LM` with this one's weights, every default-selected one rounded by hand."""
    plain = latent(model)
    with torch.no_grad():
        for name in ("mlp.0", "mlp.2", "head"):
            weight = plain.get_submodule(name).weight
            weight.copy_(rounding.rtn(weight, lotion_fx.resolve(fmt), 1))
    return plain


def test_the_model_stays_the_users_own():
    model = LM()
    keys, parameters, cls = list(model.state_dict()), list(model.parameters()), type(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert lotion_fx.transform(model, inner="aot_eager") is model
    assert type(model) is cls and list(model.state_dict()) == keys
    before = [p.detach().clone() for p in parameters]
    train(model, optimizer=optimizer)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert all(not torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    LM().load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("fmt", ["nvfp4", "int4/tensor", "mxfp4/even"])
def test_eval_runs_at_the_rounded_weights(inner, fmt):
    model = lotion_fx.transform(LM(), fmt, inner=inner, calibrate=False)
    train(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids()), quantized(model, fmt).eval()(ids()))
        with lotion_fx.full_precision(model):
            assert torch.equal(model(ids()), latent(model)(ids()))
        with lotion_fx.randomized(model):
            assert not torch.equal(model(ids()), model(ids()))
    model.train()
    assert torch.equal(model(ids()), latent(model)(ids()))  # LOTION trains at the latent weights


@pytest.mark.slow
def test_eval_under_inductor_runs_at_the_rounded_weights():
    model = lotion_fx.transform(LM(), "nvfp4")
    train(model)
    model.eval()
    plain = quantized(model, "nvfp4").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), plain(ids()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["ste", "ste_scale", "rr"])
def test_rounded_training_forwards(method):
    model = lotion_fx.transform(LM(), "int4", method=method, inner="aot_eager")
    out, rtn = model(ids()), quantized(model, "int4")(ids())
    assert torch.equal(out, rtn) == (method != "rr")
    assert torch.equal(out, model(ids())) == (method != "rr")


class Bare(nn.Module):
    """A model that holds its weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 20, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return F.linear(x, self.weight)


@pytest.mark.parametrize("method", ["ste", "lotion"])
def test_a_weight_of_the_outermost_module_itself(method):
    """Its hooks must be traced: in Python they find it outside of every graph, and round what the graph rounds."""
    model = lotion_fx.transform(Bare(), "nvfp4", method=method, inner="aot_eager")
    x = torch.randn(3, 20)
    rounded = F.linear(x, rounding.rtn(model.weight.detach(), lotion_fx.resolve("nvfp4")))
    assert torch.equal(model(x), rounded if method == "ste" else F.linear(x, model.weight))
    model.eval()
    assert torch.equal(model(x), rounded)


def test_ste_gradients_are_those_at_the_rounded_weights():
    model = lotion_fx.transform(LM(), "int4", method="ste", inner="aot_eager")
    plain = quantized(model, "int4")
    lm_loss(model, ids()).backward()
    lm_loss(plain, ids()).backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_ste_scale_adds_the_scale_s_part():
    model = lotion_fx.transform(LM(), "int4", method="ste_scale", inner="aot_eager")
    plain = quantized(model, "int4")
    lm_loss(model, ids()).backward()
    lm_loss(plain, ids()).backward()
    weight, at_rounded = model.head.weight, plain.head.weight.grad
    expected = rounding.rtn_vjp(weight.detach(), at_rounded, lotion_fx.resolve("int4"), 1)
    assert not torch.allclose(expected, at_rounded)
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize(
    ("inner", "exact"), [("eager", True), ("aot_eager", False), pytest.param("inductor", False, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("curvature", ["factored", "full", "fisher"])
def test_the_loss_gradients_are_unchanged(inner, exact, curvature):
    model = LM()
    plain = copy.deepcopy(model)
    lotion_fx.transform(model, inner=inner, curvature=curvature)
    lm_loss(model, ids()).backward()
    lm_loss(plain, ids()).backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if exact:
            assert torch.equal(mine.grad, theirs.grad), name
        error = (mine.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-6, (name, error)


def test_one_compile_for_each_mode_and_shape():
    torch._dynamo.reset()
    model = lotion_fx.transform(LM(), inner="aot_eager")
    before = compiles["aot_eager"]

    def fresh():
        nonlocal before
        made, before = compiles["aot_eager"] - before, compiles["aot_eager"]
        return made

    optimizer = train(model)
    assert fresh() == 1
    for _ in range(2):
        with torch.no_grad():
            model(ids())
            model.eval()(ids())
        model.train()
        train(model, optimizer=optimizer)
    assert fresh() == 1  # without a gradient training and evaluation run the same graph
    lotion_fx.finish(model)
    train(model, optimizer=optimizer)
    assert fresh() == 1


def test_no_graph_break_is_added():
    plain = torch._dynamo.explain(GPT())(ids())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(lotion_fx.transform(GPT(), inner="aot_eager"))
    assert plain.graph_break_count == 0 == torch._dynamo.utils.counters["graph_break"].total()
    assert plain.graph_count == 1 == torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_dynamic_shapes_compile_as_often_as_without_us():
    def count(model, made):
        for batch, length in ((8, 5), (6, 5), (5, 5), (4, 7), (3, 9), (9, 11)):
            lm_loss(model, ids(batch, length)).backward()
        return made()

    torch._dynamo.reset()
    graphs = []

    def plain_backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    plain = LM()
    plain.compile(backend=plain_backend)
    expected = count(plain, lambda: len(graphs))
    torch._dynamo.reset()
    before = compiles["aot_eager"]
    model = lotion_fx.transform(LM(), inner="aot_eager")
    assert count(model, lambda: compiles["aot_eager"] - before) == expected


def test_a_later_variant_of_a_dynamic_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager", dynamic=True)
    for batch in (8, 6):
        lm_loss(model, ids(batch)).backward()
    model.eval()  # nothing in LM guards on it, so the same Dynamo graph needs a second variant
    for batch in (8, 6, 4):
        torch.testing.assert_close(model(ids(batch)), quantized(model, "int4")(ids(batch)))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_dynamo_backend_alone():
    torch._dynamo.reset()
    model = LM()
    compiled = torch.compile(model, backend="lotion_fx", options={"fmt": "int4", "inner": "aot_eager"})
    train(compiled)
    report = lotion_fx.report(model)
    assert report["head.weight"].format == "int4" and report["head.weight"].estimator == "analytic"
    assert report["token.weight"].format is None
    model.eval()
    with torch.no_grad():
        assert torch.equal(compiled(ids()), quantized(model, "int4").eval()(ids()))


def test_the_dynamo_backend_with_two_models_of_a_class():
    torch._dynamo.reset()
    for _ in range(2):
        model = LM()
        train(torch.compile(model, backend="lotion_fx", options={"inner": "aot_eager"}))
        assert lotion_fx.report(model)["head.weight"].estimator == "analytic"


def test_weights_unused_at_first_are_neither_refused_nor_rounded_twice():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 3), nn.Linear(16, 5)

        def forward(self, x, head):
            return self.a(x) if head == "a" else self.b(x)

    x = torch.randn(4, 16)
    for method in ("ste", "lotion"):
        model = lotion_fx.transform(TwoHeads(), "int4", method=method, inner="aot_eager")
        model.eval()
        for head in ("a", "b"):
            plain = copy.deepcopy(model)
            weight = plain.get_submodule(head).weight
            with torch.no_grad():
                weight.copy_(rounding.rtn(weight, lotion_fx.resolve("int4"), 1))
                assert torch.equal(model(x, head), plain(x, head))
        model.train()
        model(x, "a").sum().backward()
        model(x, "b").sum().backward()


def test_a_graph_given_up_is_rounded_all_the_same():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    train(model)
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.equal(model(ids()), quantized(model, "int4").eval()(ids()))


def test_only_chooses_formats_by_name():
    only = {"mlp.*": "int8", "mlp.2.weight": None, "token.*": "int4", "norm.weight": None}
    model = lotion_fx.transform(LM(), "nvfp4", only=only, inner="aot_eager")
    train(model)
    formats = {row.name: row.format for row in lotion_fx.report(model).rows}
    assert formats["mlp.0.weight"] == "int8" and formats["mlp.2.weight"] is None
    assert formats["token.weight"] == "int4" and formats["head.weight"] == "nvfp4"
    assert formats["mlp.0.bias"] == "int8" and formats["norm.weight"] is None


def test_tied_head_stays_out_unless_named():
    model = lotion_fx.transform(LM(tied=True), inner="aot_eager")
    train(model)
    row = lotion_fx.report(model)["token.weight"]
    assert row.format is None and "tied" in row.reason
    model = lotion_fx.transform(LM(tied=True), only={"head.*": "int4"}, inner="aot_eager")
    train(model)
    row = lotion_fx.report(model)["token.weight"]
    assert row.format == "int4" and row.estimator == "analytic" and set(row.uses) == {"embedding", "mm"}


def test_regions_are_compiled_one_by_one():
    torch._dynamo.reset()
    model = nn.Sequential(*(MLP() for _ in range(3)))
    for block in model:
        block.down = nn.Linear(33, 20)
    before = compiles["aot_eager"]
    lotion_fx.transform(model, "int4", inner="aot_eager", regions=list(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 20)).square().mean().backward()
    optimizer.step()
    # Identical blocks share their code; the first one's input needs no gradient, which is one more case.
    assert compiles["aot_eager"] - before == 2
    rows = [row for row in lotion_fx.report(model).rows if row.name.endswith("weight")]
    assert len(rows) == 6 and all(row.estimator == "analytic" and row.block_axis == 1 for row in rows)
    states = [registry[block.up.weight].curvature.ema for block in model]
    assert not torch.allclose(states[0], states[1]), "each weight has its own probe"


BAD = [
    (dict(fmt="nvfp5"), ValueError, "fmt='nvfp5'.*nvfp4"),
    (dict(method="lotoin"), ValueError, "method='lotoin'.*did you mean 'lotion'"),
    (dict(curvature="hessian"), ValueError, "curvature='hessian'.*factored"),
    (dict(inner="tvm"), ValueError, "inner='tvm'.*inductor"),
    (dict(strength=-1.0), ValueError, "strength=-1.0"),
    (dict(decay=1.0), ValueError, "decay=1.0"),
    (dict(finish=0.4), ValueError, "pass steps="),
    (dict(finish=1.5, steps=10), ValueError, "finish=1.5"),
    (dict(only={"haed.*": None}), ValueError, "matches no parameter.*'head'"),
    (dict(only={"*": None}), ValueError, "no parameter is left.*quantize or load has packed"),
    (dict(only={"head.*": "int44"}), ValueError, "int44"),
    (dict(backend="inductor"), TypeError, "'backend'"),
    (dict(regions=[nn.Linear(2, 2)]), ValueError, "no submodule"),
    (dict(regions=[]), ValueError, r"regions=\[\]"),
    (dict(mode="fast"), ValueError, "mode='fast'.*max-autotune"),
    (dict(options={"max_autotun": True}), ValueError, "'max_autotun'.*did you mean 'max_autotune"),
    (dict(mode="max-autotune", inner="eager"), ValueError, "inner='eager'; leave them out"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[str(bad[0]) for bad in BAD])
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        lotion_fx.transform(LM(), **arguments)


def test_bad_models_are_named():
    with pytest.raises(TypeError, match="model=.*nn.Module"):
        lotion_fx.transform(torch.zeros(2))
    with pytest.raises(ValueError, match="no parameters"):
        lotion_fx.transform(nn.ReLU())
    with pytest.raises(ValueError, match="meta device"):
        lotion_fx.transform(LM().to("meta"))
    with pytest.raises(ValueError, match="not initialized"):
        lotion_fx.transform(nn.Sequential(nn.LazyLinear(3)), only={"*": "int4"})
    model = LM()
    with torch.no_grad():
        model.head.weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"'head.weight' is not finite at \[2, 3\]"):
        lotion_fx.transform(model)
    integer = nn.Module()
    integer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="'weight' is torch.int8"):
        lotion_fx.transform(integer)
    model = lotion_fx.transform(LM(), inner="eager")
    with pytest.raises(ValueError, match="already transformed"):
        lotion_fx.transform(model)
    with pytest.raises(ValueError, match="already transformed"):
        lotion_fx.transform(nn.Sequential(model))


def test_an_unreached_weight_is_reported_and_trained():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(16, 12, batch_first=True), nn.Linear(12, VOCAB)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    model = lotion_fx.transform(Broken(), "int4", inner="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    F.cross_entropy(model(torch.randn(4, 6, 16)).flatten(0, 1), torch.randint(VOCAB, (24,))).backward()
    with pytest.warns(UserWarning, match="no compiled graph contains rnn.weight_ih_l0"):
        optimizer.step()
    assert registry[model.rnn.weight_ih_l0].smoothing.tally.loss_count == 24
    row = lotion_fx.report(model)["rnn.weight_ih_l0"]
    assert row.estimator == "fisher" and "no compiled graph" in row.reason and row.term > 0
    plain = Broken().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for weight in (plain.rnn.weight_ih_l0, plain.rnn.weight_hh_l0, plain.head.weight):
            weight.copy_(rounding.rtn(weight, lotion_fx.resolve("int4"), 1))
        latent, x = model.rnn.weight_hh_l0.clone(), torch.randn(4, 6, 16)
        torch.testing.assert_close(model.eval()(x), plain(x))
    assert torch.equal(model.rnn.weight_hh_l0, latent)
    with pytest.raises(ValueError, match="is not under lotion_fx"):
        lotion_fx.report(plain)
