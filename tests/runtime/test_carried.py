"""Whoever runs, traces, copies or compiles a transformed model sees the rounded weights. The oracle is the plain model,
rounded by hand."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import lotion_fx
from lotion_fx.deployed import SAMPLE, deployed
from lotion_fx.numerics import rounding
from lotion_fx.state import registry

X = torch.randn(6, 32)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*torch.jit:FutureWarning",
    "ignore:LSTM with projections is not supported with oneDNN",
)


@pytest.fixture(autouse=True)
def compiled_anew():
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


def by_hand(model: nn.Module, fmt: str = "int4", axis: int = 1) -> nn.Module:
    """A plain copy, its matrices rounded."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() > 1:
                parameter.copy_(rounding.rtn(parameter, lotion_fx.resolve(fmt), axis))
    return plain


def pair(make=Net, fmt="int4", **settings):
    """A transformed model and its oracle, with the same weights."""
    model = make()
    rounded = by_hand(model, fmt)
    return lotion_fx.transform(model, fmt, inner="aot_eager", **settings), rounded


COMPILED = {
    "on top": lambda m: torch.compile(m, backend="aot_eager"),
    "in a function": lambda m: torch.compile(lambda x: m(x * 1.0) + 0.0, backend="aot_eager"),
    "twice in a function": lambda m: torch.compile(lambda x: (m(x) + m(x)) / 2, backend="eager"),
    "on top, whole": lambda m: torch.compile(m, backend="aot_eager", fullgraph=True),
    "a part": lambda m: torch.compile(lambda x: m.b(F.gelu(m.a(x))), backend="aot_eager"),
    "a part by itself": lambda m: lambda x: m.b(F.gelu(torch.compile(m.a, backend="aot_eager")(x))),
    "inside another": lambda m: torch.compile(nn.Sequential(m, nn.Identity()), backend="aot_eager"),
}


@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
@pytest.mark.parametrize("how", COMPILED)
def test_compiled_by_another_it_is_rounded(how, fmt):
    model, rounded = pair(fmt=fmt)
    model.eval()
    call = COMPILED[how](model)
    for _ in range(2):
        assert torch.equal(call(X), rounded(X))
    with torch.no_grad():
        assert torch.equal(call(X), rounded(X))
    with lotion_fx.full_precision(model):
        assert not torch.equal(rounded(X), model(X))


