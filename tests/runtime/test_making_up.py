"""Weights rounded in order: what each is shifted by, against least squares of float64 from the layers' inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from lotion_fx.estimate import quantized_in
from lotion_fx.loss_graph import LossGraph, loss_graphs
from lotion_fx.making_up import TAKEN, MakingUp
from lotion_fx.numerics.adaptive import DAMPING_COLUMNS
from lotion_fx.state import Weight, names_of


class Residual(nn.Module):
    """A stream that two layers add to, the second through a view; ``project`` is on another way to the first sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Linear(8, 8), nn.Linear(8, 12)
        self.down, self.project = nn.Linear(12, 8), nn.Linear(8, 8, bias=False)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        out = self.down(F.relu(self.up(h)))
        out += self.project(h)
        return out + self.last(torch.tanh(out)).view(-1, 2, 4).flatten(1)


class Turned(nn.Module):
    """Weights as products take them from the left, [inputs, outputs]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Parameter(torch.randn(8, 12) / 3), nn.Parameter(torch.randn(12, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.stem) @ self.last


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.stem(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def of(model: nn.Module, inputs: list[Tensor]) -> tuple[list[LossGraph], dict[str, Weight], dict[str, Tensor]]:
    lotion_fx.transform(model, "int4", method="ptq", inner="aot_eager")
    graphs = loss_graphs(model, [(x, torch.zeros(())) for x in inputs], lambda out, _: out.square().mean())
    weights = quantized_in(graphs[0], names_of(model))
    return graphs, weights, {name: model.get_parameter(name).detach() for name in weights}


def moved(w: Tensor) -> Tensor:
    """As if rounded, coarsely."""
    return (w * 4).round() / 4


def expected(w: Tensor, x: Tensor, off: Tensor) -> Tensor:
    """What `TAKEN` of the damped least squares makes of a weight [outputs, inputs].

    Args:
        x: inputs [positions, inputs] as they are now.
        off: by how much outputs are off then, [positions, outputs].
    """
    w, x, off = w.double(), x.double(), off.double()
    gram = x.T @ x
    step = -torch.linalg.solve(gram + DAMPING_COLUMNS * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ off).T
    added = x @ step.T
    return w - TAKEN * (added * off).sum() / added.square().sum() * step


def test_the_first_weight_meets_what_it_always_met() -> None:
    graphs, weights, latent = of(Residual(), [torch.randn(20, 8)])
    made = MakingUp(graphs, list(weights), {})
    assert made.order == ["stem.weight", "up.weight", "down.weight", "project.weight", "last.weight"]
    goal, curvature = made.shifted("stem.weight", weights["stem.weight"], latent["stem.weight"])
    assert goal is latent["stem.weight"] and curvature == (None, None)


def test_shifts_are_those_of_least_squares() -> None:
    """Of the outputs, and of the sums that these go into; whatever is rounded later is there as it is."""
    torch.manual_seed(0)
    model, inputs = Residual(), [torch.randn(20, 8), torch.randn(20, 8), torch.randn(16, 8)]
    graphs, weights, latent = of(model, inputs)
    made, now = MakingUp(graphs, list(weights), {}), {n: p.detach() for n, p in model.named_parameters()}
    x = torch.cat(inputs)

    def run(p: dict[str, Any]) -> dict[str, Tensor]:
        h = torch.tanh(F.linear(x, p["stem.weight"], p["stem.bias"]))
        up = F.linear(h, p["up.weight"], p["up.bias"])
        out = F.linear(F.relu(up), p["down.weight"], p["down.bias"]) + h @ p["project.weight"].T
        end = out + F.linear(torch.tanh(out), p["last.weight"], p["last.bias"])
        return {"h": h, "up": up, "relu": F.relu(up), "out": out, "tanh": torch.tanh(out), "end": end}

    before = run(now)
    for name, taken, given in [
        ("stem.weight", "", ""),
        ("up.weight", "h", "up"),
        ("down.weight", "relu", "out"),
        ("project.weight", "h", "out"),
        ("last.weight", "tanh", "end"),
    ]:
        w = latent[name]
        goal, inputs_ = made.shifted(name, weights[name], w)
        if taken:
            found = run(now)
            wanted = expected(w, found[taken], found[given] - before[given])
            torch.testing.assert_close(goal.double(), wanted, rtol=2e-4, atol=2e-5)
            assert (goal - w).abs().max() > 1e-3, "nothing was to be made up for"
            gram = found[taken].double().T @ found[taken].double()
            [ours] = [x for x in inputs_ if x is not None]
            torch.testing.assert_close(ours[0].double() / ours.mean(), gram / gram.mean(), rtol=1e-3, atol=1e-3)
        now[name] = moved(goal)
        made.put(name, now[name])


def test_a_weight_that_products_take_from_the_left() -> None:
    torch.manual_seed(0)
    model, x = Turned(), torch.randn(30, 8)
    graphs, weights, latent = of(model, [x])
    made = MakingUp(graphs, list(weights), {"stem": moved(latent["stem"])})
    goal, inputs = made.shifted("last", weights["last"], latent["last"])
    was, now = torch.tanh(x @ latent["stem"]), torch.tanh(x @ moved(latent["stem"]))
    wanted = expected(latent["last"].T, now, (now - was) @ latent["last"]).T
    torch.testing.assert_close(goal.double(), wanted, rtol=2e-4, atol=2e-5)
    assert inputs.columns is None and inputs.rows is not None and inputs.rows.shape == (1, 12, 12)


def test_a_convolution() -> None:
    torch.manual_seed(0)
    model, x = Convolved(), torch.randn(3, 2, 7, 7)
    graphs, weights, latent = of(model, [x])
    w, stem = latent["last.weight"], latent["stem.weight"]
    made = MakingUp(graphs, list(weights), {"stem.weight": moved(stem)})
    goal, _ = made.shifted("last.weight", weights["last.weight"], w)
    was, now = (F.relu(F.conv2d(x, k, model.stem.bias.detach(), padding=1)) for k in (stem, moved(stem)))
    windows = F.unfold(now, 3).mT.flatten(0, 1)
    off = F.conv2d(now - was, w).flatten(2).mT.flatten(0, 1)
    torch.testing.assert_close(goal.double().flatten(1), expected(w.flatten(1), windows, off), rtol=2e-4, atol=2e-5)


def test_what_is_pruned_stays_so() -> None:
    torch.manual_seed(0)
    model = Turned()
    with torch.no_grad():
        model.last[3] = 0  # what this input would make up for
    graphs, weights, latent = of(model, [torch.randn(30, 8)])
    made = MakingUp(graphs, list(weights), {"stem": moved(latent["stem"])})
    goal, _ = made.shifted("last", weights["last"], latent["last"])
    assert goal.ne(latent["last"]).all(1).tolist() == [row != 3 for row in range(12)] and not goal[3].any()


def test_a_weight_that_several_ops_take_is_left_as_it_is() -> None:
    graphs, weights, latent = of(Tied(), [torch.randn(20, 8)])
    made = MakingUp(graphs, list(weights), {})
    assert made.shifted("layer.weight", weights["layer.weight"], latent["layer.weight"])[0] is latent["layer.weight"]


def test_batches_that_go_other_ways() -> None:
    """Each batch's graph is its own: one has no such layer, one has it before the other."""

    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 1:
                return self.a(x)
            first, second = (self.a, self.b) if len(x) % 2 else (self.b, self.a)
            return second(torch.tanh(first(x)))

    torch.manual_seed(0)
    inputs = [torch.randn(21, 6), torch.randn(20, 6), torch.randn(1, 6)]
    graphs, weights, latent = of(Ways(), inputs)
    made = MakingUp(graphs, list(weights), {})
    goal, _ = made.shifted("a.weight", weights["a.weight"], latent["a.weight"])
    assert goal is latent["a.weight"]
    rounded = moved(latent["a.weight"])
    made.put("a.weight", rounded)
    goal, _ = made.shifted("b.weight", weights["b.weight"], latent["b.weight"])
    was, now = (torch.tanh(inputs[0] @ w.T) for w in (latent["a.weight"], rounded))
    wanted = expected(latent["b.weight"], now, (now - was) @ latent["b.weight"].T)
    torch.testing.assert_close(goal.double(), wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("make", "fmt", "scales"), [(Residual, "int2", "searched"), (Turned, "int3", "absmax")])
