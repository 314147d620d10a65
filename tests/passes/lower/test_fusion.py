"""The forms that a GPU's kernels take of the curvature's sums give the same numbers as the plain ones."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lotion_fx
from lotion_fx.kernels.emit.emitted import Block
from lotion_fx.passes.lower import fusion
from lotion_fx.state import registry
from tests.models import LM, ids, lm_loss


@pytest.fixture
def as_on_gpu(monkeypatch):
    """On, the pass takes a CPU's graphs for a GPU's; sizes of a test then are large enough for every form."""
    calls = []

    fused = fusion.fuse

    def fuse(graph, vectors):
        calls.append(len(vectors))
        fused(graph, vectors)

    def set_to(on, both_ways=False):
        monkeypatch.setattr(fusion, "on_gpu", lambda node: on)
        monkeypatch.setattr(fusion, "_reduced_both_ways", lambda matrix: both_ways)
        monkeypatch.setattr(fusion, "fuse", fuse)
        monkeypatch.setattr(fusion, "RESULTS", 100)
        monkeypatch.setattr(fusion, "POSITIONS", 4)
        torch._dynamo.reset()
        return calls

    return set_to


def probes(model, run):
    model.zero_grad()
    run(model)
    weights = {name: registry[parameter] for name, parameter in model.named_parameters()}
    return {
        name: weight.gathered.probe.grad.clone()
        for name, weight in weights.items()
        if weight and weight.gathered.probe is not None
    }


def block_run(model):
    x = torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    model(x).square().sum().backward()


def flat_run(model):
    model(torch.randn(96, 20, generator=torch.Generator().manual_seed(1))).square().sum().backward()


class Heads(nn.Module):
    """Two layers of one input, whose last op broadcasts."""

    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Linear(20, 40), nn.Parameter(torch.linspace(1, 2, 40))
        self.heads = nn.ModuleList([nn.Linear(40, 7), nn.Linear(40, 40)])

    def forward(self, x):
        h = self.scale * self.first(x).sigmoid()
        return torch.cat([head(h) for head in self.heads], 1)


class Checkpointed(nn.Module):
    """Two blocks that are run again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(32, 2), Block(32, 2)])

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def bf16_run(model):
    with torch.autocast("cpu", torch.bfloat16):
        block_run(model)


CASES = {
    "block": (lambda: Block(32, 2), block_run),
    "block in bf16": (lambda: Block(32, 2), bf16_run),
    "language model": (LM, lambda model: lm_loss(model, ids(8, 20)).backward()),
    "tied": (lambda: LM(tied=True), lambda model: lm_loss(model, ids(8, 20)).backward()),
    "flat positions": (lambda: nn.Sequential(nn.Linear(20, 40), nn.GELU(), nn.Linear(40, 7)), flat_run),
    "gradients that no loop makes": (lambda: nn.Sequential(*(nn.Linear(n, 40) for n in (20, 40, 40))), flat_run),
    "two layers of one input": (Heads, flat_run),
    "checkpointed": (Checkpointed, block_run),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)),
        lambda model: model(torch.ones(4, 3, 8, 8)).square().sum().backward(),
    ),
}


@pytest.mark.parametrize(
    ("case", "kind", "both_ways"),
    [*((case, "factored", False) for case in CASES), ("block", "factored", True), ("block", "full", False)],
)
def test_the_vectors_are_those_of_the_plain_form(as_on_gpu, case, kind, both_ways):
    build, run = CASES[case]
    found = []
    for on in (False, True):
        calls = as_on_gpu(on, both_ways)
        torch.manual_seed(0)
        model = lotion_fx.transform(build(), "int4", curvature=kind, inner="aot_eager")
        found.append(probes(model, run))
    plain, fused = found
    assert (sum(calls) > 0) == (kind == "factored") and plain.keys() == fused.keys()
    for name, vector in plain.items():
        torch.testing.assert_close(
            fused[name], vector, rtol=2e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