@pytest.mark.parametrize("how", ["on top", "in a function"])
def test_compiled_by_another_it_trains_the_same(how):
    model, _ = pair()
    other = copy.deepcopy(model)
    found = []
    for each, call in ((model, model), (other, COMPILED[how](other))):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        for _ in range(2):
            call(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert {row.estimator for row in lotion_fx.report(each).rows if row.format} == {"analytic"}
        found.append(each.a.weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("how", COMPILED)
def test_compiled_by_another_it_trains_at_rounded_weights(how):
    model, rounded = pair(method="ste")
    call = COMPILED[how](model)
    assert torch.equal(call(X), rounded(X))
    call(X).square().mean().backward()
    rounded(X).square().mean().backward()
    torch.testing.assert_close(model.a.weight.grad, rounded.a.weight.grad)


def test_a_whole_train_step_may_be_compiled():
    model, _ = pair()
    plain = copy.deepcopy(model)
    for each, compiled in ((model, True), (plain, False)):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)

        def step(x, each=each, optimizer=optimizer):
            loss = each(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        run = torch.compile(step, backend="aot_eager") if compiled else step
        run(X), run(X)
    torch.testing.assert_close(model.a.weight, plain.a.weight)
    assert lotion_fx.report(model)["a.weight"].estimator == "analytic"


def test_module_compile_afterwards_is_undone_aloud():
    model, rounded = pair()
    model.eval()
    model.compile(backend="aot_eager")
    with pytest.warns(UserWarning, match="leave compile"):
        assert torch.equal(model(X), rounded(X))
    assert torch.equal(model(X), rounded(X))
    model.train()
    model(X).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert lotion_fx.report(model)["a.weight"].estimator == "analytic"


def test_one_whole_graph_is_refused_with_what_to_do():
    model, _ = pair()
    for trace in (
        lambda: torch.compile(lambda x: model(x) + 1, backend="aot_eager", fullgraph=True)(X),
        lambda: torch.export.export(model.eval(), (X,), strict=True),
    ):
        with pytest.raises(Exception, match="lotion_fx compiles this model itself"):
            trace()


TRACED = {
    "export": lambda m: torch.export.export(m, (X,)).module(),
    "export, dynamic": lambda m: torch.export.export(m, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module(),
    "jit": lambda m: torch.jit.trace(m, X),
    "make_fx": lambda m: make_fx(m)(X),
}


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
@pytest.mark.parametrize("how", TRACED)
def test_traced_it_is_rounded(how, fmt, ran, with_grad):
    model, rounded = pair(fmt=fmt)
    model.eval()
    if ran:
        model(X)
    with torch.set_grad_enabled(with_grad):
        traced = TRACED[how](model)
        assert torch.equal(traced(X), rounded(X))
    assert torch.equal(model(X), rounded(X)) and model.a.weight.requires_grad  # everything is back in its place


def swapped(model, other):
    """What a library of moving averages does, which keeps the former values."""
    kept = [parameter.data for parameter in model.parameters()]
    for parameter, value in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = value.detach().clone()
    return kept


def assigned(model, other):
    kept = model.state_dict()
    model.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=True)
    return kept


SINCE = {  # what happens to a model between a call and its export
    "values swapped": swapped,
    "values assigned": assigned,
    "cast and back": lambda m, other: m.to(torch.bfloat16).float(),
    "cast": lambda m, other: m.to(torch.bfloat16),
    "called at others": lambda m, other: torch.func.functional_call(m, dict(other.named_parameters()), (X,)),
}


@pytest.mark.parametrize("what", SINCE)
def test_an_exported_program_holds_the_weights_of_now(what):
    model, _ = pair()
    model.eval()(X)
    kept = SINCE[what](model, Net())  # by which nothing is freed
    x = X.to(model.a.weight.dtype)
    plain = Net().to(x.dtype)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(torch.export.export(model, (x,)).module()(x), by_hand(plain)(x)), kept


class Raw(nn.Module):
    """A parameter of no module that tells its use."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def test_a_model_that_never_ran_is_exported_aloud():
    model = Raw()
    known, guessed = by_hand(model, axis=0), by_hand(model, axis=1)
    lotion_fx.transform(model, "int4", inner="aot_eager").eval()
    with pytest.warns(UserWarning, match="of a model that never ran: 'w' is rounded in blocks along its dimension 1"):
        assert torch.equal(torch.export.export(model, (X,)).module()(X), guessed(X))
    model(X)
    assert torch.equal(torch.export.export(model, (X,)).module()(X), known(X))


def test_a_symbolic_trace_names_what_it_reads_at_full_precision():
    model = nn.Sequential(Raw(), nn.Linear(16, 4))
    lotion_fx.transform(model, "int4", inner="aot_eager").eval()
    with pytest.warns(UserWarning, match=r"torch.fx.symbolic_trace: its graph reads Raw.w at full precision"):
        torch.fx.symbolic_trace(model)
    rounded = by_hand(Net())  # whole modules keep their hooks in such a graph
    plain = Net()
    plain.load_state_dict(rounded.state_dict())
    assert torch.equal(torch.fx.symbolic_trace(lotion_fx.transform(plain, "int4", inner="eager").eval())(X), rounded(X))


def test_an_exported_program_holds_the_rounded_weights_as_constants():
    model, rounded = pair()
    program = torch.export.export(model.eval(), (X,))
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert targets == {torch.ops.aten.linear.default, torch.ops.aten.gelu.default}
    kept = [value for value in program.constants.values() if isinstance(value, Tensor)]
    assert {tuple(value.shape) for value in kept} == {(48, 32), (10, 48)}
    assert any(torch.equal(value, rounded.a.weight) for value in kept)


def test_a_model_in_training_is_exported_aloud():
    model, _ = pair()
    for how in ("export", "jit"):
        with pytest.warns(UserWarning, match="call eval"):
            TRACED[how](model)


def along_all_weights(model, parameters):
    """The outputs' derivative in forward mode, each weight moved by 1."""
    with forward_ad.dual_level():
        moved = {k: forward_ad.make_dual(v, torch.ones_like(v)) for k, v in parameters.items()}
        return forward_ad.unpack_dual(torch.func.functional_call(model, moved, (X,))).tangent


def batched_gradients(model, parameters):
    x = X.clone().requires_grad_()
    out = model(x)
    return torch.autograd.grad(out, x, torch.stack([out.detach(), torch.ones_like(out)]), is_grads_batched=True)[0]


FUNCTIONAL = {
    "forward mode": along_all_weights,
    "batched gradients": batched_gradients,
    "vectorized": lambda m, p: torch.autograd.functional.jacobian(m, X, vectorize=True),
    "jacrev": lambda m, p: torch.func.jacrev(m)(X),
    "jacfwd": lambda m, p: torch.func.jacfwd(m)(X),
    "vmap": lambda m, p: torch.func.vmap(m)(X),
    "grad": lambda m, p: torch.func.grad(lambda q, x: torch.func.functional_call(m, q, (x,)).sum())(p, X)["a.weight"],
    "grads of samples": lambda m, p: torch.func.vmap(
        torch.func.grad(lambda q, x: torch.func.functional_call(m, q, (x[None],)).sum()), (None, 0)
    )(p, X)["a.weight"],
    "hessian": lambda m, p: torch.func.hessian(lambda x: m(x).square().sum())(X[0]),
    "jvp": lambda m, p: torch.func.jvp(m, (X,), (torch.ones_like(X),))[1],
}


@pytest.mark.parametrize("how", FUNCTIONAL)
def test_transformed_by_torch_func_it_is_rounded(how):
    model, rounded = pair()
    model.eval()
    found, expected = (FUNCTIONAL[how](m, {k: v.detach() for k, v in m.named_parameters()}) for m in (model, rounded))
    torch.testing.assert_close(found, expected)


def test_torch_func_differentiates_a_training_model():
    model, _ = pair()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    for how in ("grad", "jacrev", "batched gradients", "vectorized"):
        found, expected = (FUNCTIONAL[how](m, {k: v.detach() for k, v in m.named_parameters()}) for m in (model, plain))
        torch.testing.assert_close(found, expected)


def test_rounding_that_a_tracer_cannot_differentiate_is_refused():
    model, _ = pair(method="ste_scale")
    with pytest.raises(ValueError, match=r"torch\.func cannot trace the rounding of 'a.weight'.*eval\(\)"):
        torch.func.jacrev(model)(X)


# --------------------------------------------------------------------------------------------------------------- copies


def test_a_deepcopy_is_rounded_and_trains_as_the_model_does():
    model, rounded = pair()
    model(X).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.0).step()
    clone = copy.deepcopy(model)
    assert registry[clone.a.weight] is None or registry[clone.a.weight] is not registry[model.a.weight]
    assert torch.equal(clone.eval()(X), rounded(X)) and clone.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(clone(X), rounded(X))
    weights = []
    for each in (model, clone.train()):
        optimizer = torch.optim.AdamW(each.parameters(), 0.01)
        optimizer.zero_grad()
        each(X).square().mean().backward()
        optimizer.step()
        weights.append(each.a.weight.detach())
        assert lotion_fx.report(each)["a.weight"].estimator == "analytic"
    assert torch.equal(*weights)


def test_a_copy_is_asked_about_before_it_ran():
    model, _ = pair()
    model(X)
    clone = copy.deepcopy(model)
    assert lotion_fx.report(clone)["a.weight"].format == "int4"
    with lotion_fx.full_precision(clone):
        assert torch.equal(clone.eval()(X), Net.forward(model, X))


def test_a_copied_part_is_rounded():
    model, rounded = pair()
    model(X)
    part = copy.deepcopy(model.a).eval()
    assert torch.equal(part(X), rounded.a(X)) and torch.equal(part(X), rounded.a(X))


@pytest.mark.parametrize("by_regions", [False, True])
def test_a_copy_rounds_a_layer_that_was_another_model_s(by_regions):
    def made():
        net = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 10))
        return lotion_fx.transform(net, "int2", inner="aot_eager", regions=[*net] if by_regions else None)

    model, other = made(), made()
    other(X)
    model[1] = other[1]
    model(X)
    clone = copy.deepcopy(model).eval()
    torch.testing.assert_close(clone(X), model.eval()(X))
    assert registry[clone[1].weight] is not None is not registry[model[1].weight]
    assert registry[clone[1].weight] is not registry[model[1].weight]


