"""T counted at the model's output, where no joint graph counts it."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from lotion_fx.state import registry
from tests.models import LM, MLP, ids

LABELS = torch.tensor([1, -100, 3, 0, 2, -100, 6, 4, 5])


def terms_of(model: nn.Module, loss: Tensor) -> float:
    """T of one step."""
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    return lotion_fx.state_dict(model)["phases"][0]["terms"].item()


class Scores(nn.Module):
    """One number a sample, [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze(-1)


class MakesItsLoss(LM):
    """The loss, a number without rows, beside the logits."""

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        logits = super().forward(ids)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()), "logits": logits}


@pytest.mark.filterwarnings("ignore:no compiled graph contains")
def test_the_output_s_rows_are_the_loss_terms():
    """Rows, not their elements; those with a gradient, where the output has one."""
    model = lotion_fx.transform(MLP(), "int4", inner="eager")
    assert terms_of(model, F.cross_entropy(model(torch.randn(9, 20)), LABELS)) == 7
    assert terms_of(model, F.cross_entropy(model(torch.randn(3, 3, 20)).flatten(0, 1), LABELS)) == 7
    scores = lotion_fx.transform(Scores(), "int4", inner="eager")
    assert terms_of(scores, (scores(torch.randn(9, 20)) * (LABELS >= 0)).sum()) == 7
    model = lotion_fx.transform(MakesItsLoss(), "int4", inner="eager")
    assert terms_of(model, model(ids(8, 5))["loss"]) == 40


@pytest.mark.filterwarnings("ignore:no compiled graph contains")
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_several_passes_through_one_graph_count_its_rows_once(inner):
    """Losses that are differentiated one after the other, of the same rows or of some each, in micro-batches too."""
    torch.manual_seed(0)
    x, known = torch.randn(9, 20), torch.arange(9) % 7
    of = {
        "class": lambda out: F.cross_entropy(out, known),
        "size": lambda out: out.square().mean(),
        "first": lambda out: F.cross_entropy(out[:4], known[:4]),
        "others": lambda out: F.cross_entropy(out[4:7], known[4:7]),
    }
    for losses, micro_batches, expected in (
        (["class", "size"], 1, 9),
        (["class", "size", "first"], 1, 9),
        (["first", "others"], 1, 7),
        (["class", "size"], 3, 27),
        (["class"], 2, 18),
    ):
        torch._dynamo.reset()
        model = lotion_fx.transform(MLP(), "int4", inner=inner)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(2):  # steps
            for _ in range(micro_batches):
                out = model(x)
                for name in losses:
                    of[name](out).backward(retain_graph=True)
            optimizer.step()
            optimizer.zero_grad()
            assert lotion_fx.state_dict(model)["phases"][0]["terms"].item() == expected, (losses, micro_batches)


def _look_at(how, model, x, y):
    """What loops do between two steps: attacks on the inputs, saliency, gradients that are looked at."""
    x = x.clone().requires_grad_()
    held = lotion_fx.full_precision(model) if "full precision" in how else contextlib.nullcontext()
    model.train("eval" not in how)
    with held:
        loss = F.cross_entropy(model(x), y)
        if "weights" in how:
            torch.autograd.grad(loss, list(model.parameters()))
        elif "inputs" in how:
            torch.autograd.grad(loss, x)
        elif "only x" in how:
            loss.backward(inputs=[x])
        else:
            loss.backward()
            model.zero_grad()
    model.train()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("curvature", ["factored", "fisher"])
@pytest.mark.parametrize(
    "how",
    ["inputs", "only x", "weights", "eval, inputs", "eval, only x", "eval, backward", "full precision, inputs",
     "full precision, weights", "full precision, backward"],
)  # fmt: skip
def test_gradients_that_are_looked_at_between_steps_do_not_count(how, curvature, inner):
    terms = []
    for looks in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 10))
        lotion_fx.transform(model, "int4", inner=inner, curvature=curvature, calibrate=False)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        draw = torch.Generator().manual_seed(1)
        for _ in range(4):
            x, y = torch.randn(64, 16, generator=draw), torch.randint(10, (64,), generator=draw)
            if looks:
                _look_at(how, model, x, y)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        terms.append(lotion_fx.report(model).term)
        assert registry[model[0].weight].smoothing.tally.last_loss_count == 64
    assert terms[1] == pytest.approx(terms[0], rel=1e-6) and terms[0] > 0


def test_a_loop_that_takes_its_gradients_by_hand_counts_them():
    model = lotion_fx.transform(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 10)), "int4", inner="eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for rows in (64, 64, 32):
        parameters = list(model.parameters())
        loss = F.cross_entropy(model(torch.randn(rows, 16)), torch.randint(10, (rows,)))
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = grad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        assert registry[model[0].weight].smoothing.tally.last_loss_count == rows


class Reentrant(nn.Module):
    """All of its weights are in a part that a backward pass inside the backward pass recomputes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 10))

    @torch.compiler.disable  # a compiler's own checkpointing is not reentrant
    def run(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attacks", [False, True])
def test_what_reentrant_checkpointing_recomputes_counts(attacks):
    found = []
    for clips in (False, True):
        torch.manual_seed(0)
        model = lotion_fx.transform(Reentrant(), "int4", inner="eager", curvature="fisher", calibrate=False)
        optimizer, tally = torch.optim.Adam(model.parameters(), lr=1e-3), registry[model.body[0].weight].smoothing.tally
        for seed in range(4):
            torch.manual_seed(seed)
            x, y = torch.randn(64, 16), torch.randint(10, (64,))
            if attacks:
                _look_at("eval, backward", model, x, y)
            F.cross_entropy(model(x.requires_grad_()), y).backward()
            if clips:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
            assert tally.last_loss_count == 64
        found.append(lotion_fx.report(model).term)
    assert found[1] == pytest.approx(found[0], rel=0.2) and found[0] > 0  # clipping is divided out
