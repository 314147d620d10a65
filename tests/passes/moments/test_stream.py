"""Training with the loss in the graph: the loss that comes out is the expected one, and its term enters once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lotion_fx
from lotion_fx.compiling import compiles
from lotion_fx.numerics import rounding
from lotion_fx.state import weights_of
from tests.models import LM, VOCAB, counted, ids


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 4))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 6, generator=generator), torch.randint(4, (12,), generator=generator)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def expected_gradients(model: nn.Module, data: Any, loss_fn: Any = F.cross_entropy, **options: Any) -> list[Tensor]:
    total = lotion_fx.expected_loss(model, data, loss_fn, **options).total
    return list(torch.autograd.grad(total, list(model.parameters())))


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_the_training_loss_is_the_expected_loss(inner, fmt):
    model = counted(mlp(), fmt, loss_fn=F.cross_entropy, inner=inner)
    loss = lotion_fx.training_loss(model, batch())
    loss.backward()
    result = lotion_fx.expected_loss(model, batch(), F.cross_entropy)
    assert result.total > result.loss
    torch.testing.assert_close(loss, result.total)
    for mine, expected in zip(gradients(model), expected_gradients(model, batch()), strict=True):
        torch.testing.assert_close(mine, expected)
    assert {row.estimator for row in lotion_fx.report(model).rows if row.format} == {"second order"}


def test_the_step_adds_nothing_to_it():
    model = counted(mlp(), "int4", loss_fn=F.cross_entropy, inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        expected = [
            p - 0.1 * g for p, g in zip(model.parameters(), expected_gradients(model, batch(step)), strict=True)
        ]
        optimizer.zero_grad()
        lotion_fx.training_loss(model, batch(step)).backward()
        optimizer.step()
        for parameter, value in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), value)


def test_without_the_loss_the_term_is_at_the_step_again():
    model = counted(mlp(), "int4", loss_fn=F.cross_entropy, inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    estimators = []
    for loss in (lotion_fx.training_loss, lambda model, data: F.cross_entropy(model(data[0]), data[1])) * 2:
        optimizer.zero_grad()
        loss(model, batch()).backward()
        optimizer.step()
        estimators.append(lotion_fx.report(model)["0.weight"].estimator)
    assert estimators == ["second order", "analytic"] * 2


def test_micro_batches_are_one_batch():
    models = [counted(mlp(), "int4", loss_fn=F.cross_entropy, inner="aot_eager") for _ in range(2)]
    x, y = batch()
    lotion_fx.training_loss(models[0], (x, y)).backward()
    for part in range(2):
        half = slice(6 * part, 6 * part + 6)
        (lotion_fx.training_loss(models[1], (x[half], y[half])) / 2).backward()
    for whole, parts in zip(*map(gradients, models), strict=True):
        torch.testing.assert_close(whole, parts)


class Pooled(nn.Module):
    """A convolution before an op without a rule, and a linear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool2d(self.conv(x), 3).flatten(1))


