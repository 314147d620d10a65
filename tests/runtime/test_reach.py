"""Models in which a weight reaches a product by a way of its own: what is quantized, how, and what eval() computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import lotion_fx
from lotion_fx import rounding

FORMAT = lotion_fx.resolve("nvfp4")


class Made(nn.Module):
    """A parameter, a buffer and layers, and what they make of an input."""

    def __init__(self, forward, shape=(24, 32), **modules):
        super().__init__()
        self.w, self.body = nn.Parameter(torch.randn(shape) * 0.3), forward
        self.register_buffer("mask", torch.ones(24, 32).tril())
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.body(self, x)


def fused(m, x):
    return F.linear(x, torch.cat([m.q.weight, m.k.weight, m.w]))


def modulated(m, x):
    x = x.view(4, 8, 4)
    kernels = m.w[None] * m.style(x.mean(-1)).view(4, 1, 8, 1)
    return F.conv1d(x.reshape(1, 32, 4), kernels.flatten(0, 1), groups=4).view(4, -1)


def spectral(m, x):
    y = torch.fft.rfft(x.view(4, 4, 8))
    return torch.fft.irfft(torch.einsum("bim,iom->bom", y, torch.view_as_complex(m.w)), n=8).flatten(1)


def branches(m, x):
    return torch.cond(x.sum() > 0, lambda x: m.a(x), lambda x: m.b(x), (x,))


# the model, then of each quantized parameter the estimator and the block axis
MODELS = {
    "fused by cat": (
        lambda: Made(fused, q=nn.Linear(32, 8), k=nn.Linear(32, 8)),
        {"w": ("analytic", 1), "q.weight": ("analytic", 1), "k.weight": ("analytic", 1)},
    ),
    "mask in a buffer": (lambda: Made(lambda m, x: F.linear(x, m.mask * m.w)), {"w": ("analytic", 1)}),
    "symmetric": (
        lambda: Made(lambda m, x: x @ (m.w.triu() + m.w.triu(1).T), (32, 32)), {"w": ("analytic", 1)},
    ),
    "padded": (lambda: Made(lambda m, x: x @ F.pad(m.w, (4, 4, 4, 4)), (24, 24)), {"w": ("analytic", 0)}),
    "matrix_exp": (lambda: Made(lambda m, x: x @ torch.matrix_exp(m.w - m.w.T), (32, 32)), {"w": ("fisher", 1)}),
    "by hand": (lambda: Made(lambda m, x: (x.unsqueeze(-2) * m.w).sum(-1)), {"w": ("analytic", 1)}),
    "modulated": (
        lambda: Made(modulated, (12, 8, 3), style=nn.Linear(8, 8)),
        {"w": ("analytic", 1), "style.weight": ("analytic", 1)},
    ),
    "bilinear": (
        lambda: Made(lambda m, x: m.b(x, x[:, :16]) * m.w.sum(), (1, 32), b=nn.Bilinear(32, 16, 24)),
        {"b.weight": ("fisher", 2)},
    ),
    "solve": (
        lambda: Made(lambda m, x: torch.linalg.solve(m.w + 9 * torch.eye(32), x.T).T, (32, 32)), {"w": ("fisher", 1)},
    ),
    "pairs of reals": (lambda: Made(spectral, (4, 6, 5, 2)), {"w": ("fisher", 0)}),
    "branches": (
        lambda: Made(branches, (1, 1, 32), a=nn.Linear(32, 32), b=nn.Linear(32, 32)),
        {"a.weight": ("fisher", 1), "b.weight": ("fisher", 1)},
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(32, 24), "weight", 0.3), {"weight_orig": ("fisher", 1)},
    ),
    "spectral norm": (
        lambda: spectral_norm(nn.Linear(32, 24)), {"parametrizations.weight.original": ("fisher", 1)},
    ),
    "weight norm": (lambda: weight_norm(nn.Linear(32, 24)), {"parametrizations.weight.original1": ("fisher", 1)}),
    "orthogonal": (lambda: orthogonal(nn.Linear(32, 32)), {"parametrizations.weight.original": ("fisher", 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_what_reaches_a_product_is_quantized_along_its_sum(name):
    make, expected = MODELS[name]
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    plain, x = make(), torch.randn(4, 32)  # `prune` leaves a module that has no copies
    lotion_fx.transform(model, FORMAT, inner="aot_eager")
    for each in (model, plain):
        torch.manual_seed(1)
        each(x).square().mean().backward()
    for (key, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, other)]
        torch.testing.assert_close(*grads, msg=key)
    torch.optim.SGD(model.parameters(), 0.0).step()
    rows = lotion_fx.report(model).rows
    assert {row.name: (row.estimator, row.block_axis) for row in rows if row.format} == expected
    assert all(row.reason for row in rows if row.estimator != "analytic")
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for key, (_, axis) in expected.items():
            weight = plain.get_parameter(key)
            weight.copy_(rounding.rtn(weight, FORMAT, axis))
        assert torch.equal(model.eval()(x), plain.eval()(x))


def test_a_complex_weight_is_left_alone_and_says_so():
    torch._dynamo.reset()
    model = Made(lambda m, x: m.a(x) @ m.z.real, a=nn.Linear(32, 16))
    model.z = nn.Parameter(torch.randn(16, 8, dtype=torch.cfloat))
    lotion_fx.transform(model, FORMAT, inner="aot_eager")
    model(torch.randn(4, 32)).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    rows = {row.name: row for row in lotion_fx.report(model).rows}
    assert rows["a.weight"].format and rows["z"].format is None and rows["z"].reason.startswith("complex")
    other = nn.ParameterDict({"z": nn.Parameter(torch.randn(16, 8, dtype=torch.cfloat))})
    with pytest.raises(TypeError, match=r"'z' is torch.complex64, expected real .*view_as_complex"):
        lotion_fx.transform(other, FORMAT, only={"z": "int4"})


class Leaves(nn.Module):
    """Two parameters that one graph hands to the next as they are, past a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 32))
        self.position_embeddings = nn.Parameter(torch.randn(4, 32))
        self.out = nn.Linear(16, 8)

    def forward(self, x):
        table, position = self.table * 1.0, self.position_embeddings[None]
        torch._dynamo.graph_break()
        return self.out((x + position[0]) @ table.T)


def test_a_weight_that_leaves_its_graph_is_not_unused():
    torch.compiler.reset()
    model, x = Leaves(), torch.randn(4, 32)
    by_hand = Leaves()
    by_hand.load_state_dict(model.state_dict())
    lotion_fx.transform(model, "int4", inner="aot_eager")
    model(x).square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=0.0).step()
    report = lotion_fx.report(model)
    assert report["table"].estimator == "fisher" and report["out.weight"].estimator == "analytic"
    assert report["position_embeddings"].format is None and "position" in report["position_embeddings"].reason
    with torch.no_grad():
        for name in ("table", "out.weight"):
            weight = by_hand.get_parameter(name)
            weight.copy_(lotion_fx.rounding.rtn(weight, lotion_fx.resolve("int4"), report[name].block_axis))
    assert torch.equal(model.eval()(x), by_hand(x))
