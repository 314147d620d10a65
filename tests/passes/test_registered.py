"""Contractions that are not PyTorch's own: analytic by their gradient's op, blocks along what they sum over."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lotion_fx
from lotion_fx.passes import registered
from lotion_fx.passes.attach.probe import Code, Layout
from lotion_fx.state import registry
from tests.passes.curvature.cases import Case, assert_equals_the_sum, linear
from tests.passes.curvature.running import TABLES, loss_of, product, randn, run


@torch.library.custom_op("registered::by_matmul", mutates_args=())
def by_matmul(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


@by_matmul.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


by_matmul.register_autograd(
    lambda ctx, g: (g @ ctx.saved_tensors[1], g.t() @ ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("registered::stacked", mutates_args=())
def stacked(weight: Tensor, x: Tensor, scale: float) -> Tensor:
    """[E, in, out] and [E, N, in]."""
    return torch.bmm(x, weight) * scale


@stacked.register_fake
def _(weight: Tensor, x: Tensor, scale: float) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[2])


@torch.library.custom_op("registered::stacked_backward", mutates_args=())
def stacked_backward(g: Tensor, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.bmm(g, weight.mT), torch.bmm(x.mT, g)


@stacked_backward.register_fake
def _(g: Tensor, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _stacked_gradients(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
    weight, x = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.registered.stacked_backward(g, weight, x)
    return grad_weight, grad_x, None


stacked.register_autograd(
    _stacked_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2])
)


@torch.library.custom_op("registered::unknown", mutates_args=())
def unknown(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


@unknown.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


unknown.register_autograd(
    lambda ctx, g: (g @ ctx.saved_tensors[1], g.t() @ ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.fixture(autouse=True)
def taught():
    lotion_fx.register_contraction(by_matmul, {"x": -1, "weight": -1})
    lotion_fx.register_contraction("registered::stacked", {"weight": 1, "x": -1})
    lotion_fx.register_contraction(torch.ops.registered.stacked_backward, {0: 1, "x": 1}, output=1)


def experts(ends: list[int], transposed: bool) -> Case:
    """transformers' grouped product, of a weight [E, in, out] or [E, out, in]; the last rows are of no expert."""
    pytest.importorskip("transformers.integrations.moe")

    def expected(g: Any, v: Any) -> Any:
        rows, cols = ("x", "y") if not transposed else ("y", "x")
        of = {"x": v["x"], "y": g["y"]}
        parts = [product(of[rows][a:b], of[cols][a:b]) for a, b in itertools.pairwise([0, *ends])]
        hs, factors = zip(*parts, strict=True)
        return torch.cat(hs), tuple(torch.cat(f) for f in zip(*factors, strict=True))

    def forward(w: Tensor, tap: Any, x: Tensor, offs: Tensor) -> Tensor:
        w = w.mT if transposed else w
        return tap("y", torch.ops.transformers.grouped_mm_fallback(tap("x", x), w, offs)[: ends[-1]])

    shape = (4, 5, 7) if transposed else (4, 7, 5)
    return Case(shape, 4, shape[1], forward, expected, (randn(13, 7), torch.tensor(ends)))


