"""Weights met in ways of their own: other ops than a matrix product, control flow, precisions, borrowed weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo_entry import Inputs, normal


class Solved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(16) + torch.randn(16, 16) / 20)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.weight, x.T).T


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(16, 20, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x, y)


class Einsum(nn.Module):
    """A weight of heads, both ways round."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(16, 2, 12) / 4), nn.Parameter(torch.randn(2, 12, 16) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("blhk,hkd->bld", torch.einsum("bld,dhk->blhk", x, self.up).relu(), self.down)


class Distances(nn.Module):
    """Prototypes, by distances."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(6, 16))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(x, self.prototypes)


class FourierConvolution(nn.Module):
    """A kernel as long as the signal, multiplied in the frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.mix = nn.Parameter(torch.randn(8, 16) / 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        product = torch.fft.rfft(x, n=32) * torch.fft.rfft(self.kernel, n=32)
        return self.mix(torch.fft.irfft(product, n=32)[..., :16].mT)


class ComplexLinear(nn.Module):
    """A complex weight beside a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(16, 16, dtype=torch.complex64) / 6), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x.to(torch.complex64) @ self.weight).abs())


@torch.library.custom_op("zoo::scaled_product", mutates_args=())
def scaled_product(x: Tensor, w: Tensor) -> Tensor:
    return 0.5 * x @ w.T


scaled_product.register_fake(lambda x, w: x.new_empty(x.shape[0], w.shape[0]))


scaled_product.register_autograd(
    lambda ctx, grad: (0.5 * grad @ ctx.saved_tensors[1], 0.5 * grad.T @ ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class CustomOp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(20, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(scaled_product(x, self.layer.weight).relu())


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grads[0] @ w, grads[0].T @ x


class OwnFunction(nn.Module):
    """An autograd function of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.layer.weight)


class Conditional(nn.Module):
    """Both branches of `torch.cond` hold a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,)))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class GraphBreak(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)


class DataDependent(nn.Module):
    """Python asks a tensor which way to go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.second(x) if x.sum().item() > 0 else self.third(x)


class Borrowed(nn.Module):
    """A function reads another module's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).relu(), self.other.weight)


@torch.compiler.disable
def product_outside(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


class BorrowedOutside(Borrowed):
    """The same where no compiler looks."""

    def forward(self, x: Tensor) -> Tensor:
        return product_outside(self.first(x).relu(), self.other.weight)


class Scripted(nn.Module):
    """A part is TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.out = torch.jit.script(nn.Linear(16, 16)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.part(x).relu())


class HalfPrecision(nn.Module):
    """Weights in bfloat16, norms in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32).bfloat16(), nn.Linear(32, 4).bfloat16()
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x.bfloat16()).float()).bfloat16())


class Autocast(nn.Module):
    """Products in bfloat16 of weights in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.second(self.first(x).relu()).float()


class Vmapped(nn.Module):
    """An ensemble by `torch.vmap` over stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 16, 20) / 4), nn.Parameter(torch.zeros(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(F.linear, (None, 0, 0))(x, self.weight, self.bias)


_ROWS, _SIXTEEN = normal((8, 20)), normal((8, 16))

MODELS: dict[type[nn.Module], Inputs] = {
    Bilinear: normal((8, 16), (8, 20)),
    Einsum: normal((2, 5, 16)),
    FourierConvolution: normal((2, 8, 16)),
    **dict.fromkeys((CustomOp, OwnFunction, Vmapped), _ROWS),
    **dict.fromkeys((Solved, Distances, ComplexLinear), _SIXTEEN),
    **dict.fromkeys((Conditional, Checkpointed, GraphBreak, DataDependent, Borrowed, BorrowedOutside), _SIXTEEN),
    **dict.fromkeys((Scripted, HalfPrecision, Autocast), _SIXTEEN),
}
