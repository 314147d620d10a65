"""`explain` shows what each pass did to each graph, and what stopped the walk of a weight that takes Fisher."""

import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.passes import FORWARD, JOINT
from lotion_fx.passes.pipeline import LOG
from tests.models import MLP


class Normalized(nn.Module):
    """One weight that enters linearly, one that does not."""

    def __init__(self):
        super().__init__()
        self.unit, self.head = nn.Parameter(torch.randn(6, 20)), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(F.linear(x, F.normalize(self.unit, dim=-1)))


@pytest.fixture(autouse=True)
def compiled_anew():
    """A model of a class that ran before takes its compiled code, over which no pass runs."""
    torch.compiler.reset()


def ran(model, **settings):
    lotion_fx.transform(model, "int4", inner="aot_eager", **settings)
    model(torch.randn(4, 20)).sum().backward()
    return model


def test_each_pass_of_each_variant_is_there_in_order():
    model = ran(MLP())
    model.eval()(torch.randn(4, 20))
    training, evaluation = lotion_fx.explain(model).graphs
    names = [each.name for each in (*FORWARD, *JOINT)]
    assert [run.name for run in training.passes] == [run.name for run in evaluation.passes] == names
    runs = {run.name: run for run in training.passes}
    assert "attach_smooth" not in runs["attach"].before and runs["attach"].after.count("attach_smooth(") == 2
    assert "lotion_fx.curvature" in runs["resolve"].before and "lotion_fx.curvature" not in runs["resolve"].after
    assert runs["stream"].before == runs["stream"].after
    assert set(training.plans) == {"up.weight", "down.weight"}
    assert (
        training.plans["up.weight"].startswith("latent forward in int4") and "factored" in training.plans["up.weight"]
    )
    assert not evaluation.plans  # rounded weights come in


def test_the_op_that_stopped_the_walk_is_named():
    model = ran(Normalized())
    found = lotion_fx.explain(model)
    assert list(found.fisher) == ["unit"]
    assert "nonlinearly" in found.fisher["unit"] and found.fisher["unit"].endswith("stopped at div")
    assert "unit takes the Fisher form" in str(found)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    fisher = [row.name for row in lotion_fx.report(model).rows if row.estimator == "fisher"]
    assert fisher == ["unit"]


def test_a_moment_stream_is_shown():
    model = MLP()
    lotion_fx.transform(model, "int4", inner="aot_eager", loss_fn=F.mse_loss)
    lotion_fx.training_loss(model, (torch.randn(4, 20), torch.randn(4, 7))).backward()
    (graph,) = lotion_fx.explain(model).graphs
    runs = {run.name: run for run in graph.passes}
    assert runs["stream"].before != runs["stream"].after
    assert "attach_variance(" in runs["insert variances"].after


def test_explaining_changes_nothing():
    model = ran(MLP())
    before = [p.grad.clone() for p in model.parameters()]
    state = lotion_fx.state_dict(model)
    lotion_fx.explain(model)
    assert all(torch.equal(p.grad, then) for p, then in zip(model.parameters(), before, strict=True))
    assert str(lotion_fx.state_dict(model)) == str(state)


def test_a_model_that_did_not_run_is_refused():
    with pytest.raises(ValueError, match="did not run yet"):
        lotion_fx.explain(lotion_fx.transform(MLP(), inner="aot_eager"))
    with pytest.raises(ValueError, match="not under lotion_fx"):
        lotion_fx.explain(MLP())


def test_the_log_shows_each_pass_as_it_runs(caplog):
    with caplog.at_level(logging.DEBUG, logger=LOG.name):
        ran(MLP())
    lines = [record.getMessage() for record in caplog.records if record.name == LOG.name]
    assert [line.partition(":")[0] for line in lines] == [each.name for each in (*FORWARD, *JOINT)]
    assert "stream: nothing to do" in lines and any(line.startswith("attach: ") and "smooth(" in line for line in lines)


@pytest.mark.parametrize("asked", ["passes", "pases"])
def test_the_environment_switches_the_log_on(asked):
    code = "import lotion_fx, logging; print(logging.getLogger('lotion_fx.passes').isEnabledFor(logging.DEBUG))"
    environment = {**os.environ, "LOTION_FX_LOGS": asked}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if asked == "passes":
        assert done.stdout.strip() == "True"
    else:
        assert done.returncode and "unknown log 'pases'; expected 'passes'" in done.stderr
