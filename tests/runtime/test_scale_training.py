"""The phase "scales": codes stay, scales are trained as parameters of their own would be.

Broken once and seen red: gradients or steps left as they are, a zero step that moves, powers of two that move.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.numerics.rounding import from_blocks, to_blocks
from tests.models import MLP

X = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(64) % 7
STEPS = 20


def rounded(fmt, **options):
    """A model whose weights are on their grids."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = lotion_fx.transform(MLP(), fmt, method="ptq", inner="aot_eager", **options)
    lotion_fx.round_(model, [(X, LABELS)], F.cross_entropy, method="nearest")
    return model


def weights(model):
    return {name: model.get_parameter(name).detach().clone() for name in lotion_fx.quantized(model)}


def codes(model):
    return {name: weight.codes.clone() for name, weight in lotion_fx.quantized(model).items()}


def train(model, optimizer, steps=STEPS):
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
    return F.cross_entropy(model.eval()(X), LABELS).item()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adam": lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 3e-3),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("fmt", ["int3", "int2", "int4/tensor", "int8", "nvfp4", "nf4"])
def test_codes_stay_and_the_loss_falls(fmt, make):
    model = rounded(fmt)
    before, known, at = codes(model), weights(model), F.cross_entropy(model.eval()(X), LABELS).item()
    lotion_fx.hold_codes(model)
    model.requires_grad_(False)
    for name in known:
        model.get_parameter(name).requires_grad_(True)
    assert train(model, make(list(p for p in model.parameters() if p.requires_grad))) < at - 0.005
    after = codes(model)
    for name in known:
        assert torch.equal(before[name], after[name]), name
        assert not torch.equal(known[name], model.get_parameter(name)), name
    assert lotion_fx.report(model).phase == "scales"
    for name, weight in lotion_fx.quantized(model).items():  # the scales of two levels are rounded to E4M3
        latent = model.get_parameter(name).detach()
        deployed = lotion_fx.rounding.rtn(latent, weight.format, weight.axis)
        torch.testing.assert_close(deployed, latent, rtol=0.07 if fmt == "nvfp4" else 1e-5, atol=1e-7)


@pytest.mark.parametrize("fmt, only", [("int4", {}), ("nvfp4", {}), ("int4/tensor", {"down.*": "mxfp4"})])
def test_compiled_as_it_is_written(fmt, only):
    """Steps through Inductor and as they are, from weights that lie on no codes yet; the last under a closure."""
    found = {}
    for inner in ("inductor", "aot_eager"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = lotion_fx.transform(MLP(), fmt, method="scales", inner=inner, only=only)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        train(model, optimizer, steps=3)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), LABELS)
            loss.backward()
            return loss

        model.train()
        optimizer.step(closure)
        found[inner] = [parameter.detach().clone() for parameter in model.parameters()]
    torch.testing.assert_close(found["inductor"], found["aot_eager"], rtol=1e-5, atol=1e-7)


class Scaled(nn.Module):
    """An MLP of given codes, whose blocks' norms are parameters, in units of their own."""

    def __init__(self, model, unit):
        super().__init__()
        self.blocks, self.norms = {}, nn.ParameterDict()
        for name, weight in lotion_fx.quantized(model).items():
            blocks = to_blocks(model.get_parameter(name).detach(), weight.format, weight.axis)
            direction = blocks / blocks.norm(dim=-1, keepdim=True)
            units = direction.abs().sum(-1, keepdim=True) if unit == "l1" else torch.ones_like(direction[..., :1])
            self.blocks[name] = direction * units, weight.format, weight.axis, weight.shape
            self.norms[name.replace(".", "_")] = nn.Parameter(blocks.norm(dim=-1, keepdim=True) / units)
        self.biases = nn.ParameterList([model.up.bias.detach().clone(), model.down.bias.detach().clone()])

    def weights(self):
        for (name, (blocks, *how)), norm in zip(self.blocks.items(), self.norms.values(), strict=True):
            yield name, from_blocks(blocks * norm, *how)

    def forward(self, x):
        (_, up), (_, down) = self.weights()
        return F.linear(F.gelu(F.linear(x, up, self.biases[0])), down, self.biases[1])