def test_what_the_stream_cannot_reach_gets_its_term_at_the_step():
    def model(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        return counted(Pooled(), "int4/tensor", curvature="full", inner="aot_eager", **options)

    x, y = torch.randn(8, 1, 8, 8), torch.randint(4, (8,))
    streamed, plain = model(loss_fn=F.cross_entropy), model()
    result = lotion_fx.expected_loss(streamed, (x, y), F.cross_entropy)
    assert {name: c.kind for name, c in result.certificates.items()} == {
        "conv.weight": "analytic",
        "head.weight": "second order",
    }
    assert result.certificates["conv.weight"].ended == "max_pool2d: no rule for this op"
    loss = lotion_fx.training_loss(streamed, (x, y))
    loss.backward()
    before = streamed.conv.weight.grad.clone()
    F.cross_entropy(plain(x), y).backward()
    for model_ in (streamed, plain):
        torch.optim.SGD(model_.parameters(), lr=0.0).step()
    added = streamed.conv.weight.grad - before
    assert added.norm() > 0
    estimators = {row.name: row.estimator for row in lotion_fx.report(streamed).rows if row.format}
    assert estimators == {"conv.weight": "analytic", "head.weight": "second order"}
    # The convolution's term is that of a model without the loss in the graph, but for the head's noise in its gradient.
    F.cross_entropy(plain(x), y).backward()
    h = next(w for w in weights_of(plain) if w.name == "conv.weight")
    state = h.curvature.ema
    assert state is not None
    term = 0.5 * rounding.variance_vjp(
        streamed.conv.weight.detach(),
        (state[:-1] / state[-1]).view(4, 1, 3, 3),
        lotion_fx.resolve("int4/tensor"),
        1,
    )
    assert (added - term).norm() < 0.2 * term.norm()


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class WithLoss(nn.Module):
    """A model of the Hugging Face kind: keywords in, an output with a loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.inner(inputs)
        return Output(None if labels is None else F.cross_entropy(logits, labels), logits)


def test_a_model_that_returns_its_loss():
    torch.manual_seed(0)
    model = counted(WithLoss(), "int4", loss_fn="model", inner="aot_eager")
    x, y = batch()
    result = lotion_fx.expected_loss(model, {"inputs": x, "labels": y})
    out = model(inputs=x, labels=y)
    torch.testing.assert_close(out.loss, result.total)
    torch.testing.assert_close(lotion_fx.training_loss(model, {"inputs": x, "labels": y}), result.total)
    out.loss.backward()
    for mine, expected in zip(
        gradients(model), expected_gradients(model, {"inputs": x, "labels": y}, None), strict=True
    ):
        torch.testing.assert_close(mine, expected)
    assert model(x).loss is None  # without labels no loss, and the graph is as ever
    model.eval()
    rounded = {
        name: rounding.rtn(p.detach(), lotion_fx.resolve("int4")) if p.dim() > 1 else p
        for name, p in model.named_parameters()
    }
    plain = torch.func.functional_call(WithLoss(), rounded, (x, y)).loss
    torch.testing.assert_close(model(inputs=x, labels=y).loss, plain)


class Scaled(nn.Module):
    """A model that returns another trained scalar beside its output, as CLIP does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.temperature = mlp(), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), self.temperature.exp().squeeze()


def test_a_scalar_that_is_no_loss_takes_no_term_away():
    added = []
    for options in ({}, {"loss_fn": F.cross_entropy}):
        torch.manual_seed(0)
        model = counted(Scaled(), "int4", inner="aot_eager", **options)
        logits, scale = model(batch()[0])
        F.cross_entropy(logits * scale, batch()[1]).backward()
        before = gradients(model)
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        added.append([now - then for now, then in zip(gradients(model), before, strict=True)])
    for mine, expected in zip(*added, strict=True):
        torch.testing.assert_close(mine, expected)
    assert sum(change.norm() for change in added[0]) > 0