def test_tied_weights_of_a_copy_stay_tied():
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Linear(48, 32)
            self.c = nn.Linear(32, 48)
            self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(F.gelu(self.a(x))))

    model, _ = pair(Tied)
    model(X)
    clone = copy.deepcopy(model).eval()
    clone(X)
    assert registry[clone.a.weight] is registry[clone.c.weight] is not None and clone.a.weight is clone.c.weight


def test_an_average_of_models_is_rounded():
    model, _ = pair()
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        model.a.weight.add_(0.1)
    average.update_parameters(model)
    plain = Net()
    plain.load_state_dict(average.module.state_dict())
    assert torch.equal(average.eval()(X), by_hand(plain)(X))


def test_an_unpickled_model_says_once_that_it_is_plain():
    model, _ = pair()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        with pytest.warns(UserWarning, match="this Net was unpickled and runs at its full-precision weights") as said:
            assert torch.equal(loaded.eval()(X), plain(X))
            loaded(X)
        assert len(said) == 1


# ------------------------------------------------------------------------------------------- rounded once for a version


def test_eval_rounds_once_for_each_version(monkeypatch):
    model, rounded = pair()
    calls = []
    original = rounding.rtn
    monkeypatch.setattr(rounding, "rtn", lambda *args, **options: calls.append(1) or original(*args, **options))
    model.eval()
    for _ in range(3):
        assert torch.equal(model(X), rounded(X))
    assert len(calls) == 2
    with torch.no_grad():
        model.a.weight.mul_(1.5)
    model(X), model(X)
    assert len(calls) == 3
    model.train()(X)
    model.eval()(X)
    assert len(calls) == 5  # what training does not need is freed


