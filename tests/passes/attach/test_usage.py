"""The dimension that each op contracts, and the factors that follow, from the graph alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lotion_fx.passes.attach.usage import CONTRACTION, ELEMENTWISE, EMBEDDING, INNER, PRODUCT, weight_uses, why_not_of


def uses(function, shape, *data):
    """The uses of one weight in a function of it and of data, as Dynamo's graph gives it."""
    found = []

    def look(gm, inputs):
        index = next(i for i, x in enumerate(inputs) if isinstance(x, nn.Parameter))
        found.extend(weight_uses(gm, inputs, [index])[index])
        return gm.forward

    torch._dynamo.reset()
    weight = nn.Parameter(torch.randn(shape))
    torch.compile(function, backend=look, fullgraph=True)(weight, *data)
    return found


X = torch.randn(5, 6)
CASES = {
    "linear": (lambda w, x: F.linear(x, w), (7, 6), CONTRACTION, 1, (1, 7)),
    "x @ w": (lambda w, x: x @ w, (6, 7), CONTRACTION, 0, (1, 6)),
    "w @ x": (lambda w, x: w @ x, (7, 5), CONTRACTION, 1, (1, 7)),
    "3-d input": (lambda w, x: F.linear(x[None].expand(3, 5, 6), w), (7, 6), CONTRACTION, 1, (1, 7)),
    "permuted": (lambda w, x: x @ w.permute(2, 0, 1).reshape(6, -1), (2, 3, 6), CONTRACTION, 2, (1, 6)),
    "heads": (lambda w, x: torch.einsum("nd,hdk->nhk", x, w), (2, 6, 3), CONTRACTION, 1, (2, 6)),
    "sliced": (lambda w, x: F.linear(x, w[2:5]), (7, 6), CONTRACTION, 1, (1, 7)),
    "split": (lambda w, x: F.linear(x, w.split(3)[1]), (9, 6), CONTRACTION, 1, (1, 9)),
    "cast": (lambda w, x: F.linear(x.bfloat16(), w.bfloat16()), (7, 6), CONTRACTION, 1, (1, 7)),
    "scaled": (lambda w, x: F.linear(x, w * 0.5), (7, 6), CONTRACTION, 1, (1, 7)),
    "stack [E, in, out]": (lambda w, x: torch.bmm(x[None].expand(3, 5, 6), w), (3, 6, 7), CONTRACTION, 1, (3, 6)),
    "stack [E, out, in]": (
        lambda w, x: torch.bmm(x[None].expand(3, 5, 6), w.transpose(1, 2)), (3, 7, 6), CONTRACTION, 2, (3, 7),
    ),
    "gathered": (
        lambda w, x: torch.bmm(x[:, None], w[torch.tensor([0, 2, 1, 1, 0])]), (3, 6, 7), CONTRACTION, 1, (3, 6),
    ),
    "conv": (lambda w, x: F.conv1d(x[None], w), (8, 5, 3), CONTRACTION, 1, (1, 8)),
    "grouped conv": (lambda w, x: F.conv1d(x.view(1, 6, 5), w, groups=3), (9, 2, 3), CONTRACTION, 1, (3, 3)),
    "depthwise conv": (lambda w, x: F.conv1d(x.view(1, 6, 5), w, groups=6), (6, 1, 3), CONTRACTION, 2, (6, 1)),
    "transposed conv": (lambda w, x: F.conv_transpose1d(x[None], w), (5, 8, 3), CONTRACTION, 0, (1, 5)),
    "grouped transposed conv": (
        lambda w, x: F.conv_transpose1d(x.view(1, 6, 5), w, groups=3), (6, 4, 3), CONTRACTION, 0, (3, 2),
    ),
    "depthwise transposed conv": (
        lambda w, x: F.conv_transpose1d(x.view(1, 6, 5), w, groups=6), (6, 1, 3), CONTRACTION, 2, (6, 1),
    ),
    "embedding": (lambda w, x: F.embedding(x.abs().long().clamp(max=6), w), (7, 6), EMBEDDING, 1, (1, 7)),
    "elementwise": (lambda w, x: w * x, (5, 6), ELEMENTWISE, 1, (1, 5)),
    "softmax": (lambda w, x: x @ w.softmax(0), (6, 7), CONTRACTION, 0, (1, 6)),
}  # fmt: skip


MASK, NOISE = torch.ones(7, 6).triu(), torch.randn(7, 6)
STYLE = torch.randn(2, 1, 6, 1)


@torch.library.custom_op("usage::lin", mutates_args=())
def opaque_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.t()


