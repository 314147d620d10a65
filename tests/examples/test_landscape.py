"""The one-dimensional landscape: its curves, minima, table and command."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from lotion_fx.cli import build
from lotion_fx.examples import landscape
from lotion_fx.numerics.formats import resolve
from lotion_fx.numerics.noise import noises, resolve_noise

SHIPPED = [name for name in noises() if not name.startswith("test_")]


@pytest.mark.parametrize("noise", SHIPPED)
@pytest.mark.parametrize("fmt", ["int4", "fp4", "nf4", "nvfp4", "mxfp4/floor", "int3/tensor"])
def test_smoothing_keeps_the_minima(fmt, noise):
    found = landscape.curves(resolve(fmt), resolve_noise(noise))
    at_level = (found.w[:, None] == found.levels).any(1)
    assert torch.equal(found.smoothed[at_level], found.quantized[at_level])
    assert found.smoothed.min() == found.quantized.min()
    quantized, smoothed = landscape.best(rows := landscape.minima(found))
    assert quantized is smoothed
    assert all(row.of_quantized == row.of_smoothed for row in rows)
    assert quantized.quantized == landscape.loss(found.levels).min()


def test_slopes():
    """Between levels: the secant's under randomized rounding; what is trained is near it where the grid is fine."""
    found = landscape.curves(resolve("int8"), resolve_noise("randomized"))
    low = (torch.searchsorted(found.levels, found.w, right=True) - 1).clamp(0, len(found.levels) - 2)
    values = landscape.loss(found.levels)
    secant = ((values[1:] - values[:-1]) / (found.levels[1:] - found.levels[:-1]))[low]
    middle = (found.w[:, None] - found.levels).abs().amin(1) > 1e-3
    torch.testing.assert_close(found.slope[middle], secant[middle], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.trained[middle], secant[middle], rtol=0.02, atol=0.02)


def test_lowest_takes_the_first_of_a_run():
    values = torch.tensor([2.0, 1.0, 1.0, 3.0, 0.0, 0.0, 0.0, 4.0, 3.0])
    assert landscape.lowest(values).nonzero().flatten().tolist() == [1, 4, 8]


def test_verdict_tells_a_difference():
    rows = [landscape.Minimum(0.1, 1.0, 2.0, True, True), landscape.Minimum(0.2, 1.5, 1.5, False, True)]
    assert landscape.verdict(rows) == "The global minima differ: weight 0.1000 quantized, 0.2000 smoothed."
    assert landscape.table(rows).splitlines()[2].split() == ["0.1000", "1.0000", "2.0000", "global", "local"]


def test_command(tmp_path):
    plot = tmp_path / "landscape.png"
    arguments = ["reproduce", "landscape", "--fmt", "fp4", "--noise", "smoothstep", "--plot", str(plot), "--json"]
    arguments += ["--report", f"{tmp_path}/landscape.html"]
    result = CliRunner().invoke(build(), arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "The global minima agree" in result.stderr
    assert plot.read_bytes()[1:4] == b"PNG"
    page = (tmp_path / "landscape.html").read_text()
    assert "The global minima agree" in page and "reproduce landscape --fmt fp4 --noise smoothstep" in page
    assert set(json.loads(result.stdout)[0]) == {"w", "quantized", "smoothed", "of_quantized", "of_smoothed"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise", "smothstep"], "did you mean smoothstep"),
        (["--fmt", "int44"], "unknown format"),
        (["--fmt", "int4/1"], "a scale of its own"),
        (["--plot", "/nowhere/at/all.png"], "there is no folder"),
    ],
)
def test_bad_options(arguments, message):
    result = CliRunner().invoke(build(), ["reproduce", "landscape", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
