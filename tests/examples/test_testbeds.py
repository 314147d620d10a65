"""The synthetic testbeds: their losses against sums and samples in float64, their tables, and that they run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import lotion_fx
from lotion_fx.cli import build
from lotion_fx.examples import linear_regression, testbed, two_layer
from lotion_fx.examples.testbed import Row

COMMANDS = ("linear-regression", "two-layer")


def spectrum(size: int) -> torch.Tensor:
    return torch.tensor([1 / i**1.1 for i in range(1, size + 1)], dtype=torch.float64)


def sampled(size: int, of_outputs, samples: int = 200_000) -> tuple[float, float]:
    """Mean and standard error of half the squared error over inputs drawn from the power law."""
    x = (
        torch.randn(samples, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        * spectrum(size).sqrt()
    )
    losses = of_outputs(x).square().sum(1) / 2
    return losses.mean().item(), losses.std().item() / math.sqrt(samples)


def test_spectrum_is_the_power_law():
    assert torch.allclose(testbed.spectrum(50).double(), spectrum(50), rtol=1e-6)


def test_linear_regression_s_population_loss():
    torch.manual_seed(0)
    model = linear_regression.LinearRegression(size=40)
    w, lam = model.weight.detach().double().view(1, 40), spectrum(40)
    target = model.wanted.double().view(1, 40) / lam.sqrt()
    assert testbed.evaluate(model) == pytest.approx((lam * (w - target).square()).sum().item() / 2, rel=1e-5)
    mean, error = sampled(40, lambda x: x @ (w - target).T)
    assert testbed.evaluate(model) == pytest.approx(mean, abs=4 * error)
    assert target.std().item() == pytest.approx(1, abs=0.4)  # w* is standard normal


def test_two_layer_s_population_loss():
    torch.manual_seed(0)
    model = two_layer.TwoLayer(size=20, hidden=6, outputs=3)
    product, lam = (model.second.weight @ model.first.weight).detach().double(), spectrum(20)
    target = model.y.T.double() / (20 * lam).sqrt()
    assert testbed.evaluate(model) == pytest.approx((lam * (product - target).square()).sum().item() / 2, rel=1e-5)
    mean, error = sampled(20, lambda x: x @ (product - target).T)
    assert testbed.evaluate(model) == pytest.approx(mean, abs=4 * error)
    assert target.std().item() == pytest.approx(1, abs=0.4)


@pytest.mark.parametrize("method", testbed.METHODS)
def test_a_run_ends_at_the_losses_of_its_weights(method, monkeypatch):
    """The row against the population loss of the trained weights, rounded here."""
    kept = []

    def build_and_keep():
        kept.append(two_layer.TwoLayer(size=20, hidden=6, outputs=3))
        return kept[0]

    bed = testbed.Testbed("small", "A small one.", build_and_keep, (0.02,), 30)
    row, curve = testbed.train(bed, method, 0.02, seed=0, steps=30)
    (model,) = kept
    first, second = model.first.weight.detach(), model.second.weight.detach()

    def loss(first: torch.Tensor, second: torch.Tensor) -> float:
        return (model.x @ first.T @ second.T - model.y).square().sum().item() / (2 * 20)

    fmt = lotion_fx.resolve(testbed.FORMAT)
    assert row.latent == pytest.approx(loss(first, second), rel=1e-4)
    assert row.rtn == pytest.approx(
        loss(lotion_fx.rounding.rtn(first, fmt), lotion_fx.rounding.rtn(second, fmt)), rel=1e-4
    )
    assert row.rr != row.rtn
    assert curve[-1] == (30, row.rtn)
    assert len(curve) >= testbed.EVALS
    assert curve[0][1] > row.rtn


def test_every_method_of_a_seed_meets_the_same_problem():
    bed = testbed.Testbed("small", "A small one.", lambda: linear_regression.LinearRegression(30), (0.01,), 10)
    one, again, other = (testbed.train(bed, "ptq", 0.01, seed, steps=10)[0] for seed in (0, 0, 1))
    held = testbed.train(bed, "ste", 1e-12, 0, steps=10)[0]
    start = testbed.train(bed, "ptq", 1e-12, 0, steps=10)[0]
    assert (one.rtn, one.latent) == (again.rtn, again.latent) != (other.rtn, other.latent)
    assert held.latent == pytest.approx(start.latent)


def test_best_is_lowest_and_never_one_that_diverged():
    assert testbed.best({0.1: 2.0, 0.2: 1.0, 0.3: 1.5}) == 0.2
    assert testbed.best({0.1: math.nan, 0.2: 3.0, 0.3: math.inf}) == 0.2


def test_grid_table_stars_the_best_and_warns_of_an_edge():
    grid = {"ptq": {0.1: 3.0, 0.2: 1.0, 0.3: 2.0}, "ste": {0.1: 3.0, 0.2: 2.0, 0.3: 1.0}}
    _, _, ptq, ste, *warnings = testbed.grid_table(grid).splitlines()
    assert ptq.split()[-3:] == ["3", "1*", "2"]
    assert ste.split()[-3:] == ["3", "2", "1*"]
    (warning,) = warnings
    assert warning.startswith("warning: STE, scale held is best at an edge of the grid, 0.3")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.1, 0.3], "0.200 ± 0.100"),
        ([0.0123, 0.0123], "0.0123 ± 0.0000"),
        ([250.0, 254.0], "252 ± 2"),
        ([2.5], "2.50"),
        ([0.0], "0"),
        ([3e-12, 3e-12], "3.0e-12"),
        ([math.nan, 1.0], "diverged"),
    ],
)
def test_spread(values, text):
    assert testbed.spread(values) == text


def test_table_gives_mean_error_and_paired_difference():
    rows = []
    for seed in (0, 1):  # the target makes seed 1 worse for both, by the same
        rows += [
            Row("ptq", 0.01, seed, 0.5 + 0.2 * seed, 0.9, 0.0, 1.0),
            Row("lotion_exact", 0.02, seed, 0.2 + 0.2 * seed, 0.3, 0.1, 1.0),
        ]
    header, _, ptq, lotion = testbed.table(rows).splitlines()
    assert header.endswith("RTN above LOTION, exact")
    assert "0.600 ± 0.100" in ptq
    assert ptq.endswith("0.300 ± 0.000")
    assert lotion.split()[:6] == ["LOTION,", "exact", "0.02", "0.300", "±", "0.100"]


def test_plot(tmp_path):
    curve = [(step, 3.0 / step) for step in range(1, 9)]
    testbed.plot({"ptq": [curve], "lotion_exact": [curve, curve]}, "Title", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("command", [COMMANDS[0], pytest.param(COMMANDS[1], marks=pytest.mark.slow)])
def test_quick_run_writes_rows_and_curves(command, tmp_path):
    curves = tmp_path / "curves.png"
    methods = ",".join(testbed.METHODS)
    arguments = ["reproduce", command, "--quick", "--methods", methods, "--json", "--plot", str(curves)]
    arguments += ["--report", f"{tmp_path}/page.html"]
    result = CliRunner().invoke(build(), arguments, catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads(result.stdout)
    assert [(row["method"], row["seed"]) for row in written] == [(m, s) for m in methods.split(",") for s in (0, 1)]
    assert set(written[0]) == {"method", "lr", "seed", "rtn", "rr", "latent", "seconds"}
    assert all(math.isfinite(row["rtn"]) and math.isfinite(row["rr"]) for row in written)
    assert "too short to rank" in result.stderr
    assert curves.exists()
    page = (tmp_path / "page.html").read_text()
    assert all(label in page for label in testbed.LABELS.values()) and f"lotion-fx reproduce {command}" in page


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_method_is_one_line_before_any_training(command):
    result = CliRunner().invoke(build(), ["reproduce", command, "--methods", "ptq,sgd"])
    assert result.exit_code == 2
    assert "unknown method 'sgd'" in result.output