CHANGES = {
    "in place": lambda p: p.mul_(1.7),
    "data in place": lambda p: p.data.mul_(1.7),
    "data": lambda p: setattr(p, "data", p.data * 1.7),
    "data copied": lambda p: p.data.copy_(p.data * 1.7),
    "detached": lambda p: p.detach().mul_(1.7),
    "one value through data": lambda p: p.data.view(-1).__setitem__(slice(0, None, 7), 0.5),
}


@pytest.mark.parametrize("what", CHANGES)
def test_eval_sees_a_changed_weight(what):
    model, _ = pair()
    model.eval()(X)
    with torch.no_grad():
        CHANGES[what](model.a.weight)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(X), by_hand(plain)(X))


def test_a_replaced_and_a_moved_weight_are_seen():
    model, _ = pair()
    model.eval()(X)
    model.a.weight = nn.Parameter(torch.randn(48, 32))
    plain = Net()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(X), by_hand(plain)(X))
    model.double()
    assert torch.equal(model(X.double()), by_hand(plain.double())(X.double()))


def test_the_sample_of_a_large_weight_is_small_and_spread():
    model = lotion_fx.transform(nn.Linear(300, 400), "int4", inner="eager").eval()
    values = deployed(registry[model.weight], model.weight)
    assert torch.equal(values, rounding.rtn(model.weight.detach(), lotion_fx.resolve("int4"), 1))
    from lotion_fx.deployed import _kept

    kept = _kept[registry[model.weight]]
    assert kept.sample.numel() <= SAMPLE
    places = (torch.arange(kept.sample.numel()) * kept.sample.stride(0)).tolist()
    assert len({place % 300 for place in places}) > 100 and max(places) > 0.99 * 300 * 400


def test_gradients_pass_through_the_rounded_weights():
    model, rounded = pair()
    model.eval()
    x, y = (X.clone().requires_grad_() for _ in range(2))
    model(x).square().mean().backward()
    rounded(y).square().mean().backward()
    assert torch.equal(x.grad, y.grad)  # at the rounded weight, not at the latent one
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, rounded.get_parameter(name).grad)


def test_what_inference_mode_rounded_serves_training():
    model, rounded = pair()
    with torch.inference_mode():
        assert torch.equal(model.eval()(X), rounded(X))
    model(X.clone().requires_grad_()).sum().backward()


# ------------------------------------------------------------------------------------------------------ read by another


@torch.compiler.disable
def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