@pytest.mark.parametrize("fmt", ["int3", "int4/tensor"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_any_optimizer_trains_scales_as_parameters_of_their_own(fmt, optimizer):
    """SGD moves a block's norm. Adam moves each element by the same, so a norm by their sum along the block."""
    make = {
        "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, 1e-3, eps=1e-30),
    }[optimizer]
    model = rounded(fmt)
    known = weights(model)
    oracle = Scaled(model, "l1" if optimizer == "adam" else "l2")
    lotion_fx.hold_codes(model)
    mine, theirs = train(model, make(model.parameters()), 10), train(oracle, make(oracle.parameters()), 10)
    assert mine == pytest.approx(theirs, rel=1e-4)
    for name, weight in oracle.weights():
        moved = (weight - known[name]).norm()
        assert moved > 1e-3
        assert (model.get_parameter(name) - weight).norm() < 2e-3 * moved, name


def test_codes_that_rounding_does_not_keep_are_refused():
    """A block whose largest weight saturates gets another scale when it is rounded again."""
    name = "lopsided_for_scales"
    lotion_fx.register_format(name, lotion_fx.codebook([-1.0, -0.4, 0.0, 0.5], block=4))
    model = lotion_fx.transform(MLP(), "int4", only={"down.*": name}, method="ptq", inner="aot_eager")
    for refused in (lambda: lotion_fx.hold_codes(model), lambda: lotion_fx.transform(MLP(), name, method="scales")):
        with pytest.raises(ValueError, match=f"{name!r}, whose levels go from -1 to 0.5, may .* far on both sides"):
            refused()


def test_a_parameter_that_is_listed_twice():
    model = rounded("int4")
    lotion_fx.hold_codes(model)
    known = codes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own
        optimizer = torch.optim.SGD([*model.parameters(), model.up.weight], 0.05)
    train(model, optimizer, 3)
    assert all(torch.equal(known[name], after) for name, after in codes(model).items())


def test_scales_that_are_powers_of_two_stay():
    model = rounded("mxfp4")
    for refused in (lambda: lotion_fx.hold_codes(model), lambda: lotion_fx.transform(MLP(), "mxfp4", method="scales")):
        with pytest.raises(ValueError, match="'mxfp4' are powers of two.*freeze the weights"):
            refused()
    model = rounded("int4", only={"down.*": "mxfp4"})
    known = weights(model)
    lotion_fx.hold_codes(model)
    train(model, torch.optim.AdamW(model.parameters(), 1e-2))
    assert torch.equal(model.down.weight, known["down.weight"])
    assert not torch.equal(model.up.weight, known["up.weight"])


def test_a_step_that_is_none_moves_nothing():
    """A GradScaler's, at an overflow; and one of no learning rate."""
    model = rounded("int3")
    known = weights(model)
    lotion_fx.hold_codes(model)
    train(model, torch.optim.Adam(model.parameters(), 0.0), 3)
    optimizer, scaler = torch.optim.Adam(model.parameters(), 1e-2, fused=True), torch.amp.GradScaler("cpu")
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model.train()(X), LABELS)).backward()
        model.up.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    for name, weight in known.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=1e-5, atol=0)


def test_a_closure_that_is_called_several_times():
    model = rounded("int3")
    before = codes(model)
    lotion_fx.hold_codes(model)
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), LABELS)
        loss.backward()
        return loss

    model.train()
    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], after) for name, after in codes(model).items())


