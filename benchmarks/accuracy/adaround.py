"""AdaRound: which of its two neighbours each weight is rounded to, learned layer by layer.

Source: Nagel, Amjad, van Baalen, Louizos, Blankevoort, "Up or Down? Adaptive Rounding for Post-Training Quantization",
ICML 2020, arXiv 2004.10568: equations 21 to 24, with the layers before already rounded (equation 25) and no activation
in the objective. Its settings, but for the iterations, which see all rows at once here by their second moments, and not
32 images; and for the regularizer, which is in units of the error of rounding to nearest: in the paper's, on layers
whose outputs are of another size, it does nothing or everything.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

import lotion_fx
from lotion_fx.numerics import rounding

ITERATIONS, RATE = 1000, 1e-2
WEIGHT, WARM_UP, SHARP = 3.0, 0.2, (20.0, 2.0)
"""Of the regularizer, the best of .03 to 10 on random layers; the iterations without it; and how beta falls."""
ZETA, GAMMA = 1.1, -0.1


def adaround(model: nn.Module, inputs: Iterable[Tensor], formats: Mapping[str, lotion_fx.Format]) -> None:
    """Rounds linear layers' weights in place, in the order in which they run.

    Args:
        model: in ``eval()``, with weights as they were trained.
        inputs: of the model, one a batch.
        formats: of each weight to round, by name; blocks run along the last dimension.
    """
    given, plain = list(inputs), copy.deepcopy(model)
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in formats}
    if strangers := [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]:
        raise ValueError(f"formats: {strangers[0]!r} is no linear layer's weight")
    order = _in_order(model, layers, given)
    if idle := layers.keys() - order:
        raise ValueError(f"inputs: {min(idle)!r} is not used by the first of them")
    for name in order:
        before, after = plain.get_submodule(name.removesuffix(".weight")), layers[name]
        gram, cross = _moments(_seen(plain, before, given), _seen(model, after, given))
        w = after.weight.detach()
        after.weight.data.copy_(learned(w, formats[name], gram, w @ cross))


def learned(w: Tensor, fmt: lotion_fx.Format, gram: Tensor, cross: Tensor) -> Tensor:
    """The rounded weight whose outputs are nearest.

    Args:
        w: [rows, columns].
        gram, cross: means over positions of ``x x^T`` [columns, columns] and ``y x^T`` [rows, columns], with the
            inputs x and the outputs wanted y, biases taken out.
    """
    (low, high), (_, up) = rounding.outcomes(w, fmt, -1)
    nearest = torch.where(up > 0.5, high, low) - w
    weight = WEIGHT * ((nearest @ gram) * nearest).sum() / w.numel()
    logit = _logit(up).requires_grad_(True)
    optimizer = torch.optim.Adam([logit], lr=RATE)
    for step in range(ITERATIONS):
        share = _share(logit)
        rounded = low + share * (high - low)
        loss = ((rounded @ gram - 2 * cross) * rounded).sum()
        if (after := step / ITERATIONS - WARM_UP) >= 0:
            begin, end = SHARP
            beta = end + 0.5 * (begin - end) * (1 + math.cos(math.pi * after / (1 - WARM_UP)))
            loss = loss + weight * (1 - (2 * share - 1).abs().pow(beta)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.where(_share(logit.detach()) > 0.5, high, low).to(w.dtype)


def _share(logit: Tensor) -> Tensor:
    """The rectified sigmoid, equation 23: how far a weight is from the lower neighbour, 0 to 1."""
    return (logit.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _logit(share: Tensor) -> Tensor:
    return ((share - GAMMA) / (ZETA - GAMMA)).logit()


@torch.no_grad()
def _moments(before: Iterable[Tensor], after: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Means over positions of ``x x^T`` and ``x' x^T``: a layer's inputs x, and x' as they were before rounding."""
    gram, cross, count = 0.0, 0.0, 0
    for was, x in zip(before, after, strict=True):
        gram, cross, count = gram + x.T @ x, cross + was.T @ x, count + len(x)
    return torch.as_tensor(gram) / count, torch.as_tensor(cross) / count


@torch.no_grad()
def _seen(model: nn.Module, layer: nn.Linear, inputs: Iterable[Tensor]) -> list[Tensor]:
    """A layer's inputs, [positions, columns] of each batch."""
    found: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().flatten(0, -2))):
        for each in inputs:
            model(each)
    return found


@torch.no_grad()
def _in_order(model: nn.Module, layers: Mapping[str, nn.Module], inputs: list[Tensor]) -> list[str]:
    """Names as their layers run."""
    names: dict[str, None] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: names.setdefault(name)) for name, layer in layers.items()
    ]
    model(inputs[0])
    for hook in hooks:
        hook.remove()
    return list(names)