def test_the_loss_is_lower_in_order(make: Callable[[], nn.Module], fmt: str, scales: str) -> None:
    """Distilled from itself, on batches that the rounding does not see."""

    def loss(out: Tensor, wanted: Tensor) -> Tensor:
        return (out - wanted).square().mean()

    lost = []
    for in_order in (False, True):
        torch.manual_seed(0)
        model = make()
        given = [torch.randn(64, 8) for _ in range(9)]
        with torch.no_grad():
            batches = [(x, model(x)) for x in given]
        lotion_fx.transform(model, fmt, method="ptq", inner="aot_eager").eval()
        lotion_fx.round_(model, batches[:8], loss, likelihood="gaussian", scales=scales, in_order=in_order)
        model.eval()
        with torch.no_grad():
            lost.append(float(loss(model(given[8]), batches[8][1])))
    assert lost[1] < 0.95 * lost[0]


# ------------------------------------------------------------------------------------------------- graphs of all kinds


class Chain(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between = between
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, self.first(x)))


def counted(model: Any, h: Tensor) -> Tensor:
    model.count.add_(1)
    return h / model.count


def subtracted(model: Any, h: Tensor) -> Tensor:
    h = torch.tanh(h)
    h -= 0.5
    return h.relu_()


CHAINS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "noise is drawn once": lambda model, h: torch.tanh(h + torch.randn_like(h)),
    "a buffer is written": counted,
    "in place": subtracted,
}


