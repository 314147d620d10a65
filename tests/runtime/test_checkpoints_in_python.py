"""Activation checkpoints that Python runs within a model's forward compute again what they computed, at those values.

Broken once and seen red: parts that are compiled calls of their own in the backward pass, weights that nothing stands
in for there.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lotion_fx


class Block(nn.Module):
    def __init__(self, is_broken):
        super().__init__()
        self.up, self.down, self.is_broken = nn.Linear(8, 12), nn.Linear(12, 8), is_broken

    def forward(self, x):
        hidden = torch.tanh(self.up(x))
        if self.is_broken:
            torch._dynamo.graph_break()
        return x + self.down(hidden)


class Checkpointed(nn.Module):
    """How: 'no', 'sequential', 'broken', 'in Python', 'by weights'; the last reads weights in a function of its own."""

    def __init__(self, how, reentrant):
        super().__init__()
        self.how, self.reentrant = how, reentrant
        self.blocks = nn.Sequential(*(Block(how == "broken") for _ in range(2)))
        self.head = nn.Linear(8, 4)

    @torch.compiler.disable
    def in_python(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x

    @torch.compiler.disable
    def by_weights(self, x):
        def run(block, x):
            hidden = torch.tanh(F.linear(x, block.up.weight, block.up.bias))
            return x + F.linear(hidden, block.down.weight, block.down.bias)

        for block in self.blocks:
            x = checkpoint(run, block, x, use_reentrant=self.reentrant)
        return x

    def forward(self, x):
        if self.how == "sequential":
            x = checkpoint_sequential(self.blocks, 2, x, use_reentrant=self.reentrant)
        elif self.how == "broken":
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        elif self.how == "no":
            x = self.blocks(x)
        else:
            x = self.in_python(x) if self.how == "in Python" else self.by_weights(x)
        return self.head(x)


def model(how, reentrant=False, is_rounded=False):
    torch.manual_seed(0)
    made = Checkpointed(how, reentrant)
    if is_rounded:
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(lotion_fx.rounding.rtn(parameter, lotion_fx.resolve("int2")))
    return made


def gradients(of, passes):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(passes):
        of.zero_grad()
        of(x.clone().requires_grad_()).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in of.parameters()])


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
@pytest.mark.parametrize("method", ["ste", "ptq", "lotion"])
@pytest.mark.parametrize(
    ("how", "reentrant"),
    [(how, False) for how in ("sequential", "broken", "in Python", "by weights")]
    + [(how, True) for how in ("sequential", "broken", "in Python")],
)
def test_what_is_computed_again_is_what_it_was(how, reentrant, method, inner):
    torch.compiler.reset()
    options = {"calibrate": False} if method == "lotion" else {}
    made = lotion_fx.transform(model(how, reentrant), "int2", method=method, inner=inner, **options)
    found = gradients(made, 3)
    torch.testing.assert_close(found, gradients(model("no", is_rounded=method == "ste"), 1), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_around_the_call_of_a_model_is_its_trainer_s():
    made = lotion_fx.transform(model("no"), "int2", method="ste", inner="aot_eager")
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        made.zero_grad()
        checkpoint(made, x.clone().requires_grad_(), use_reentrant=False).square().sum().backward()
    found = torch.cat([p.grad.flatten() for p in made.parameters()])
    torch.testing.assert_close(found, gradients(model("no", is_rounded=True), 1), rtol=1e-5, atol=1e-5)