@opaque_linear.register_fake
def _(x, w):
    return x.new_empty(x.shape[0], w.shape[0])


def modulated(w, x):
    kernels = (w[None] * STYLE_OF(x)).flatten(0, 1)
    return F.conv1d(x.reshape(1, 2 * 6, -1), kernels, groups=2)


def STYLE_OF(x):
    return x.mean(-1).view(2, 1, 6, 1)


DATA3 = torch.randn(2, 6, 9)
HEADS = torch.randn(2, 3, 5, 4)
# of parameters and constants alone, on the way to a product
CASES |= {
    "cat": (lambda w, x: F.linear(x, torch.cat([w, w + 1])), (7, 6), CONTRACTION, 1, (1, 7)),
    "stack": (lambda w, x: x @ torch.stack([w, w]).sum(0), (6, 7), CONTRACTION, 0, (1, 6)),
    "mask": (lambda w, x: F.linear(x, w * torch.ones(7, 6).triu()), (7, 6), CONTRACTION, 1, (1, 7)),
    "triu": (lambda w, x: F.linear(x, w.triu()), (7, 6), CONTRACTION, 1, (1, 7)),
    "pad": (lambda w, x: F.linear(x, F.pad(w, (1, 1))), (7, 4), CONTRACTION, 1, (1, 7)),
    "where": (lambda w, x: F.linear(x, torch.where(w > 0, w, 0.1 * w)), (7, 6), CONTRACTION, 1, (1, 7)),
    "standardized": (lambda w, x: F.linear(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)), (7, 6),
                     CONTRACTION, 1, (1, 7)),
    "kron": (lambda w, x: x @ torch.kron(w, torch.eye(2)), (3, 7), CONTRACTION, 0, (1, 3)),
    "symmetric": (lambda w, x: x @ (w + w.T), (6, 6), CONTRACTION, None, (1, 6)),
    "matrix_exp": (lambda w, x: x @ torch.matrix_exp(w), (6, 6), CONTRACTION, None, (1, 6)),
    "written into zeros": (lambda w, x: x @ put(w), (6, 7), CONTRACTION, 0, (1, 6)),
    "dropped connections": (lambda w, x: F.linear(x, F.dropout(w, 0.5)), (7, 6), CONTRACTION, 1, (1, 7)),
    "columns permuted": (
        lambda w, x: F.linear(x, w[:, torch.tensor([1, 0, 2, 5, 4, 3])]), (7, 6), CONTRACTION, 1, (1, 7),
    ),
    "pointwise, flat": (lambda w, x: x @ w.flatten(1).t(), (7, 6, 1), CONTRACTION, 1, (1, 7)),
}  # fmt: skip
# under noise
CASES |= {
    "noise": (lambda w, x: F.linear(x, w + 0.1 * torch.randn_like(w)), (7, 6), CONTRACTION, 1, (1, 7)),
    "noise of a size": (lambda w, x: x @ (w - torch.empty(6, 7).normal_(0, 0.1)), (6, 7), CONTRACTION, 0, (1, 6)),
    "multiplicative noise": (
        lambda w, x: F.linear(x, w * (1 + 0.1 * torch.randn(7, 1))), (7, 6), CONTRACTION, 1, (1, 7),
    ),
    "noise of its own size": (lambda w, x: F.linear(x, w + w * torch.randn_like(w)), (7, 6), CONTRACTION, 1, (1, 7)),
    "of generated data": (lambda w, x: F.linear(torch.randn(5, 6), w) + x[:, :1], (7, 6), CONTRACTION, 1, (1, 7)),
}  # fmt: skip
# scaled by data, and then a matrix
CASES |= {
    "masked by data": (lambda w, x: F.linear(x, torch.where(x.sum() > w, w, 0.0)), (7, 6), CONTRACTION, 1, (1, 7)),
    "by hand": (lambda w, x: (x.unsqueeze(-2) * w).sum(-1), (7, 6), CONTRACTION, 1, (1, 7)),
    "modulated": (lambda w, x: modulated(w, x), (8, 6, 3), CONTRACTION, 1, (1, 8), DATA3),
    "gathered by data": (
        lambda w, x: torch.bmm(x[:, None], w[x[:, 0].long().clamp(0, 2)]), (3, 6, 7), CONTRACTION, 1, (3, 6),
    ),
}  # fmt: skip
# ops that nothing is known of
CASES |= {
    "custom": (lambda w, x: torch.ops.usage.lin(x, w), (7, 6), PRODUCT, None, (1, 7)),
    "bilinear": (lambda w, x: F.bilinear(x, x, w), (7, 6, 6), PRODUCT, None, (1, 7)),
    "cdist": (lambda w, x: torch.cdist(x, w, p=1.0), (7, 6), PRODUCT, None, (1, 7)),
    "solve": (lambda w, x: torch.linalg.solve(w, x.T), (6, 6), PRODUCT, None, (1, 6)),
    "spectra": (
        lambda w, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(w)), (5, 6), PRODUCT, None, (1, 5),
    ),
    "complex pairs": (
        lambda w, x: (x + 0j) @ torch.view_as_complex(w), (6, 7, 2), CONTRACTION, 0, (1, 6),
    ),
    "attention, queries": (
        lambda w, x: F.scaled_dot_product_attention(w[None] + 0, x, x), (3, 5, 4), CONTRACTION, 2, (3, 5), HEADS,
    ),
}  # fmt: skip


