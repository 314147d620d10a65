"""What a model's output parametrizes: the distribution whose negative log-likelihood the training loss is.

    categorical   softmax over the last dimension     cross entropy, mean over positions
    bernoulli     sigmoid of every element            binary cross entropy with logits, mean over elements
    gaussian      N(output, 1/2) at every element     mean of (output - target)^2

The Gauss-Newton matrix of such a loss is the mean outer product of its gradients at labels drawn from the output itself
(Martens 2020, arXiv 1412.1193, section 9): so its diagonal takes no more than the contraction of squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotion_fx.attributes import attribute_of
from lotion_fx.choosing import near
from lotion_fx.private import tree_leaves
from lotion_fx.shards import rows_of

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
LABELS = 4
"""Draws of a batch's labels that a curvature which is read once is averaged over."""
ENOUGH = 64
"""Draws of all batches together that are enough, at least one a batch: other data tell more than other labels."""
_LOSSES = {
    F.cross_entropy: "categorical",
    nn.CrossEntropyLoss: "categorical",
    F.binary_cross_entropy_with_logits: "bernoulli",
    nn.BCEWithLogitsLoss: "bernoulli",
    F.mse_loss: "gaussian",
    nn.MSELoss: "gaussian",
}
_ONE_CLASS = (
    "likelihood='categorical' (the default): the model's output is {shape}, and a softmax over one column has no "
    "curvature; name what it parametrizes, 'gaussian' (F.mse_loss) or 'bernoulli' (binary cross entropy with logits)"
)

_NO_OUTPUT = (
    "likelihood={likelihood} (under curvature='ggn' 'categorical' unless told) draws labels from the model's output, "
    "which holds no differentiable floating-point tensor of 2 or more dimensions; return logits or predictions (beside "
    "the loss, if you like), name another likelihood, or do without, as curvature='factored' does"
)


def labels_a_batch(batches: int) -> int:
    """Draws of labels for each of several batches that one curvature is read from."""
    return min(LABELS, math.ceil(ENOUGH / batches))


def likelihood_of(loss: Any) -> str:
    """The likelihood that one of torch's losses is the negative logarithm of, up to a constant.

    Args:
        loss: ``F.cross_entropy``, ``F.binary_cross_entropy_with_logits``, ``F.mse_loss``, or the module of one.

    Raises:
        ValueError: any other loss, or a module that weights or sums where the likelihood takes the plain mean.
    """
    key = type(loss) if isinstance(loss, nn.Module) else loss
    name = _LOSSES.get(key) if callable(key) else None
    if name is None:
        raise ValueError(f"likelihood={loss!r}: no loss that is known here; name it: {', '.join(LIKELIHOODS)}")
    for option, plain in (("reduction", "mean"), ("weight", None), ("pos_weight", None)):
        if isinstance(loss, nn.Module) and getattr(loss, option, plain) != plain:
            raise ValueError(
                f"likelihood={loss!r} has {option}={getattr(loss, option)!r}, and the curvature is that of the plain "
                f"mean; name it, likelihood={name!r}, and let strength make up for the difference in scale"
            )
    return name


def named(likelihood: Any) -> str:
    """One of `LIKELIHOODS`, given as itself or as the loss that it belongs to.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(likelihood, str):
        return likelihood_of(likelihood)
    if likelihood not in LIKELIHOODS:
        expected = f"expected one of {', '.join(LIKELIHOODS)}, or the loss{near(likelihood, LIKELIHOODS)}"
        raise ValueError(f"likelihood={likelihood!r}: {expected}")
    return likelihood


def output_in(out: Any, likelihood: str) -> Tensor:
    """The tensor, among what a model returned, that parametrizes the likelihood.

    Raises:
        ValueError: there is none; or it has one column, over which a softmax says nothing.
    """
    return parametrizing(outputs_in(out), likelihood)


def outputs_in(out: Any) -> list[Tensor]:
    """The tensors, among what a model returned, that may parametrize a likelihood; the first differentiable one does.

    Of floating-point ones it is the output itself, its ``logits`` if it has them, else all of two or more dimensions.
    """
    logits = out.get("logits") if isinstance(out, Mapping) else attribute_of(out, "logits", out)
    leaves, least = ([logits], 1) if isinstance(logits, Tensor) else (tree_leaves(out), 2)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= least]


def parametrizing(outputs: Sequence[Tensor], likelihood: str) -> Tensor:
    """The first of `outputs_in` that is differentiable and has the dimensions that the likelihood asks for.

    Returns:
        It, or all rows of a nested one.

    Raises:
        ValueError: as `output_in`.
    """
    least = 2 if likelihood == "categorical" else 1
    for output in outputs:
        if output.requires_grad and output.dim() >= least:
            if likelihood == "categorical" and output.shape[-1] == 1:
                raise ValueError(_ONE_CLASS.format(shape=tuple(output.shape)))
            return rows_of(output)
    raise ValueError(_NO_OUTPUT.format(likelihood=repr(likelihood)))


def draws(output: Tensor, likelihood: str) -> int:
    """How many independent labels the output has a distribution for, which the loss is the mean over."""
    return output.numel() // output.shape[-1] if likelihood == "categorical" else output.numel()


def sampled_loss(output: Tensor, likelihood: str, generator: torch.Generator | None = None) -> Tensor:
    """The mean loss of an output against labels drawn from itself, 0-d and differentiable in the output.

    Args:
        output: logits [..., classes] for ``"categorical"``, logits of any shape for ``"bernoulli"``, means of any shape
            for ``"gaussian"``; any floating dtype, half precision is computed in float32.
        likelihood: one of `LIKELIHOODS`.
        generator: of the labels, on the output's device.
    """
    output = output if output.dtype.itemsize >= 4 else output.float()
    known, noise = output.detach(), torch.empty_like(output, requires_grad=False)
    # torch.multinomial and torch.bernoulli stop a CUDA device at a logit that is not finite: an overflow must not.
    if likelihood == "categorical":
        labels = (known - noise.exponential_(generator=generator).log_()).argmax(-1)
        return F.cross_entropy(output.flatten(0, -2), labels.flatten())
    if likelihood == "bernoulli":
        labels = (noise.uniform_(generator=generator) < known.sigmoid()).to(output.dtype)
        return F.binary_cross_entropy_with_logits(output, labels)
    return F.mse_loss(output, known + noise.normal_(generator=generator) * 0.5**0.5)
