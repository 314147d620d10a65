"""Frozen weights are trained against at the values that are deployed; adapters beside them stay in full precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from tests.models import MLP


def at_rounded(model, names, fmt="int4"):
    """A plain copy of a transformed model, with some weights rounded by hand."""
    plain = MLP()
    plain.load_state_dict(model.state_dict())
    for name in names:
        weight = plain.get_parameter(name)
        weight.data.copy_(lotion_fx.rounding.rtn(weight.detach(), lotion_fx.resolve(fmt), 1))
    return plain


def gradients(model):
    x, y = torch.randn(8, 20, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 7
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_runs_as(model, plain):
    for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    torch.testing.assert_close(gradients(model), gradients(plain))


@pytest.mark.parametrize(
    "method, names", [("lotion", ["down.weight"]), ("ptq", []), ("ste", ["up.weight", "down.weight"])]
)
@pytest.mark.parametrize("in_python", [False, True])
def test_a_frozen_weight_runs_at_its_rounded_values_in_training(method, names, in_python):
    torch.manual_seed(0)
    model = MLP()
    model.down.weight.requires_grad_(False)
    lotion_fx.transform(model, "int4", method=method, inner="aot_eager")
    if in_python:
        model.forward = torch.compiler.disable(model.forward)
    for _ in range(2):
        assert_runs_as(model, at_rounded(model, names))
    with torch.no_grad():
        model.down.weight.mul_(1.5)  # as a checkpoint that is loaded
    assert_runs_as(model, at_rounded(model, names))
    if method == "lotion":
        model.down.weight.requires_grad_(True)
        assert_runs_as(model, at_rounded(model, []))


def test_a_weight_frozen_in_mid_training_has_no_term_any_more():
    torch.manual_seed(0)
    model = lotion_fx.transform(MLP(), "int4", calibrate=False, inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for step in range(5):
        model.down.weight.requires_grad_(step < 3)
        model.down.weight.grad = None
        gradients(model)
        optimizer.step()
    terms = {row.name: row.term for row in lotion_fx.report(model).rows if row.format}
    assert terms.pop("down.weight") is None and list(terms) == ["up.weight"]
    torch.testing.assert_close(float(lotion_fx.penalty(model).detach()), sum(terms.values()), rtol=1e-5, atol=0)


def test_what_waits_for_its_turn_is_not_frozen():
    """The half of a GAN that the other half's loss passes through."""
    torch.manual_seed(0)
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager", calibrate=False)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (model.up, model.down)]
    for step in range(4):
        model.up.requires_grad_(step % 2 == 0)
        model.down.requires_grad_(step % 2 == 1)
        torch._dynamo.reset()  # torch 2.11 keeps a graph though other parameters of it ask for gradients
        if step > 1:
            assert_runs_as(model, at_rounded(model, []))
        gradients(model)
        optimizers[step % 2].step()


class Adapted(nn.Module):
    """A LoRA of one's own."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(20, 7)
        self.lora_A = nn.Parameter(torch.randn(4, 20))
        self.lora_B = nn.Linear(4, 7, bias=False)

    def forward(self, x):
        return self.base(x) + self.lora_B(x @ self.lora_A.T)


def test_adapters_stay_in_full_precision_unless_they_are_asked_for():
    model = lotion_fx.transform(Adapted(), "int4", inner="eager")
    rows = lotion_fx.report(model)
    assert rows["base.weight"].format == "int4"
    assert rows["lora_A"].format is None and "adapter" in rows["lora_B.weight"].reason
    asked = lotion_fx.transform(copy.deepcopy(Adapted()), "int4", only={"lora_*": "int8"}, inner="eager")
    assert lotion_fx.report(asked)["lora_B.weight"].format == "int8"


class Adversaries(nn.Module):
    """A generator and a critic in turns; the critic is frozen in the generator's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.critic = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        for part in (self.generator, self.critic):
            lotion_fx.transform(part, "int4", inner="aot_eager", strength=3.0)
        self.optimizers = [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.generator, self.critic)]

    def step(self, i):
        z = torch.randn(12, 8, generator=torch.Generator().manual_seed(i))
        self.critic.requires_grad_(False)
        self.optimizers[0].zero_grad()
        self.critic(self.generator(z)).square().mean().backward()
        self.optimizers[0].step()
        self.critic.requires_grad_(True)
        self.optimizers[1].zero_grad()
        fake, real = self.critic(self.generator(z).detach()), self.critic(z)
        (F.softplus(fake).mean() + F.softplus(-real).mean()).backward()
        self.optimizers[1].step()

    def saved(self):
        return copy.deepcopy([self.state_dict(), *(optimizer.state_dict() for optimizer in self.optimizers)])


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_resumed_pair_of_adversaries_is_bit_identical(at):
    whole = Adversaries()
    for i in range(7):
        whole.step(i)
        if i + 1 == at:
            model, *optimizers = whole.saved()
    resumed = Adversaries()
    resumed.load_state_dict(model)
    for optimizer, state in zip(resumed.optimizers, optimizers, strict=True):
        optimizer.load_state_dict(state)
    for i in range(at, 7):
        resumed.step(i)
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_passes_through_a_frozen_model_is_not_counted_as_its_loss():
    pair = Adversaries()
    for i in range(4):
        pair.step(i)
    assert lotion_fx.state_dict(pair.critic)["phases"][0]["terms"] == 24  # 12 made and 12 real rows


class Momentum(nn.Module):
    """An encoder, and its moving average, which the forward itself moves."""

    def __init__(self, write):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.write = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)), write
        self.key = copy.deepcopy(self.query).requires_grad_(False)

    def forward(self, x):
        out = self.query(x)
        with torch.no_grad():
            for mine, theirs in zip(self.key.parameters(), self.query.parameters(), strict=True):
                self.write(mine, theirs)
            known = self.key(x)
        return out @ known.T


WRITES = {
    "copy_": lambda mine, theirs: mine.copy_(mine * 0.9 + theirs * 0.1),
    "in place": lambda mine, theirs: mine.mul_(0.9).add_(theirs, alpha=0.1),
    "data": lambda mine, theirs: mine.data.mul_(0.9).add_(theirs.data, alpha=0.1),
    "view": lambda mine, theirs: mine.view(-1).lerp_(theirs.reshape(-1), 0.1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_a_forward_writes_into_a_weight_is_not_lost(write):
    model, x = Momentum(write), torch.randn(12, 16)
    lotion_fx.transform(model, "int4", inner="aot_eager", calibrate=False)
    wanted = [parameter.clone() for parameter in model.key.parameters()]
    optimizer = torch.optim.SGD(model.query.parameters(), 0.5)
    for _ in range(4):
        wanted = [a * 0.9 + b.detach() * 0.1 for a, b in zip(wanted, model.query.parameters(), strict=True)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(12)).backward()
        optimizer.step()
        torch.testing.assert_close([parameter.detach() for parameter in model.key.parameters()], wanted)
    report = lotion_fx.report(model)
    assert report["key.0.weight"].format is None and "forward writes into it" in report["key.0.weight"].reason
    assert report["query.0.weight"].estimator == "analytic"