def put(w):
    made = torch.zeros(6, 7)
    made[2:, :] = w[2:, :]
    return made


@pytest.mark.parametrize("case", CASES)
def test_axis_and_factors(case):
    function, shape, kind, axis, factors, *data = CASES[case]
    first = next(use for use in sorted(uses(function, shape, *(data or [X])), key=lambda use: not use.is_product))
    assert (first.kind, first.axis, (first.groups, first.rows)) == (kind, axis, factors)


def test_every_use_is_seen():
    def twice(w, x):
        return F.linear(F.embedding(x.abs().long().clamp(max=6), w).sum(1), w)

    assert [use.kind for use in uses(twice, (7, 6), X)] == [EMBEDDING, CONTRACTION]


def test_checkpointed_uses_are_seen():
    from torch.utils.checkpoint import checkpoint

    def block(w, x):
        return checkpoint(lambda x, w: F.linear(x, w).relu(), x, w, use_reentrant=False)

    assert [(use.kind, use.axis) for use in uses(block, (7, 6), X)] == [(CONTRACTION, 1)]


LEFT_ALONE = {
    "bias": (lambda w, x: x + w, (5, 6), "added to activations by add"),
    "in place": (lambda w, x: x.clone().add_(w), (5, 6), "added to activations by add"),
    "scale": (lambda w, x: x * w, (5, 6), "a factor of activations, elementwise by mul"),
    "scale of positions, then a product": (
        lambda w, x: torch.stack([x, x]) * w @ torch.ones(6, 3), (5, 6), "a factor of activations, elementwise by mul",
    ),
    "gain of queries": (
        lambda w, x: (x * w) @ x.transpose(-1, -2), (1, 3, 1, 4), "a factor of activations, elementwise by mul", HEADS,
    ),
    "decay": (lambda w, x: (x[..., None] * -w.exp()).exp().sum(-1), (6, 4), "a factor of activations"),
    "bias of noise": (lambda w, x: x @ (torch.randn(9, 5, 6) + w).mT, (5, 6), "added to activations by add"),
    "scale of noise": (lambda w, x: x * (w * torch.randn(9, 1, 1)), (5, 6), "a factor of activations"),
    "bias of noisy data": (lambda w, x: (x + torch.randn_like(x) + w) @ x.T, (5, 6), "added to activations by add"),
    "class token": (lambda w, x: torch.cat([w.expand(5, -1), x]) @ x.T, (1, 6), "placed among activations by cat"),
    "mask token": (lambda w, x: torch.where(x > 0, x, w), (1, 6), "placed among activations by where"),
    "bias of scores": (
        lambda w, x: F.scaled_dot_product_attention(x, x, x, attn_mask=w[:, :, None].expand(3, 5, 5)[None]), (3, 5),
        "added to activations", HEADS,
    ),
    "table of rows": (lambda w, x: w[x[:, 0].long().clamp(0, 6)] @ x.T, (7, 6), "looked up by index by index"),
    "position table": (lambda w, x: F.embedding(torch.arange(5), w) + x, (7, 6), "embedding"),
    "gain of a direction": (
        lambda w, x: F.linear(x, torch._weight_norm(MATRIX + 0, w, 0)), (7, 1), "a scale of another weight",
    ),
}  # fmt: skip
MATRIX = torch.randn(7, 6)


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_meets_no_product_says_why(case):
    function, shape, reason, *data = LEFT_ALONE[case]
    assert reason in why_not_of(uses(function, shape, *(data or [X])))


