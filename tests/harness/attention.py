"""CUDA's memory-efficient attention on CPU tensors, for emitted wrappers that call it: importing this registers it.

    out = P v,  P = softmax(scale q k^T + mask);     dS = P (dP - sum_k dP P),  dP = dout v^T

Shapes are [batch, heads, length, width]; results lie in memory as [batch, length, heads, width], as CUDA's do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def _scores(q: Tensor, k: Tensor, is_causal: bool, scale: float) -> Tensor:
    scores = scale * (q @ k.mT)
    if not is_causal:
        return scores
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)


def _as_cuda(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: None,
    compute_log_sumexp: bool,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``aten._scaled_dot_product_efficient_attention``: output, log-sum-exp padded to 32 rows, and an unused seed."""
    scores = _scores(q, k, is_causal, scale or q.shape[-1] ** -0.5)
    padded = torch.nn.functional.pad(scores.logsumexp(-1), (0, -q.shape[-2] % 32), value=math.inf)
    seed, offset = (torch.zeros((), dtype=torch.int64) for _ in range(2))
    return _as_cuda(scores.softmax(-1) @ v), padded, seed, offset


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: None,
    out: Tensor,
    log_sumexp: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout: float,
    wanted: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """``aten._scaled_dot_product_efficient_attention_backward``: the gradients of q, k and v."""
    scale = scale or q.shape[-1] ** -0.5
    p = (_scores(q, k, is_causal, scale) - log_sumexp[..., : q.shape[-2], None]).exp()
    by_p = grad @ v.mT
    by_scores = scale * p * (by_p - (by_p * p).sum(-1, keepdim=True))
    return _as_cuda(by_scores @ k), _as_cuda(by_scores.mT @ q), _as_cuda(p.mT @ grad), None


LIBRARY = torch.library.Library("aten", "IMPL", "CPU")
LIBRARY.impl("_scaled_dot_product_efficient_attention", forward)
LIBRARY.impl("_scaled_dot_product_efficient_attention_backward", backward)