CASES = {
    "a backward pass with @": lambda: linear(
        lambda w, tap, x: tap("y", torch.ops.registered.by_matmul(tap("x", x), w)), randn(13, 7), op="mm"
    ),
    "a backward op of its own": lambda: Case(
        (3, 7, 5),
        3,
        7,
        lambda w, tap, x: tap("y", torch.ops.registered.stacked(w, tap("x", x), 1.0)),
        lambda g, v: product(v["x"], g["y"])[0],
        (randn(3, 13, 7),),
        "registered.stacked_backward",
    ),
    "experts": lambda: experts([3, 3, 10, 13], False),
    "experts, [E, out, in]": lambda: experts([3, 3, 10, 13], True),
    "experts, rows of none": lambda: experts([3, 4, 10, 11], False),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", CASES)
def test_the_curvature_is_the_sum_of_squares_written_out(name, table):
    assert_equals_the_sum(CASES[name](), table)


def test_half_precision_squares_are_made_in_float32():
    x, w, layout = randn(13, 7), randn(5, 7), Layout("full", (5, 7), 1, 5)

    def forward(w: Tensor, x: Tensor) -> Tensor:
        return (torch.ops.registered.stacked(w.half().mT[None], x.half()[None], 1.0).float() * 1e-4).sum()

    made = run(forward, [w], [layout], (x,))
    assert made.resolutions[0].code == Code.ANALYTIC
    h = torch.full((13, 5), 1e-4).half().double().square().T @ x.half().double().square()
    torch.testing.assert_close(made.probes[0][: layout.payload].view(5, 7).double(), h, rtol=1e-5, atol=0)


def test_an_op_that_is_not_registered_takes_the_fisher_form():
    made = run(lambda w, x: loss_of(unknown(x, w)), [randn(5, 7)], [Layout("full", (5, 7), 1, 5)], (randn(13, 7),))
    assert made.resolutions[0].code == Code.NOT_A_CONTRACTION


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack, self.head = nn.Parameter(torch.randn(3, 32, 16)), nn.Parameter(torch.randn(8, 16))

    def forward(self, x):
        y = torch.ops.registered.stacked(self.stack, x.expand(3, -1, -1), 0.5)
        return torch.ops.registered.by_matmul(y.sum(0), self.head)


def test_blocks_run_along_what_the_op_sums_over():
    torch._dynamo.reset()
    model = lotion_fx.transform(Net(), "nvfp4", inner="aot_eager")
    model(torch.randn(4, 32)).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    found = {row.name: (row.estimator, row.block_axis) for row in lotion_fx.report(model).rows}
    assert found == {"stack": ("analytic", 1), "head": ("analytic", 1)}
    assert registry[model.stack].layout.factors == (3, 32, 16)


@pytest.mark.parametrize(
    ("op", "contracted", "options", "error", "words"),
    [
        (42, {"x": -1, "weight": -1}, {}, TypeError, "op=42: expected a torch operator"),
        (torch.mm, {"x": -1, "weight": -1}, {}, TypeError, "expected a torch operator"),
        ("by_matmul", {"x": -1, "weight": -1}, {}, TypeError, "op='by_matmul'"),
        (by_matmul, {"x": -1}, {}, ValueError, "expected the two operands"),
        (by_matmul, {"x": -1, "w": -1}, {}, ValueError, "has no argument 'w'; it has x, weight"),
        (by_matmul, {"x": -1, 0: -1}, {}, ValueError, "names one argument of registered::by_matmul twice"),
        (by_matmul, {"x": -1, "weight": "last"}, {}, ValueError, "'weight': 'last'"),
        (by_matmul, {"x": -1, "weight": -1}, {"output": 1}, ValueError, "output=1"),
        (by_matmul, {"x": -1, "weight": -1}, {"output": True}, ValueError, "output=True"),
        (stacked_backward, {"g": 1, "x": 1}, {}, ValueError, "output=None: registered::stacked_backward has 2 results"),
    ],
)
def test_a_wrong_registration_says_what_is_wrong(op, contracted, options, error, words):
    known = registered.registered_contractions()
    with pytest.raises(error, match=words):
        lotion_fx.register_contraction(op, contracted, **options)
    assert registered.registered_contractions() == known


def test_an_op_may_be_registered_before_it_is_there():
    lotion_fx.register_contraction("registered_later::product", {"x": -1, "weight": -1})
    assert any("registered_later::product" in entry for entry in registered.registered_contractions())
    torch.library.custom_op("registered_later::product", lambda x, weight: x @ weight.t(), mutates_args=(),
                            schema="(Tensor x, Tensor weight) -> Tensor")  # fmt: skip
    registered.settle()
    assert registered.ops.CONTRACTED[torch.ops.registered_later.product] == {0: -1, 1: -1}