@pytest.mark.filterwarnings("ignore:model. its forward draws")
@pytest.mark.parametrize("between", CHAINS.values(), ids=CHAINS)
def test_what_is_not_rounded_shifts_nothing(between: Callable[[Any, Tensor], Tensor]) -> None:
    """Both runs of a graph see the same, but for rounded weights."""
    torch.manual_seed(0)
    graphs, weights, latent = of(Chain(between), [torch.randn(30, 8), torch.randn(30, 8)])
    made = MakingUp(graphs, list(weights), {"first.weight": latent["first.weight"].clone()})
    assert (
        made.shifted("second.weight", weights["second.weight"], latent["second.weight"])[0] is latent["second.weight"]
    )


def test_precision_is_that_of_the_region_around_an_op() -> None:
    """And regions end with it, whatever is run by then."""

    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                h = torch.tanh(self.a(x)).view(torch.int16).view(torch.bfloat16)  # which float32 would not survive
                h = torch.tanh(self.b(h))
                with torch.autocast("cpu", enabled=False):
                    h = torch.tanh(self.c(h.float()))
                return self.b(h).float() if len(x) == 1 else self.c(h).float() * 0 + h

    torch.manual_seed(0)
    model, x = Regions(), torch.randn(30, 8)
    graphs, weights, latent = of(model, [x])
    made = MakingUp(graphs, list(weights), {"a.weight": moved(latent["a.weight"])})
    goal, _ = made.shifted("b.weight", weights["b.weight"], latent["b.weight"])
    assert not torch.is_autocast_enabled("cpu") and goal.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        was, now = (torch.tanh(F.linear(x, w, model.a.bias)) for w in (latent["a.weight"], moved(latent["a.weight"])))
        off = model.b(now) - model.b(was)
    torch.testing.assert_close(goal.double(), expected(latent["b.weight"], now, off), rtol=0.1, atol=0.01)
    assert (goal - latent["b.weight"]).abs().max() > 0.02
    with torch.autocast("cpu", torch.bfloat16):
        made.shifted("c.weight", weights["c.weight"], latent["c.weight"])
        assert torch.is_autocast_enabled("cpu")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm, self.last = nn.Linear(8, 8), nn.LSTM(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(self.first(x))[0])


class Masked(nn.Module):
    """Logits of which some are minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.where(torch.arange(8) == 3, -torch.inf, 0.0)
        return (self.last(torch.tanh(self.first(x))) + mask).softmax(-1)


class Towers(nn.Module):
    """A sum with what takes many ops, and comes later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        short, long = self.last(torch.tanh(self.first(x))), self.other(x)
        for _ in range(500):
            long = torch.sin(long) * 1.01
        return short + long


class Assembled(nn.Module):
    """A matrix that a weight is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.zeros(8, 8)
        w[:4] = self.last
        return F.linear(torch.tanh(self.first(x)), w)


class Accumulated(nn.Module):
    """A product that is added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return (h * 2).addmm_(h, self.last)


@pytest.mark.filterwarnings("ignore:round_")
@pytest.mark.parametrize("make", [Recurrent, Masked, Towers, Assembled, Accumulated])
def test_any_graph_is_rounded(make: Callable[[], nn.Module]) -> None:
    """What cannot be shifted is rounded as if no other were."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(12, 3, 8)[:, 0] if make is not Recurrent else torch.randn(4, 3, 8)
    lotion_fx.transform(model, "int4", method="ptq", inner="aot_eager").eval()
    done = lotion_fx.round_(model, [(x, torch.zeros_like(x))], lambda out, y: (out - y).square().mean())
    assert all(torch.isfinite(p).all() for p in model.parameters()) and done.rounded <= done.nearest


def test_a_mask_of_minus_infinity_is_no_reason_to_shift_nothing() -> None:
    graphs, weights, latent = of(Masked(), [torch.randn(30, 8)])
    made = MakingUp(graphs, list(weights), {"first.weight": moved(latent["first.weight"])})
    goal, _ = made.shifted("last.weight", weights["last.weight"], latent["last.weight"])
    assert (goal != latent["last.weight"]).any(1).tolist() == [row != 3 for row in range(8)]


def test_a_graph_that_writes_into_a_weights_values_is_left_alone() -> None:
    """Nobody asks for what such an op makes, in the order in which the rest is run."""
    graphs, weights, _ = of(Assembled(), [torch.randn(30, 8)])
    assert MakingUp(graphs, list(weights), {}).order == []


def test_a_product_that_changes_its_argument_is_not_run_twice() -> None:
    graphs, weights, latent = of(Accumulated(), [torch.randn(30, 8)])
    made = MakingUp(graphs, list(weights), {"first.weight": moved(latent["first.weight"])})
    assert made.shifted("last", weights["last"], latent["last"])[0] is latent["last"]
