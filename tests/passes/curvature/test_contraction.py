"""Each contraction's curvature, in full and factored, is the sum of squares written out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx.passes.attach.probe import Code, Layout
from tests.passes.curvature.cases import Case, assert_equals_the_sum, linear
from tests.passes.curvature.running import (
    TABLES,
    TOKENS,
    close,
    convolution,
    flat,
    gather_sum,
    loss_of,
    product,
    randn,
    run,
)

CASES: dict[str, Case] = {}
CASES["linear"] = linear(lambda w, tap, x: tap("y", F.linear(tap("x", x), w)), randn(13, 7), op="mm")
CASES["linear, one position"] = linear(lambda w, tap, x: tap("y", F.linear(tap("x", x), w)), randn(1, 7))
CASES["linear, a vector"] = linear(lambda w, tap, x: tap("y", w @ tap("x", x)), randn(7))
CASES["linear, one output"] = linear(lambda w, tap, x: tap("y", F.linear(tap("x", x), w)), randn(13, 7), shape=(1, 7))
CASES["linear, bias"] = linear(
    lambda w, tap, x, b: tap("y", F.linear(tap("x", x), w, b)), randn(13, 7), randn(5), op="mm"
)
CASES["linear, 3-D"] = linear(lambda w, tap, x: tap("y", F.linear(tap("x", x), w)), randn(3, 5, 7), op="mm")
CASES["linear, 4-D transposed input"] = linear(
    lambda w, tap, x: tap("y", F.linear(tap("x", x.transpose(1, 3)), w)), randn(2, 7, 3, 5)
)
CASES["linear, computed input"] = linear(lambda w, tap, x: tap("y", F.linear(tap("x", x.sin()), w)), randn(13, 7))
CASES["x @ w"] = Case(
    (7, 5), 1, 7, lambda w, tap, x: tap("y", tap("x", x) @ w), lambda g, v: product(v["x"], g["y"]), (randn(13, 7),)
)
CASES["x @ w, 3-D"] = Case(
    (7, 5),
    1,
    7,
    lambda w, tap, x: tap("y", tap("x", x) @ w),
    lambda g, v: product(flat(v["x"]), flat(g["y"])),
    (randn(3, 5, 7),),
)
CASES["w @ x"] = linear(lambda w, tap, x: tap("y", (w @ tap("x", x).T).T), randn(13, 7))
CASES["w @ x, batched"] = linear(lambda w, tap, x: tap("y", (w @ tap("x", x).mT).mT), randn(3, 5, 7))
CASES["expanded over a batch"] = linear(
    lambda w, tap, x: tap("y", torch.bmm(w.expand(3, 5, 7), tap("x", x).mT).mT), randn(3, 13, 7)
)
CASES["X @ vector"] = Case(
    (7,),
    1,
    7,
    lambda w, tap, x: tap("y", tap("x", x) @ w),
    lambda g, v: g["y"].square() @ v["x"].square(),
    (randn(13, 7),),
)
CASES["bmm"] = Case(
    (3, 7, 5),
    3,
    7,
    lambda w, tap, x: tap("y", torch.bmm(tap("x", x), w)),
    lambda g, v: product(v["x"], g["y"]),
    (randn(3, 13, 7),),
    "bmm",
)
CASES["bmm, weight first"] = Case(
    (3, 5, 7),
    3,
    5,
    lambda w, tap, x: tap("y", torch.bmm(w, tap("x", x))),
    lambda g, v: product(g["y"].mT, v["x"].mT),
    (randn(3, 7, 13),),
    "bmm",
)
CASES["baddbmm"] = Case(
    (3, 7, 5),
    3,
    7,
    lambda w, tap, x, b: tap("y", torch.baddbmm(b, tap("x", x), w)),
    lambda g, v: product(v["x"], g["y"]),
    (randn(3, 13, 7), randn(3, 1, 5)),
    "bmm",
)


def conv(size: tuple[int, ...], weight: tuple[int, ...], transposed: bool = False, **options: int) -> Case:
    space, groups = len(size) - 2, options.get("groups", 1)
    stride, padding, dilation = (options.get(k, d) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1)))
    op = getattr(F, f"conv{'_transpose' if transposed else ''}{space}d")

    def expected(g: Any, v: Any) -> Any:
        by_row, by_col = (v["x"], g["y"]) if transposed else (g["y"], v["x"])
        return convolution(by_row, by_col, weight[2:], groups, stride, padding, dilation)

    def forward(w: Tensor, tap: Any, x: Tensor) -> Tensor:
        return tap("y", op(tap("x", x), w, **options))

    return Case(weight, groups, weight[0] // groups, forward, expected, (randn(*size),), "convolution_backward")


CASES["conv1d"] = conv((3, 5, 13), (7, 5, 3))
CASES["conv1d, stride"] = conv((3, 5, 13), (7, 5, 3), stride=3, padding=2)
CASES["conv2d"] = conv((2, 3, 7, 11), (5, 3, 3, 2), stride=2, padding=1, dilation=2)
CASES["conv2d, 1x1"] = conv((2, 3, 7, 5), (5, 3, 1, 1))
CASES["conv2d, groups"] = conv((2, 6, 7, 5), (9, 2, 3, 3), groups=3, padding=1)
CASES["conv2d, depthwise"] = conv((2, 5, 7, 5), (5, 1, 3, 3), groups=5, stride=2, padding=1)
CASES["conv3d"] = conv((2, 3, 5, 7, 5), (2, 3, 3, 2, 1), stride=2, padding=1)
CASES["conv_transpose1d"] = conv((3, 5, 7), (5, 7, 3), transposed=True, stride=2, padding=1)
CASES["conv_transpose2d"] = conv(
    (2, 4, 5, 3), (4, 3, 3, 3), transposed=True, stride=2, padding=1, output_padding=1, groups=2, dilation=2
)
CASES["conv1d, no batch"] = Case(
    (7, 5, 3),
    1,
    7,
    lambda w, tap, x: tap("y", F.conv1d(tap("x", x), w)),
    lambda g, v: convolution(g["y"][None], v["x"][None], (3,), 1, 1, 0, 1),
    (randn(5, 13),),
)
# Patches as a convolution of stride = kernel by hand, as vision transformers write it.
CASES["patches"] = Case(
    (5, 3, 2, 2),
    1,
    5,
    lambda w, tap, x: tap("y", F.linear(tap("x", F.unfold(x, 2, stride=2).mT), w.flatten(1))),
    lambda g, v: product(flat(g["y"]), flat(v["x"])),
    (randn(2, 3, 4, 6),),
    "mm",
)


def embedding_sum(g: Any, v: Any, padding: int | None = None) -> Tensor:
    h = gather_sum(TOKENS, 9, flat(g["y"]).square())
    if padding is not None:
        h[padding] = 0
    return h


CASES["embedding"] = Case((9, 7), 1, 9, lambda w, tap, i: tap("y", F.embedding(i, w)), embedding_sum, (TOKENS,))
CASES["embedding, padding"] = Case(
    (9, 7),
    1,
    9,
    lambda w, tap, i: tap("y", F.embedding(i, w, padding_idx=2)),
    lambda g, v: embedding_sum(g, v, 2),
    (TOKENS,),
)
CASES["embedding by index, then a residual stream"] = Case(
    (9, 7),
    1,
    9,
    lambda w, tap, i, m: (lambda e: e + F.gelu(e) @ m)(tap("y", w[i])),
    embedding_sum,
    (TOKENS, randn(7, 7)),
)
CASES["scale"] = Case(
    (7,),
    1,
    7,
    lambda w, tap, x: tap("y", tap("x", x) * w),
    lambda g, v: (g["y"] * v["x"]).square().sum((0, 1)),
    (randn(3, 5, 7),),
)
CASES["scale of rows"] = Case(
    (5, 1),
    1,
    5,
    lambda w, tap, x: tap("y", w * tap("x", x)),
    lambda g, v: (g["y"] * v["x"]).square().sum((0, 2)),
    (randn(3, 5, 7),),
)
CASES["scale, then a matrix"] = Case(
    (7,),
    1,
    7,
    lambda w, tap, x, m: tap("y", tap("x", x) * w) @ m,
    lambda g, v: (g["y"] * v["x"]).square().sum((0, 1)),
    (randn(3, 5, 7), randn(7, 5)),
)
CASES["rms_norm"] = Case(
    (7,),
    1,
    7,
    lambda w, tap, x: tap("y", tap("x", F.rms_norm(x, (7,))) * w),
    lambda g, v: (g["y"] * v["x"]).square().sum((0, 1)),
    (randn(3, 5, 7),),
)
CASES["position table"] = Case(
    (5, 7),
    1,
    5,
    lambda w, tap, x, m: (lambda y: y + torch.tanh(y @ m))(tap("y", x + w)),
    lambda g, v: g["y"].square().sum(0),
    (randn(3, 5, 7), randn(7, 7)),
)
CASES["position table, cut, seen by heads"] = Case(
    (9, 7),
    1,
    9,
    lambda w, tap, x, m: tap("y", x + w[:5]).unsqueeze(1) @ m,
    lambda g, v: F.pad(g["y"].square().sum(0), (0, 0, 0, 4)),
    (randn(3, 5, 7), randn(2, 7, 5)),
)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_sum_of_squares_written_out(name: str, table: str) -> None:
    assert_equals_the_sum(CASES[name], table)


def test_autocast_is_seen_through() -> None:
    x, w, layout = randn(13, 7), randn(5, 7), Layout("factored", (5, 7), 1, 5)

    def forward(w: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(F.linear(x, w))

    for table in TABLES:
        made = run(forward, [w], [layout], (x,), table)
        assert made.resolutions[0].code == Code.ANALYTIC
        y = (x.bfloat16() @ w.bfloat16().T).float().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(y), y)
        _, factors = product(g.bfloat16().double(), x.bfloat16().double())
        for part, expected in zip(layout.split(made.probes[0]), factors, strict=True):
            close(part, expected, 1e-3)  # g once rounded and seldom otherwise than here; sums are in float32


def test_float16_squares_do_not_underflow() -> None:
    """1e-4 squared is below float16's smallest number."""
    x, w = randn(13, 7), randn(5, 7)

    def forward(w: Tensor, x: Tensor) -> Tensor:
        return (F.linear(x.half(), w.half()).float() * 1e-4).sum()

    for kind in ("full", "factored"):
        layout = Layout(kind, (5, 7), 1, 5)
        made = run(forward, [w], [layout], (x,))
        h, factors = product(torch.full((13, 5), 1e-4).half().double(), x.half().double())
        close(made.probes[0][: layout.payload], h if kind == "full" else torch.cat([f.flatten() for f in factors]))
