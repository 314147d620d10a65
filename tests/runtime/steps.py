"""One optimizer step under watch, and what the term adds to it by the formula."""

import torch
from torch import nn

import lotion_fx


def inputs_and_gradients(model, loss):
    """Every Linear's input x [N, in] and output gradient g [N, out], float64, by hooks."""
    seen = {}

    def forward(module, args, output):
        seen[module] = [args[0].detach().flatten(0, -2).double()]
        output.register_hook(lambda grad: seen[module].append(grad.detach().flatten(0, -2).double()))

    handles = [m.register_forward_hook(forward) for m in model.modules() if isinstance(m, nn.Linear)]
    loss(model).backward()
    for handle in handles:
        handle.remove()
    return seen


def curvature(x, g, kind, terms):
    """h of MATH: T * contraction of squares, or its factored form."""
    if kind == "full":
        return terms * g.square().T @ x.square()
    return terms / len(x) * g.square().sum(0)[:, None] * x.square().sum(0)


def term_gradient(weight, h, fmt):
    """d/dw 1/2 sum h sigma^2 by autograd in float64, scale included."""
    fmt = lotion_fx.resolve(fmt)
    w = weight.detach().double().requires_grad_()
    blocks = (
        w.unflatten(1, (-1, fmt.block)) if isinstance(fmt.block, int) and w.shape[1] % fmt.block == 0 else w[:, None]
    )
    scale = blocks.abs().amax(-1, keepdim=True) / fmt.grid.max
    z = (blocks / scale).detach().float()
    lo, hi = (level.double() for level in fmt.grid.neighbours(z))
    sigma2 = ((blocks - scale * lo) * (scale * hi - blocks)).reshape(w.shape)
    return torch.autograd.grad(0.5 * (h * sigma2).sum(), w)[0]


def one_step(model, optimizer, loss):
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


class Recorder(torch.optim.SGD):
    """An optimizer that changes nothing and keeps the gradients it was given."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)
        self.register_step_pre_hook(self.record)
        self.model = model

    def record(self, *_):
        self.given = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
