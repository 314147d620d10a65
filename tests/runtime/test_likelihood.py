"""Labels drawn from a model's output: their loss is torch's, and its squared gradient is the curvature on average."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jacrev

import lotion_fx
from lotion_fx.likelihood import LIKELIHOODS, draws, labels_a_batch, likelihood_of, output_in, sampled_loss
from tests.models import LM, MLP

LOSSES = {
    "categorical": lambda output, labels: F.cross_entropy(output, labels),
    "bernoulli": F.binary_cross_entropy_with_logits,
    "gaussian": F.mse_loss,
}


def drawn(output, likelihood, seed=0):
    """The sampled loss, its gradient, and the labels that this gradient shows were drawn."""
    output = output.detach().requires_grad_()
    loss = sampled_loss(output, likelihood, torch.Generator().manual_seed(seed))
    (gradient,) = torch.autograd.grad(loss, output)
    if likelihood == "categorical":
        labels = gradient.argmin(-1)  # p - 1 < 0 at the label alone
    elif likelihood == "bernoulli":
        labels = (gradient < 0).to(output.dtype)
    else:
        labels = output.detach() - gradient * output.numel() / 2
    return loss, gradient, labels


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_is_torch_s_mean_at_the_drawn_labels(likelihood, dtype):
    output = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    loss, gradient, labels = drawn(output, likelihood)
    assert loss.dim() == 0 and gradient.dtype == dtype and loss.dtype.itemsize >= 4
    labels = labels if likelihood == "categorical" else labels.to(loss.dtype)
    expected = LOSSES[likelihood](output.to(loss.dtype), labels)
    torch.testing.assert_close(loss, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_squared_gradients_average_to_the_curvature(likelihood):
    """E g = 0 and, with M draws, M E g g^T is the Hessian in the output, which for these needs no label."""
    count, row = 20_000, torch.tensor([1.5, -0.3, 0.2, -2.0], dtype=torch.float64)
    _, gradient, _ = drawn(row.expand(count, -1), likelihood)
    single = gradient * draws(gradient, likelihood)  # of one label's own loss
    label = torch.tensor(2) if likelihood == "categorical" else torch.zeros(4, dtype=torch.float64)
    per_row = 1 if likelihood == "categorical" else 4
    hessian = jacrev(jacrev(lambda row: per_row * LOSSES[likelihood](row, label)))(row)
    samples = single[:, :, None] * single[:, None, :]
    for found, expected in ((single, torch.zeros(4)), (samples, hessian)):
        error = found.std(0) / math.sqrt(count)
        assert ((found.mean(0) - expected).abs() < 5 * error + 1e-12).all(), (found.mean(0), expected)


def test_the_draw_is_the_generator_s_alone():
    output = torch.randn(6, 3)
    before = torch.get_rng_state()
    for likelihood in LIKELIHOODS:
        same, again, other = (drawn(output, likelihood, seed)[0] for seed in (3, 3, 4))
        assert same == again and same != other
    assert torch.equal(before, torch.get_rng_state())


def test_masked_classes_are_never_drawn_and_an_overflow_raises_nothing():
    output = torch.zeros(1000, 4)
    output[:, 1] = -math.inf
    _, gradient, labels = drawn(output, "categorical")
    assert set(labels.tolist()) == {0, 2, 3} and gradient.isfinite().all()
    for likelihood in LIKELIHOODS:
        assert drawn(torch.full((3, 2), math.nan), likelihood)[0].isnan()


def test_draws_are_positions_or_elements():
    output = torch.zeros(3, 4, 5)
    assert [draws(output, likelihood) for likelihood in LIKELIHOODS] == [12, 60, 60]


KNOWN = [
    (F.cross_entropy, "categorical"),
    (nn.CrossEntropyLoss, "categorical"),
    (nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3), "categorical"),
    (F.binary_cross_entropy_with_logits, "bernoulli"),
    (nn.BCEWithLogitsLoss(), "bernoulli"),
    (F.mse_loss, "gaussian"),
    (nn.MSELoss(), "gaussian"),
]


@pytest.mark.parametrize(("loss", "name"), KNOWN, ids=[getattr(loss, "__name__", str(loss)) for loss, _ in KNOWN])
def test_torch_s_losses_are_known(loss, name):
    assert likelihood_of(loss) == name


def test_other_losses_are_refused():
    for loss in (F.l1_loss, nn.NLLLoss(), 3):
        with pytest.raises(ValueError, match="likelihood=.*name it: categorical, bernoulli, gaussian"):
            likelihood_of(loss)
    with pytest.raises(ValueError, match="reduction='sum'.*name it, likelihood='gaussian'"):
        likelihood_of(nn.MSELoss(reduction="sum"))
    with pytest.raises(ValueError, match="pos_weight=tensor.*strength"):
        likelihood_of(nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)))


def test_the_output_is_found():
    logits, loss = torch.zeros(2, 3, requires_grad=True), torch.zeros((), requires_grad=True)
    mask = torch.zeros(2, 9)
    for out in (logits, (loss, mask, logits), {"loss": loss, "logits": logits}, SimpleNamespace(logits=logits)):
        assert output_in(out, "categorical") is logits
    scores = torch.zeros(4, requires_grad=True)
    assert output_in(scores, "bernoulli") is scores
    for out in (loss, {"loss": loss}, scores, mask, logits.long(), None):
        with pytest.raises(ValueError, match=r"holds no differentiable.*2 or more dimensions.*return logits"):
            output_in(out, "categorical")
    one_column = torch.randn(5, 1, requires_grad=True)
    with pytest.raises(ValueError, match=r"\(5, 1\).*one column.*'gaussian'.*'bernoulli'"):
        output_in({"logits": one_column}, "categorical")
    assert output_in(one_column, "gaussian") is one_column


BAD = [
    (dict(likelihood="gaussian"), "likelihood='gaussian' is for curvature='ggn'.*'factored'"),
    (dict(refresh=2, curvature="fisher"), "refresh=2: curvature='fisher' reads the optimizer's.*leave it out"),
    (dict(refresh=2, loss_fn=F.mse_loss), "refresh=2: with loss_fn=.*leave it out"),
    (dict(curvature="ggn", likelihood="gausian"), "likelihood='gausian'.*did you mean 'gaussian'"),
    (dict(curvature="ggn", likelihood=F.l1_loss), "likelihood=.*l1_loss.*name it"),
    (dict(curvature="ggn", refresh=0), "refresh=0.*1 or more"),
    (dict(curvature="ggn", refresh=0.5), "refresh=0.5.*1 or more"),
    (dict(curvature="ggn", inner="eager"), "inner='eager' compiles none"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[",".join(arguments) for arguments, _ in BAD])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        lotion_fx.transform(LM(), **arguments)


def test_the_dynamo_backend_refuses():
    torch._dynamo.reset()
    compiled = torch.compile(MLP(), backend="lotion_fx", options={"curvature": "ggn", "inner": "aot_eager"})
    with pytest.raises(Exception, match=r"curvature='ggn' needs the model's call.*transform\(model\)"):
        compiled(torch.randn(3, 20))


def test_many_batches_draw_once_each():
    assert [labels_a_batch(count) for count in (1, 8, 16, 17, 32, 33, 63, 64, 100)] == [4, 4, 4, 4, 2, 2, 2, 1, 1]
