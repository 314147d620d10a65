"""Nested tensors as inputs: sequences of several lengths, against the same rows in one plain tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx

LENGTHS = [(3, 5, 2), (4, 1, 2), (4, 4, 4), (7, 2)]


def model(**options) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)).double()
    return lotion_fx.transform(net, "int4/4", **options)


def batches() -> list[tuple[list[Tensor], Tensor]]:
    """Sequences [length, 4] of each batch, and a label for each of their rows."""
    torch.manual_seed(1)
    rows = [[torch.randn(length, 4).double() for length in lengths] for lengths in LENGTHS]
    return [(each, torch.randint(3, (len(torch.cat(each)),))) for each in rows]


def nested(sequences: list[Tensor]) -> Tensor:
    return torch.nested.nested_tensor(sequences, layout=torch.jagged)


def trained(net: nn.Module, loss_of) -> tuple[list[Tensor], list[float]]:
    """The gradients of the first step, and the losses of all."""
    optimizer, losses, first = torch.optim.SGD(net.parameters(), lr=0.1), [], []
    for sequences, labels in batches():
        optimizer.zero_grad()
        loss = loss_of(net, sequences, labels)
        loss.backward()
        first = first or [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        losses.append(float(loss.detach()))
    return first, losses


def of_nested(net: nn.Module, sequences: list[Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(net(nested(sequences)).values(), labels)


def of_padded_output(net: nn.Module, sequences: list[Tensor], labels: Tensor) -> Tensor:
    """The loss is made of the output as padded."""
    out = torch.nested.to_padded_tensor(net(nested(sequences)), 0.0)
    here = torch.arange(out.shape[1]) < torch.tensor([[len(each)] for each in sequences])
    return F.cross_entropy(out[here], labels)


def of_rows(net: nn.Module, sequences: list[Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(net(torch.cat(sequences)), labels)


@pytest.mark.parametrize("loss_of", [of_nested, of_padded_output])
@pytest.mark.parametrize(
    ("inner", "curvature"), [("eager", "factored"), ("aot_eager", "factored"), ("aot_eager", "ggn")]
)
def test_training_is_that_of_the_rows(inner, curvature, loss_of):
    """Gradients, curvature and T, which all are in the steps."""
    options = {"inner": inner, "curvature": curvature, "calibrate": False}
    if curvature == "ggn":
        options["likelihood"] = "categorical"
    net, other = model(**options), model(**options)
    gradients, losses = trained(net, loss_of)
    expected, their_losses = trained(other, of_rows)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(losses, their_losses)
    assert len(losses) == len(LENGTHS)
    kinds = {row.name: row.estimator for row in lotion_fx.report(net).rows if row.format}
    assert kinds == {row.name: row.estimator for row in lotion_fx.report(other).rows if row.format}


def test_its_size_is_measured_and_eval_rounds():
    net = model(inner="aot_eager")
    for _ in range(3):
        trained(net, of_nested)
    assert "measured in" in str(lotion_fx.report(net))
    net.eval()
    sequences, _ = batches()[0]
    assert torch.equal(net(nested(sequences)).values(), net(torch.cat(sequences)))
    rounded = net(nested(sequences)).values()
    with lotion_fx.full_precision(net):
        assert not torch.equal(net(nested(sequences)).values(), rounded)


def test_of_a_loss_that_is_traced_it_is_a_sentence():
    net = model(inner="eager")
    sequences, labels = batches()[0]
    with pytest.raises(ValueError, match="it holds a nested tensor, of which no trace of a loss can be made"):
        lotion_fx.expected_loss(net, (nested(sequences), labels), lambda out, y: F.cross_entropy(out.values(), y))
