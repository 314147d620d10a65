"""What gradients at a model's output tell of its loss: against its second derivatives, and weights it was made with.

Broken once and seen red: a likelihood seen in any gradient, rows without weight counted, the loss scale left in.
"""

import pytest
import torch
import torch.nn.functional as F

import lotion_fx
from lotion_fx.recognition import row_weights
from tests.models import LM, ids, lm_loss
from tests.runtime.steps import one_step

torch.manual_seed(0)
FLAT, IMAGES, TEXT = torch.randn(40, 7), torch.randn(5, 7, 4, 3), torch.randn(4, 9, 7)
LABELS, MAP = torch.randint(0, 7, (40,)), torch.randint(0, 7, (5, 4, 3))
WEIGHTS = torch.rand(40).where(torch.rand(40) > 0.3, 0.0)
CLASSES = torch.rand(7) + 0.1

LIKELY = {  # the loss, and the weight of each row's negative log likelihood in it
    "mean": (FLAT, lambda z: F.cross_entropy(z, LABELS), torch.full((40,), 1 / 40)),
    "sum": (FLAT, lambda z: F.cross_entropy(z, LABELS, reduction="sum"), torch.ones(40)),
    "weights": (FLAT, lambda z: (WEIGHTS * F.cross_entropy(z, LABELS, reduction="none")).sum(), WEIGHTS),
    "classes": (FLAT, lambda z: F.cross_entropy(z, LABELS, CLASSES), CLASSES[LABELS] / CLASSES[LABELS].sum()),
    "ignored": (
        FLAT,
        lambda z: F.cross_entropy(z, LABELS.where(LABELS > 1, -100)),
        (LABELS > 1) / (LABELS > 1).sum(),
    ),
    "images": (IMAGES, lambda z: 3 * F.cross_entropy(z, MAP), torch.full((5, 1, 4, 3), 3 / 60)),
    "text": (TEXT, lambda z: F.cross_entropy(z.flatten(0, 1), LABELS[:36]), torch.full((4, 9), 1 / 36)),
    "bits": (FLAT, lambda z: F.binary_cross_entropy_with_logits(z, (FLAT > 1).float()), torch.full((40,), 1 / 280)),
    "sum of bits": (
        FLAT[:, 0],
        lambda z: F.binary_cross_entropy_with_logits(z, LABELS.gt(3).float(), reduction="sum"),
        torch.ones(40),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LIKELY)
def test_a_likelihood_shows_its_curvature_and_what_its_rows_weigh(name, dtype):
    output, loss, weights = LIKELY[name]
    z = output.to(dtype).requires_grad_()
    grad = torch.autograd.grad(loss(z.float()), z)[0]
    hessian = torch.autograd.functional.hessian(loss, z.detach().float()).reshape(z.numel(), -1)
    elements = z.numel() if "bits" in name else weights.numel()  # of the weights above, which are those of an element
    weighed = weights[..., None] if weights.dim() < grad.dim() else weights
    energies = torch.where(weighed > 0, grad.float().square() / weighed, 0.0).sum()
    expected = torch.stack([energies, weights.sum() * elements / weights.numel(), hessian.trace()])
    inverse, total, trace = row_weights(z.detach(), grad)
    energy = grad.float().square().sum()
    found = torch.stack([energy * inverse, total, energy * trace])
    torch.testing.assert_close(found, expected, rtol=1e-4 if dtype == torch.float32 else 0.02, atol=0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.mse_loss(z, FLAT.flip(0)),
        lambda z: F.cross_entropy(z, FLAT.softmax(1).flip(0)),
        lambda z: F.huber_loss(z, FLAT.flip(0)),
        lambda z: F.cross_entropy(z, LABELS) + z.square().mean(),
        lambda z: F.cross_entropy(z / 2, LABELS),
        lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.2),
        lambda z: F.multi_margin_loss(z, LABELS),
    ],
)
def test_others_show_nothing(loss):
    z = FLAT.clone().requires_grad_()
    assert row_weights(z.detach(), torch.autograd.grad(loss(z), z)[0]).isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 1), (0,), (7,), (2, 3, 0, 4)])
def test_outputs_without_rows_or_classes_show_nothing(shape):
    assert row_weights(torch.randn(shape), torch.randn(shape)).isnan().all()


class OwnLoss(LM):
    """A model that makes its loss itself, as those of transformers do, and puts out its logits beside it."""

    def __init__(self, scale, **options):
        super().__init__()
        self.scale, self.options = scale, options

    def forward(self, tokens):
        logits = super().forward(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten(), **self.options)
        return {"loss": self.scale * loss, "logits": logits}


def terms(loss, steps=(2, 6), scaler=None, make=LM):
    """The term after so many steps of a loss, at weights that stay."""
    torch.manual_seed(0)
    model = lotion_fx.transform(make(), "int4", inner="aot_eager")
    optimizer, found = torch.optim.SGD(model.parameters(), 0.0), []
    for step in range(max(steps)):
        if scaler is None:
            one_step(model, optimizer, loss)
        else:
            scaler.scale(loss(model)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if step + 1 in steps:
            found.append(lotion_fx.report(model).term)
    return torch.tensor(found)


@pytest.mark.parametrize("scale", [0.33, 3.0])
def test_a_multiple_of_a_loss_has_a_multiple_of_its_term_from_the_second_step_on(scale):
    """A factor that is nearer to 1 than a guess by the size of residuals can tell."""
    plain = terms(lambda m: lm_loss(m, ids(seed=1)))
    torch.testing.assert_close(terms(lambda m: scale * lm_loss(m, ids(seed=1))), scale * plain, rtol=0.02, atol=0)


def test_a_loss_scale_is_no_part_of_the_loss():
    plain = terms(lambda m: lm_loss(m, ids(seed=1)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    torch.testing.assert_close(terms(lambda m: lm_loss(m, ids(seed=1)), scaler=scaler), plain, rtol=1e-4, atol=0)


MULTIPLES = {"sum": (1.0, {"reduction": "sum"}), "100 times": (100.0, {}), "a hundredth": (0.01, {})}


@pytest.mark.parametrize("name", MULTIPLES)
@pytest.mark.parametrize("how", ["a batch", "micro-batches", "scaled"])
def test_a_loss_made_in_the_model_shows_at_its_head(name, how):
    scale, options = MULTIPLES[name]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16) if how == "scaled" else None
    tokens = ids(seed=1)
    parts = tokens.chunk(2) if how == "micro-batches" else [tokens]
    shares = 1 if name == "sum" else len(parts)

    def loss(model):
        return sum(model(part)["loss"] / shares for part in parts)

    plain = terms(lambda m: lm_loss(m, tokens))
    found = terms(loss, scaler=scaler, make=lambda: OwnLoss(scale, **options))
    times = tokens.numel() if name == "sum" else scale
    torch.testing.assert_close(found, times * plain, rtol=0.15, atol=0)