def test_the_phase_is_resumed_and_copied():
    def begun():
        model = rounded("int3")
        lotion_fx.hold_codes(model)
        return model, torch.optim.AdamW(model.parameters(), 1e-3)

    whole, optimizer = begun()
    train(whole, optimizer, 3)
    copied = copy.deepcopy(whole)
    saved = whole.state_dict(), copy.deepcopy(optimizer.state_dict())
    resumed = lotion_fx.transform(MLP(), "int3", method="ptq", inner="aot_eager")
    resumed.load_state_dict(copy.deepcopy(saved[0]))
    others = torch.optim.AdamW(resumed.parameters(), 1e-3)
    others.load_state_dict(copy.deepcopy(saved[1]))
    copies = torch.optim.AdamW(copied.parameters(), 1e-3)
    copies.load_state_dict(copy.deepcopy(saved[1]))
    for model, steps in ((whole, optimizer), (resumed, others), (copied, copies)):
        train(model, steps, 3)
        assert lotion_fx.report(model).phase == "scales"
        for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_it_is_a_method_and_a_phase_of_schedules():
    torch.manual_seed(0)
    model = lotion_fx.transform(MLP(), "int4", schedule=(("plain", 0.5), ("scales", 0.5)), steps=6, inner="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, 3)
    before, latent = codes(model), model.up.weight.detach().clone()
    train(model, optimizer, 3)
    assert all(torch.equal(before[name], after) for name, after in codes(model).items())
    assert not torch.equal(latent, model.up.weight)
    assert lotion_fx.report(lotion_fx.transform(MLP(), "int4", method="scales")).phase == "scales"


def test_it_begins_at_the_rounded_values_whatever_came_before():
    """Of latent weights far from any code, as after STE at 2 bits: a step of nothing leaves what is deployed."""
    torch.manual_seed(0)
    model = lotion_fx.transform(MLP(), "int2", method="ste", inner="aot_eager")
    at = train(model, torch.optim.Adam(model.parameters(), 3e-3), 60)
    before = codes(model)
    lotion_fx.hold_codes(model)
    assert train(model, torch.optim.Adam(model.parameters(), 0.0), 1) == pytest.approx(at, rel=1e-5)
    assert train(model, torch.optim.Adam(model.parameters(), 1e-4), 1) == pytest.approx(at, rel=0.02)
    assert all(torch.equal(before[name], after) for name, after in codes(model).items())


def test_a_scale_that_would_change_its_sign_can_come_back():
    """It stays above a floor, at codes that are the same, however long it is driven down."""
    target = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    wrong = torch.cat([-target[:2], target[2:]])
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(20, 4, bias=False))
    model[0].weight.data.copy_(wrong)
    model = lotion_fx.transform(model, "int4", method="scales", inner="aot_eager")
    before, optimizer = codes(model), torch.optim.Adam(model.parameters(), 1e-2)

    def run(goal):
        model.train()
        for _ in range(300):
            optimizer.zero_grad()
            F.mse_loss(model(X), X @ goal.T).backward()
            optimizer.step()

    run(target)
    driven = model[0].weight.detach().abs().amax(1)
    assert 0 < driven[:2].max() < 0.01 * driven[2:].min()
    run(wrong)
    assert model[0].weight.detach().abs().amax(1)[:2].min() > 0.5
    assert torch.equal(before["0.weight"], codes(model)["0.weight"])


def test_a_step_that_raised_leaves_nothing_behind():
    class Fails(torch.optim.SGD):
        fails = True

        @torch.no_grad()
        def step(self, closure=None):
            if self.fails:
                raise MemoryError
            return super().step(closure)

    model = rounded("int4")
    lotion_fx.hold_codes(model)
    optimizer = Fails(model.parameters(), 1e-2)
    with pytest.raises(MemoryError):
        train(model, optimizer, 1)
    lotion_fx.finish(model)
    optimizer.fails = False
    before = model.up.weight.detach().clone()
    train(model, optimizer, 1)
    torch.testing.assert_close(model.up.weight.detach(), before - 1e-2 * model.up.weight.grad)


def test_updates_by_hand_are_refused():
    model = rounded("int4")
    lotion_fx.hold_codes(model)
    F.cross_entropy(model(X), LABELS).backward()
    with pytest.raises(ValueError, match=r"phase 'scales': 'up.weight' is updated by hand.*torch.optim"):
        lotion_fx.apply_term(model.parameters())


class Sometimes(nn.Module):
    """A layer that only some calls use."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(20, 16), nn.Linear(20, 16), nn.Linear(16, 7)

    def forward(self, x, all_of_it):
        return self.c(F.gelu(self.a(x) + (self.b(x) if all_of_it else 0)))


def test_a_weight_that_a_closure_s_first_call_leaves_out():
    torch._dynamo.reset()
    model, calls = lotion_fx.transform(Sometimes(), "int4", method="scales", inner="aot_eager"), []
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)

    def closure():
        optimizer.zero_grad()
        calls.append(F.cross_entropy(model(X, bool(calls)), LABELS))
        calls[-1].backward()
        return calls[-1]

    before = codes(model)
    optimizer.step(closure)
    assert len(calls) > 1
    assert all(torch.equal(before[name], after) for name, after in codes(model).items())


class Around(torch.optim.Optimizer):
    """Steps another inside its own step, as ZeroRedundancyOptimizer does."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 3e-3})
        self.inner = torch.optim.Adam(self.param_groups[0]["params"], 3e-3)

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()


def test_an_optimizer_that_steps_another():
    models = [rounded("int4"), rounded("int4")]
    before = codes(models[0])
    for model, make in zip(models, (Around, lambda p: torch.optim.Adam(p, 3e-3)), strict=True):
        lotion_fx.hold_codes(model)
        train(model, make(list(model.parameters())))
    assert all(torch.equal(before[name], after) for name, after in codes(models[0]).items())
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(mine, theirs)
