"""Whether the trace of a loss computes what the model does: what it cannot follow is refused, draws are the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.loss_graph import loss_graph


class Between(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.between = nn.Linear(16, 16), nn.Linear(16, 4), between

    def forward(self, x):
        return self.b(self.between(self.a, torch.relu(self.a(x))))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 16, generator=generator), torch.arange(32) % 4


def clamped(layer, h):
    h = h * 1.0
    h.data.clamp_(-0.2, 0.2)
    return h


def slope(layer, h):
    with torch.enable_grad():
        z = h if h.requires_grad else h.detach().requires_grad_()
        return torch.autograd.grad(torch.tanh(layer(z)).sum(), z, create_graph=True)[0]


UNSEEN = {
    "vmap": lambda layer, h: torch.vmap(layer)(h),
    "func.grad": lambda layer, h: torch.func.grad(lambda z: layer(z).square().sum())(h),
    "func.jvp": lambda layer, h: torch.func.jvp(layer, (h,), (h,))[1],
    "vmap of jacrev": lambda layer, h: h + torch.vmap(torch.func.jacrev(lambda z: layer(z).tanh()))(h).sum(1),
    "autograd.grad": slope,
    "weight.data": lambda layer, h: F.linear(h, layer.weight.data),
    "a write into data": clamped,
    "item": lambda layer, h: h * (1 + h.detach().mean().item()),
    "tolist": lambda layer, h: h * (1 + sum(h.detach().mean(1).tolist())),
    "numpy": lambda layer, h: h + torch.from_numpy(layer.weight.detach().numpy().mean(0)),
    "torch.tensor": lambda layer, h: h * torch.tensor(1 + float(layer.weight.abs().max())),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func.jvp's own
@pytest.mark.parametrize("between", UNSEEN.values(), ids=UNSEEN)
def test_what_no_trace_follows_is_refused(between):
    """Each was rounded to nearest, and its loss told as it is at other weights."""
    with pytest.raises(ValueError, match="^model: .*compute them by tensors"):
        loss_graph(Between(between), batch(), F.cross_entropy)


def index(layer, h):
    rows = (h.sum(1) > h.sum(1).median()).nonzero()[:, 0]
    return h.index_add(0, rows, layer(h[rows]))


class Calls:
    """A number of Python's own, which changes from call to call."""

    def __init__(self):
        self.made = 0

    def __call__(self, layer, h):
        self.made += 1
        return layer(h) * (1 + 0.1 * self.made)


SEEN = {
    "rows that are chosen": index,
    "a branch": lambda layer, h: layer(h) if layer.weight.sum() > -100 else h,
    "a logged number": lambda layer, h: h + 0 * len(str(h.mean().item())),
    "a detached weight": lambda layer, h: F.linear(h, layer.weight.detach()),
    "attention": lambda layer, h: F.scaled_dot_product_attention(h[None], layer(h)[None], h[None])[0],
    "calls counted": Calls(),
}


@pytest.mark.parametrize("between", SEEN.values(), ids=SEEN)
def test_what_a_trace_follows_is_not_refused(between):
    model, (x, y) = Between(between), batch()
    graph = loss_graph(model, (x, y), F.cross_entropy)
    if not isinstance(between, Calls):
        near = {name: p.detach() * 1.0001 for name, p in model.named_parameters()}
        wanted = F.cross_entropy(torch.func.functional_call(model, near, (x,)), y)
        torch.testing.assert_close(graph.loss(near), wanted)


def test_parts_that_torch_compile_wraps_are_followed():
    """Their weights have another name, and were left out."""
    found = []
    for wraps in (False, True):
        torch._dynamo.reset()
        model = Between(lambda layer, h: h)
        model.a = torch.compile(model.a, backend="eager") if wraps else model.a
        lotion_fx.transform(model, "int2/tensor", inner="eager")
        found.append(lotion_fx.round_(model, [batch()], F.cross_entropy, method="nearest"))
        assert not [row.name for row in found[-1].weights if "depend" in row.why]
    assert found[0].nearest == found[1].nearest and found[0].rounded == found[1].rounded


@pytest.mark.filterwarnings("ignore:model. its forward draws")
def test_losses_at_random_are_compared_at_one_draw():
    """Noise was drawn anew in each evaluation: increases were of it, and methods were chosen by it."""
    model = lotion_fx.transform(Between(lambda layer, h: h + torch.randn_like(h)), "int8", inner="eager")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    found = lotion_fx.expected_loss(model, batch(), F.cross_entropy, samples=8, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(float((found.total - found.loss).detach())) < 1e-3 and abs(found.rtn - float(found.loss.detach())) < 1e-2
    torch.manual_seed(8)
    assert lotion_fx.expected_loss(model, batch(), F.cross_entropy, samples=8).loss == found.loss


def test_a_draw_is_told():
    with pytest.warns(UserWarning, match="one draw"):
        loss_graph(Between(lambda layer, h: h + torch.randn_like(h)), batch(), F.cross_entropy)


def test_branches_of_cond():
    """A branch is a graph among a graph's constants: an AttributeError."""

    def between(layer, h):
        return torch.cond(h.sum() > 0, lambda z: layer(z), lambda z: layer(z) * 2, (h,))

    model = lotion_fx.transform(Between(between), "int2/tensor", inner="eager")
    found = lotion_fx.round_(model, [batch()], F.cross_entropy, method="nearest")
    x, y = batch()
    with torch.no_grad():
        assert found.rounded == pytest.approx(float(F.cross_entropy(model.eval()(x), y)), rel=1e-5)