class Reads(nn.Module):
    """A module's weight read by another, in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return product(F.relu(self.a(x)), self.b.weight) + self.b(x)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("trained", [True, False])
def test_a_weight_read_by_another_is_rounded(inner, trained):
    model = Reads()
    rounded = by_hand(model)
    lotion_fx.transform(model, "int4", inner=inner)
    if trained:
        model(X).sum().backward()
        torch.optim.SGD(model.parameters(), 0.0).step()
    model.eval()
    for _ in range(2):
        assert torch.equal(model(X), rounded(X))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_weight_read_by_another_is_rounded_in_training_too(inner):
    model = Reads()
    rounded = by_hand(model)
    lotion_fx.transform(model, "int4", inner=inner, method="ste")
    for _ in range(2):
        assert torch.equal(model(X), rounded(X))
    model(X).square().mean().backward()
    rounded(X).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, rounded.get_parameter(name).grad, msg=name)


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(32, 12, batch_first=True, **options)
        self.head = nn.LazyLinear(5)
        self(torch.randn(2, 3, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


RECURRENT = [("LSTM", {}), ("GRU", {"bidirectional": True}), ("RNN", {"num_layers": 2}), ("LSTM", {"proj_size": 6})]


@pytest.mark.parametrize("method", ["ste", "ste_scale", "rr"])
@pytest.mark.parametrize(("kind", "options"), RECURRENT)
def test_recurrent_modules_train_at_rounded_weights(kind, options, method):
    model, x = Recurrent(kind, **options), torch.randn(4, 6, 32)
    rounded = by_hand(model)
    lotion_fx.transform(model, "int4", inner="aot_eager", method=method)
    out = model(x)
    if method == "rr":
        assert not torch.equal(out, model(x))  # each forward draws anew
    else:
        assert torch.equal(out, rounded(x))
    out.square().mean().backward()
    rounded(x).square().mean().backward()
    if method == "ste":
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, rounded.get_parameter(name).grad, msg=name)
    before = model.rnn.weight_hh_l0.detach().clone()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(before, model.rnn.weight_hh_l0)
    torch.testing.assert_close(model.eval()(x), by_hand(_plain(model))(x))


def test_recurrent_modules_are_rounded_while_finishing():
    model, x = Recurrent("LSTM"), torch.randn(4, 6, 32)
    rounded = by_hand(model)
    lotion_fx.transform(model, "int4", inner="aot_eager")
    lotion_fx.finish(model)
    torch.testing.assert_close(model(x), rounded(x))
    torch.testing.assert_close(model.eval()(x), rounded(x))


def test_a_recurrent_module_keeps_no_rounded_weight():
    """It holds its parameters in a list of its own, which a copy would take along."""
    model = lotion_fx.transform(Recurrent("LSTM"), "int4", inner="aot_eager", method="ste")
    model(torch.randn(4, 6, 32))
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))
    copy.deepcopy(model)


def _plain(model: nn.Module) -> nn.Module:
    """The model without hooks, which a copy would carry."""
    clone = copy.deepcopy(model)
    for module in clone.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return clone


def test_packed_sequences():
    lstm = nn.LSTM(32, 12, batch_first=True)
    model = lotion_fx.transform(nn.ModuleDict({"lstm": lstm, "head": nn.Linear(12, 3)}), "int4", inner="aot_eager")
    rounded = by_hand(_plain(model))
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 5, 32), [5, 3, 2], batch_first=True)
    assert torch.equal(model.eval()["lstm"](packed)[0].data, rounded["lstm"](packed)[0].data)


@pytest.mark.parametrize(
    ("layer", "axis", "x"),
    [
        (nn.Conv2d(6, 16, 3), 1, torch.randn(2, 6, 8, 8)),
        (nn.ConvTranspose1d(12, 8, 3), 0, torch.randn(2, 12, 9)),
        (nn.Linear(32, 16), 1, torch.randn(3, 32)),
        (nn.GRUCell(32, 16), 1, torch.randn(3, 32)),
    ],
)
def test_the_block_axis_in_python_is_the_module_s(layer, axis, x):
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = copy.deepcopy(layer)

        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = Hidden()
    rounded = by_hand(model, axis=axis)
    lotion_fx.transform(model, "int4", inner="aot_eager").eval()
    for _ in range(2):
        assert torch.equal(model(x), rounded(x))
    assert {row.block_axis for row in lotion_fx.report(model).rows if row.format} == {axis}


class WithMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(32, 24, batch_first=True), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, None])[0][:, 0])


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.filterwarnings("ignore:no compiled graph contains")
@pytest.mark.parametrize("make", [WithMemory, lambda: nn.LSTM(32, 24), lambda: nn.GRU(32, 24)])
def test_a_copy_of_a_recurrent_model_has_its_own_weights(make):
    """Whose modules copy all of their state, the compiled call too; and are pickled with it."""
    model = lotion_fx.transform(make(), "int4", inner="aot_eager")
    first = model(X)[0].detach()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(clone(X)[0], first)
    clone(X)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in clone.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.warns(UserWarning, match="was unpickled and runs at its full-precision weights"):
        pickle.loads(pickle.dumps(model))(X)


@pytest.mark.parametrize("regions", ["blocks", "some"])
def test_a_copy_of_a_model_in_regions_runs(regions):
    model = Stack()
    lotion_fx.transform(model, "int4", inner="aot_eager", regions=regions if regions == "blocks" else [*model.layers])
    expected = model(X)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(X), expected)
    clone(X).sum().backward()
    assert all(parameter.grad is not None for parameter in clone.parameters())
    assert torch.equal(clone.eval()(X), model.eval()(X))


class RecurrentRoot(nn.LSTM):
    def __init__(self) -> None:
        super().__init__(32, 24)
        self.head = nn.Sequential(nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x)[0])


@pytest.mark.filterwarnings("ignore:no compiled graph contains")
def test_a_copy_of_a_recurrent_model_in_regions_runs():
    model = RecurrentRoot()
    lotion_fx.transform(model, "int4", inner="aot_eager", regions=[model.head])
    expected = model(X)
    torch.testing.assert_close(copy.deepcopy(model)(X), expected)