class TwoLosses(nn.Module):
    """Its first scalar is not the whole loss, and the other one drops a covariance."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 40), nn.Linear(40, 40), nn.Linear(40, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        h = self.a(x)
        aux = h.square().mean()
        return {"aux": aux, "loss": F.cross_entropy(self.c(self.b(h)), y) + aux}


def test_every_scalar_may_be_the_loss():
    torch.manual_seed(0)
    model = counted(TwoLosses(), "int4", loss_fn="model", inner="aot_eager")
    x, y = batch()
    loss = model(x, y)["loss"]
    result = lotion_fx.expected_loss(model, (x, y), moments="closed")
    assert result.certificates["a.weight"].kind == "analytic"
    joint = sum(float(term) for n, term in result.terms.items() if result.certificates[n].kind == "analytic")
    assert loss.item() == pytest.approx(result.total.item() - joint, rel=1e-5)


def test_batches_of_many_sizes():
    """More than Dynamo compiles one by one."""
    model = counted(mlp(), "int4", loss_fn=F.cross_entropy, inner="aot_eager")
    for size in range(3, 15):
        data = torch.randn(size, 6), torch.randint(4, (size,))
        expected = lotion_fx.expected_loss(model, data, F.cross_entropy).total
        torch.testing.assert_close(lotion_fx.training_loss(model, data), expected)


def test_a_llama_s_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = counted(transformers.LlamaForCausalLM(config), "int4", loss_fn="model", inner="aot_eager")
    tokens = torch.randint(64, (2, 8))
    data = {"input_ids": tokens, "labels": tokens}
    result = lotion_fx.expected_loss(model, data)
    assert result.certificates["lm_head.weight"].kind == "second order"
    assert {c.kind for n, c in result.certificates.items() if n != "lm_head.weight"} == {"analytic"}
    loss = model(**data).loss
    alone = float(result.terms["lm_head.weight"])
    assert loss.item() == pytest.approx(result.loss.item() + alone, rel=1e-4)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert lotion_fx.report(model)["lm_head.weight"].estimator == "second order"


def test_finishing_keeps_the_variance_at_rounded_weights():
    model = counted(mlp(), "int4/tensor", loss_fn=F.cross_entropy, inner="aot_eager")
    lotion_fx.finish(model)
    kept = lotion_fx.training_loss(model, batch())
    lotion_fx.finish(model, term=False)
    rounded = lotion_fx.training_loss(model, batch())
    model.eval()
    torch.testing.assert_close(lotion_fx.training_loss(model, batch()), rounded)
    assert kept > rounded


def test_a_new_strength_needs_no_new_graph():
    model = counted(mlp(), "int4", loss_fn=F.cross_entropy, inner="aot_eager")
    plain = lotion_fx.training_loss(model, batch())
    before = compiles["aot_eager"]
    lotion_fx.calibrate(model, [batch(1), batch(2)], F.cross_entropy, samples=4)
    calibrated = lotion_fx.training_loss(model, batch())
    assert compiles["aot_eager"] == before
    assert calibrated != plain
    torch.testing.assert_close(calibrated, lotion_fx.expected_loss(model, batch(), F.cross_entropy).total)


def test_a_graph_with_a_checkpointed_block_is_left_to_the_joint_graph():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    torch.manual_seed(0)
    model = counted(Checkpointed(), "int4", loss_fn=F.cross_entropy, inner="aot_eager")
    lotion_fx.training_loss(model, batch()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    estimators = {row.name: row.estimator for row in lotion_fx.report(model).rows if row.format}
    assert estimators == {"body.weight": "analytic", "head.weight": "analytic"}


def test_a_language_model_s_head_is_in_the_stream_and_its_blocks_are_not():
    torch.manual_seed(0)

    def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    data = ids(), torch.randint(VOCAB, (8, 5))
    kinds = {}
    for moments in ("closed", "diagonal", "off"):
        torch.manual_seed(0)
        model = counted(LM(), "int4", loss_fn=loss_fn, moments=moments, inner="aot_eager")
        loss = lotion_fx.training_loss(model, data)
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        kinds[moments] = [row.estimator for row in lotion_fx.report(model).rows if row.format]
    assert kinds == {
        "closed": ["analytic", "analytic", "second order"],
        "diagonal": ["second order"] * 3,
        "off": ["analytic"] * 3,
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_fn": "modle"}, "expected a function of"),
        ({"loss_fn": F.mse_loss, "method": "ste"}, "has no expected loss"),
        ({"loss_fn": F.mse_loss, "inner": "eager"}, "inner='eager'"),
        ({"loss_fn": F.mse_loss, "curvature": "ggn"}, "draws labels"),
        ({"moments": "diagnal"}, "did you mean 'diagonal'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        counted(mlp(), **{"inner": "aot_eager", **options})


def test_bad_batches_are_named():
    model = counted(mlp(), inner="aot_eager")
    with pytest.raises(ValueError, match="without a loss"):
        lotion_fx.training_loss(model, batch())
    with pytest.raises(ValueError, match=r"expected \(inputs, targets\)"):
        lotion_fx.expected_loss(model, batch()[0], F.cross_entropy)
    with pytest.raises(ValueError, match="scalar loss, got shape"):
        lotion_fx.expected_loss(model, batch(), lambda out, y: F.cross_entropy(out, y, reduction="none"))
    with pytest.raises(ValueError, match="in which there is no scalar loss|scalar loss, got shape"):
        lotion_fx.expected_loss(model, batch()[0])
    with pytest.raises(ValueError, match="samples=-1"):
        lotion_fx.expected_loss(model, batch(), F.cross_entropy, -1)
    with pytest.raises(ValueError, match="not under lotion_fx"):
        lotion_fx.expected_loss(mlp(), batch(), F.cross_entropy)