def test_of_a_product_of_weights_each_is_blocked_along_its_own_sum():
    """As merged adapters are: x @ (B @ A).T, B [out, rank], A [rank, in]; and layers that see parameters alone."""
    b, a = nn.Parameter(torch.randn(7, 2)), nn.Parameter(torch.randn(2, 6))
    for which, other in ((b, a), (a, b)):
        found = of_parameters(lambda x: F.linear(x, b @ a), which, other, X)
        assert next(use.axis for use in found if use.axis is not None) == 1
        assert {use.kind for use in found} == {CONTRACTION, INNER}
    queries, weight = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(4, 6))
    found = of_parameters(lambda x: F.linear(queries, weight) @ x[:, :4].T, weight, queries, X)
    assert found[0].axis == 1


def test_of_a_distribution_of_weights_the_mean_is_quantized():
    mean, deviation = nn.Parameter(torch.randn(7, 6)), nn.Parameter(torch.randn(7, 6))

    def sampled(x):
        return F.linear(x, mean + F.softplus(deviation) * torch.randn_like(mean))

    assert [use.kind for use in of_parameters(sampled, mean, deviation, X)] == [CONTRACTION]
    found = of_parameters(sampled, deviation, mean, X)
    assert why_not_of(found) == "reaches no contraction: the scale of noise on another weight by add"


def test_a_weight_with_connections_dropped_is_no_scale_of_noise():
    kept, dropped = nn.Parameter(torch.randn(7, 6)), nn.Parameter(torch.randn(7, 6))
    for mask in (lambda w: torch.rand_like(w) > 0.5, lambda w: F.dropout(torch.ones_like(w))):
        found = of_parameters(lambda x, mask=mask: F.linear(x, kept + dropped * mask(dropped)), dropped, kept, X)
        assert [use.kind for use in found] == [CONTRACTION]


def test_a_power_iteration_fixes_no_axis():
    w = nn.Parameter(torch.randn(6, 7))
    found = of_parameters(lambda x: x @ (w / (w @ torch.ones(7)).norm()), w, w, X)
    assert (found[0].kind, found[0].axis) == (CONTRACTION, 0)
    assert {use.kind for use in found[1:]} == {INNER}


def of_parameters(function, which, other, x):
    """The uses of one of two parameters of a function of data."""
    found = []

    def look(gm, inputs):
        weights = [i for i, each in enumerate(inputs) if isinstance(each, nn.Parameter)]
        (index,) = [i for i in weights if inputs[i] is which]
        found.extend(weight_uses(gm, inputs, weights)[index])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=look, fullgraph=True)(x)
    return found


def test_branches_are_walked_and_other_regions_are_products():
    from torch._higher_order_ops.scan import scan

    def branched(w, x):
        return torch.cond(x.sum() > 0, lambda x: F.linear(x, w), lambda x: x @ w.T, (x,))

    found = uses(branched, (7, 6), X)
    assert {(use.kind, use.axis) for use in found} == {(CONTRACTION, 1)}

    def scanned(w, x):
        return scan(lambda h, step: ((h @ w).tanh() + step, h.clone()), x[0], x[1:])[1]

    assert {use.kind for use in uses(scanned, (6, 6), X)} == {PRODUCT}


def test_buffers_are_constants():
    """A mask that is a buffer is no data: the weight under it is the layer's operand and no scale of activations."""
    layer = nn.utils.parametrize.register_parametrization(nn.Linear(6, 7), "weight", Masked())
    found = []

    def look(gm, inputs):
        index = next(i for i, each in enumerate(inputs) if isinstance(each, nn.Parameter) and each.dim() == 2)
        found.extend(weight_uses(gm, inputs, [index])[index])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(layer, backend=look)(X)
    assert [(use.kind, use.op, use.axis) for use in found] == [(CONTRACTION, "addmm", 1)]


def test_a_model_without_inputs_has_its_data_in_buffers():
    """One that holds all that it trains on; where data come in, a buffer that rotates a weight is none."""

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("x", torch.randn(9, 6))
            self.first, self.second = nn.Linear(6, 7, bias=False), nn.Linear(7, 3, bias=False)

        def forward(self):
            return self.second(self.first(self.x).relu())

    found = []

    def look(gm, inputs):
        weights = [i for i, each in enumerate(inputs) if isinstance(each, nn.Parameter)]
        found.extend(use for each in weight_uses(gm, inputs, weights).values() for use in each)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Holds(), backend=look)()
    assert [(use.kind, use.axis) for use in found] == [(CONTRACTION, 1)] * 2


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(7, 6).triu())

    def forward(self, weight):
        return self.mask * weight


def test_no_use_is_said_so():
    assert why_not_of([]) == "reaches no contraction: unused"
