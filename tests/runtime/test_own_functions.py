"""Models with a `torch.autograd.Function` of their own, against the same forwards written without one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from lotion_fx import own_backwards

FMT = "int3/tensor"


class WithoutGradients(torch.autograd.Function):
    """A product; autograd looks away already, and it says so once more."""

    @staticmethod
    @torch.no_grad()
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        with torch.no_grad():
            y = x @ w.t()
        with torch.set_grad_enabled(False):
            return y + 0.0

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


class WithGradients(torch.autograd.Function):
    """A product of what it detaches, with a graph of its own for the backward."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.own = x.detach().requires_grad_(), torch.detach(input=w).requires_grad_()
            with torch.no_grad():
                x.sum()
            ctx.y = ctx.own[0] @ ctx.own[1].t()
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return torch.autograd.grad(ctx.y, ctx.own, grad)


class SetUp(torch.autograd.Function):
    """Of the newer kind, called by a name of its own, and inside another."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return WithoutGradients.apply(x, w)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


set_up = SetUp.apply


class Net(nn.Module):
    def __init__(self, product) -> None:
        super().__init__()
        self.first, self.last, self.product = nn.Linear(4, 3), nn.Linear(3, 2, bias=False), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.first(x), self.last.weight).tanh()


def made(product) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Net(product).double()
    lotion_fx.transform(model, FMT, inner="eager")
    return model, (torch.randn(16, 4).double(), torch.randn(16, 2).double())


PRODUCTS = {"no_grad": WithoutGradients.apply, "enable_grad": WithGradients.apply, "setup_context": set_up}
plain = made(lambda x, w: x @ w.t())


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_what_a_forward_switches_is_no_part_of_the_loss(product, outer):
    model, batch = made(product)
    for moments in ("auto", "off"):
        expected = lotion_fx.expected_loss(plain[0], batch, F.mse_loss, samples=2, moments=moments)
        with outer():
            result = lotion_fx.expected_loss(model, batch, F.mse_loss, samples=2, moments=moments)
            assert torch.is_grad_enabled() == (outer is torch.enable_grad)
        assert {n: c.kind for n, c in result.certificates.items()} == {
            n: c.kind for n, c in expected.certificates.items()
        }
        for name, term in expected.terms.items():
            assert float(result.terms[name]) == pytest.approx(float(term), rel=1e-9)
            assert float(term) > 0


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_suggest_diagnose_calibrate_and_round(product):
    model, batch = made(product)
    other = made(lambda x, w: x @ w.t())[0]
    costs, theirs = (
        [choice.costs for choice in lotion_fx.suggest(each, batch, F.mse_loss, bits=6).choices]
        for each in (model, other)
    )
    assert costs == [pytest.approx(cost) for cost in theirs]
    ste, other_ste = (
        lotion_fx.diagnose(each, batch, F.mse_loss, directions=2, samples=2).nearest.over_all.ste
        for each in (model, other)
    )
    assert ste == pytest.approx(other_ste, rel=1e-9)
    factors = lotion_fx.calibrate(model, [batch], F.mse_loss, samples=4, generator=torch.Generator().manual_seed(0))
    assert set(factors) == {"first.weight", "last.weight"}
    rounded = [lotion_fx.round_(each, [batch], F.mse_loss, method="nearest").rounded for each in (model, other)]
    assert rounded[0] == pytest.approx(rounded[1], rel=1e-9)


# -------------------------------------------------------------------------------- a backward that is no derivative


def straight_through() -> type:
    """Made anew, as each is told of once."""

    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, levels: int) -> Tensor:
            return torch.round(x * levels) / levels

        @staticmethod
        def backward(ctx, grad: Tensor):
            return grad, None

    return StraightThrough


def reversed_gradient() -> type:
    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, levels: int) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad: Tensor):
            return -grad, None

    return Reversed


def told_in(recorded) -> list[str]:
    return [str(each.message) for each in recorded if "backward of its own" in str(each.message)]


@pytest.mark.parametrize("make", [straight_through, reversed_gradient])
@pytest.mark.parametrize("tool", ["expected_loss", "suggest", "diagnose", "round_", "calibrate"])
def test_a_backward_that_is_no_derivative_is_told_of_once(make, tool):
    function = make()
    model, batch = made(lambda x, w: function.apply(x, 4) @ w.t())
    call = getattr(lotion_fx, tool)
    given = [batch] if tool in ("round_", "calibrate") else batch
    with pytest.warns(UserWarning) as recorded:
        call(model, given, F.mse_loss)
        call(model, given, F.mse_loss)
    (told,) = told_in(recorded)
    assert f"model: {function.__name__} has a backward of its own that is not the derivative" in told
    assert "follow the forward, by which the loss changes" in told


def test_the_increase_is_that_of_the_forward():
    """Reversing a gradient changes no loss: the term is that of the model without it."""
    function = reversed_gradient()
    model, batch = made(lambda x, w: function.apply(x, 4) @ w.t())
    with pytest.warns(UserWarning, match="Reversed has a backward of its own"):
        result = lotion_fx.expected_loss(model, batch, F.mse_loss, moments="off")
    expected = lotion_fx.expected_loss(plain[0], batch, F.mse_loss, moments="off")
    for name, term in expected.terms.items():
        assert float(result.terms[name]) == pytest.approx(float(term), rel=1e-9)


@pytest.mark.parametrize("make", [straight_through, reversed_gradient])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # which Dynamo does
def test_training_follows_the_backward_without_a_word(make, inner):
    function = make()
    torch.manual_seed(0)
    own = Net(lambda x, w: function.apply(x, 4) @ w.t()).double()
    x, y = torch.randn(16, 4).double(), torch.randn(16, 2).double()
    F.mse_loss(own(x), y).backward()
    expected = [p.grad.clone() for p in own.parameters()]
    own.zero_grad()
    lotion_fx.transform(own, FMT, inner=inner)
    F.mse_loss(own(x), y).backward()
    for parameter, grad in zip(own.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


class Halves(torch.autograd.Function):
    """Right; one output has no gradient, nor has a table or an index one here."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, index: Tensor, power: int):
        ctx.save_for_backward(x, table)
        ctx.power = power
        first = x.sign()
        ctx.mark_non_differentiable(first)
        return first, (x**power) * table + 0 * index

    @staticmethod
    def backward(ctx, _, grad: Tensor):
        x, table = ctx.saved_tensors
        return grad * table * ctx.power * x ** (ctx.power - 1), None, None, None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_backward_that_is_the_derivative_is_not_told_of(dtype):
    table, index = torch.full((3,), 0.3, dtype=dtype), torch.arange(3)
    torch.manual_seed(0)
    model = Net(lambda x, w: Halves.apply(x, table, index, 3)[1] @ w.t()).to(dtype)
    lotion_fx.transform(model, FMT, inner="eager")
    batch = torch.randn(16, 4).to(dtype), torch.randn(16, 2).to(dtype)
    own_backwards._looked_at.discard(Halves)
    lotion_fx.expected_loss(model, batch, F.mse_loss)
    assert Halves in own_backwards._looked_at
