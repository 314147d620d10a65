"""Products that Python runs outside of graphs: how their weights are blocked, and that they deploy so."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.numerics import rounding

pytestmark = pytest.mark.filterwarnings("ignore:.*no compiled graph.*", "ignore:.*graph break.*")

FMT = "int4/8"


class Recurrent(nn.Module):
    """A projection [in, out] beside a module that Dynamo skips."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 24) / 4)
        self.rnn = nn.GRU(24, 8, batch_first=True)

    def forward(self, x):
        return self.rnn((x @ self.w)[:, None])[0][:, -1]


class FixedPoint(nn.Module):
    """A loop that data end."""

    def __init__(self):
        super().__init__()
        self.a, self.w = nn.Linear(16, 24), nn.Parameter(torch.randn(24, 24) / 8)

    def forward(self, x):
        h = x = self.a(x)
        for _ in range(20):
            after = torch.tanh(0.3 * h @ self.w + x)
            if (after - h).abs().max() < 1e-3:
                break
            h = after
        return h


MODELS = [Recurrent, FixedPoint]


def seeded(make):
    torch.manual_seed(0)
    return make()


def batch():
    torch.manual_seed(1)
    return torch.randn(5, 16)


def trained(make):
    model = lotion_fx.transform(seeded(make), FMT, inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(batch()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def by_hand(model, make):
    """A plain model, its matrices rounded along what their products sum over."""
    plain = seeded(make)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(rounding.rtn(parameter, lotion_fx.resolve(FMT), 0 if name == "w" else 1))
    return plain


@pytest.mark.parametrize("make", MODELS)
def test_blocks_run_along_what_products_sum_over_in_python(make):
    model = trained(make)
    row = lotion_fx.report(model)["w"]
    assert row.block_axis == 0 and "assumption" not in row.reason
    torch.testing.assert_close(model(batch()), by_hand(model, make)(batch()))


@pytest.mark.parametrize("make", MODELS)
def test_such_a_model_is_deployed_as_it_runs(make, tmp_path):
    model = trained(make)
    wanted = model(batch()).detach()
    torch.testing.assert_close(lotion_fx.quantize(model)(batch()), wanted)
    lotion_fx.export(model, tmp_path / "out")
    torch.testing.assert_close(lotion_fx.load(tmp_path / "out", seeded(make))(batch()), wanted)


@pytest.mark.parametrize("make", MODELS)
def test_nothing_that_is_asked_of_it_moves_its_blocks(make):
    model, x = trained(make), batch()
    wanted = model(x).detach()
    lotion_fx.expected_loss(model, (x, torch.zeros_like(wanted)), F.mse_loss)
    assert torch.equal(model(x), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether rounding pays is not the point
        lotion_fx.round_(model, [(x, torch.zeros_like(wanted))], F.mse_loss)
    fresh = lotion_fx.transform(seeded(make), FMT, inner="aot_eager").eval()
    fresh.load_state_dict(model.state_dict())
    fresh(x)  # tells how its weights are used
    assert torch.equal(fresh(x), model(x))


class Remembering(Recurrent):
    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []

    def forward(self, x, cache=None):
        self.calls += 1
        self.seen.append(x.shape)
        out = super().forward(x)
        self.aux = out.square().mean()
        if cache is not None:
            cache.kept.append(x)
        return out + torch.rand(())


class Cache:
    def __init__(self):
        self.kept = []


@pytest.mark.parametrize("cached", [False, True])
def test_finding_out_leaves_no_trace(cached):
    found = []
    for make in (lambda model: model, lambda model: lotion_fx.transform(model, FMT, inner="aot_eager", strength=0)):
        model, cache = make(seeded(Remembering)), Cache()
        torch.manual_seed(2)
        out = model(batch(), cache=cache if cached else None)
        model.aux.backward()  # is this call's still
        found.append((out, torch.rand(3), model.calls, len(model.seen), len(cache.kept), model.w.grad.clone()))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


@torch.no_grad()
def test_where_it_cannot_be_found_out_the_report_says_so_and_quantize_goes_by_it():
    model = lotion_fx.transform(seeded(Remembering), FMT, inner="aot_eager").eval()
    model(batch(), Cache())  # which no tracer may fill once more
    torch.manual_seed(3)
    wanted = model(batch(), Cache())
    assert "by assumption" in lotion_fx.report(model)["w"].reason
    with pytest.warns(UserWarning, match="'w'.*dimension 1 by assumption"):
        quantized = lotion_fx.quantize(model)
    torch.manual_seed(3)
    torch.testing.assert_close(quantized(batch(), Cache()), wanted)


def test_a_model_that_never_ran_is_not_deployed():
    with pytest.raises(ValueError, match="no forward has told yet"):
        lotion_fx.quantized(lotion_fx.transform(Recurrent(), FMT, inner="aot_eager"))
