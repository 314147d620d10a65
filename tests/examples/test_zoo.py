"""`benchmarks/zoo.py`: a sample of its models, its judge on a module with a plain answer, bad models among good."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    """A module of the benchmarks' folder, as the command imports it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return lambda name: __import__(name)


def run(tmp_path: Path, *arguments: str, path: str = "") -> tuple[dict[str, dict], str]:
    """Each model's row, and what the command printed."""
    command = [sys.executable, ROOT / "benchmarks" / "zoo.py", *arguments, "--json", tmp_path / "rows.json"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}, done.stdout


SAMPLE = "Perceptron,SwiGLU,UNet,Attention,Rotary,LanguageModel,GatheredExperts,LoRA,FrozenLoRA,TiedHead,GraphBreak"


def test_a_sample_of_the_plain_modules_passes(tmp_path) -> None:
    rows, printed = run(tmp_path, "--kind", "plain", "--only", SAMPLE, "--checks", "train,eval,eager,silent")
    assert rows.keys() == set(SAMPLE.split(","))
    for name, row in rows.items():
        assert row["passed"], row["cause"]
        elements = {share: count for share, count in row["elements"].items() if count}
        assert elements.keys() == ({"analytic", "frozen"} if name == "FrozenLoRA" else {"analytic"}), (name, elements)
    assert f"plain: {len(rows)}/{len(rows)} passed; 100.00% of product weights analytic or exact" in printed


@pytest.mark.slow
def test_a_sample_of_transformers_passes(tmp_path) -> None:
    pytest.importorskip("transformers")
    sample = "--kind", "transformers", "--only", "bert,mixtral", "--checks", "train,eval,silent"
    rows, _ = run(tmp_path, *sample)
    assert len(rows) == 2
    for row in rows.values():
        assert row["passed"], row["cause"]
        assert row["breaks"] <= 0 and row["elements"]["analytic"] > 1000 and not row["elements"]["out"]


BAD = """
import os, time
from torch import nn
from zoo_entry import Entry, normal

class Drifts(nn.Linear):
    def __init__(self):
        super().__init__(16, 16)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls

MODELS = {
    "first": lambda: nn.Linear(16, 4),
    "dies": lambda: os._exit(3),
    "raises": lambda: 1 / 0,
    "sleeps": lambda: time.sleep(600),
    "drifts": lambda: Drifts(),
    "last": lambda: nn.Linear(16, 4),
}
ENTRIES = [Entry("bad_models", name, make, normal((3, 16))) for name, make in MODELS.items()]
"""


def test_one_bad_model_loses_no_other(tmp_path) -> None:
    (tmp_path / "bad_models.py").write_text(BAD)
    markdown = tmp_path / "zoo.md"
    only = "--only", "first,dies,raises,drifts,last", "--checks", "train,eval"
    rows, printed = run(tmp_path, "--kind", "bad_models", *only, "--markdown", str(markdown), path=str(tmp_path))
    assert {name for name, row in rows.items() if row["passed"]} == {"first", "last"} and len(rows) == 5
    assert rows["dies"]["cause"].startswith("it died") and "division by zero" in rows["raises"]["cause"]
    assert "differs by" in rows["drifts"]["checks"]["eval"]
    assert "bad_models: 2/5 passed" in printed and "| drifts " in markdown.read_text()


@pytest.mark.slow
def test_a_model_that_takes_too_long_is_one_row_and_what_passed_is_kept(tmp_path) -> None:
    (tmp_path / "bad_models.py").write_text(BAD)
    sleeping = "--kind", "bad_models", "--only", "first,sleeps,last", "--checks", "train", "--limit", "40", "--resume"
    rows, first = run(tmp_path, *sleeping, path=str(tmp_path))
    assert {name: row["passed"] for name, row in rows.items()} == {"first": True, "sleeps": False, "last": True}
    assert rows["sleeps"]["cause"] == "it died, or took more than 40.0 s"
    rows, second = run(tmp_path, *sleeping, path=str(tmp_path))
    assert len(rows) == 3 and "bad_models first: passed" in first and "bad_models first: passed" not in second


class Judged(nn.Module):
    """One parameter a way; those that meet a product say so in their names."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.positions, self.scale = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))
        self.meets_low, self.meets_high = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
        self.meets_by_cat, self.meets_by_mask = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(2, 8))
        self.meets_queries = nn.Parameter(torch.randn(3, 8))
        self.register_buffer("mask", torch.ones(2, 8))

    def forward(self, ids):
        x = (self.table(ids) + self.positions) * self.scale
        x = self.head(x) + nn.functional.linear(x, self.meets_high @ self.meets_low)
        x = x + torch.cat([x @ torch.cat([self.meets_by_cat, self.meets_by_mask * self.mask]).T] * 2, -1)
        return self.meets_queries @ x.mT


def test_the_judge_follows_parameters_to_products(benchmark) -> None:
    model = Judged()
    found = benchmark("zoo_products").meets_products(model, (torch.randint(9, (2, 4)),), {})
    assert found == {"head.weight"} | {name for name, _ in model.named_parameters() if name.startswith("meets")}


def test_names_are_unique_and_enough(benchmark) -> None:
    names = [entry.name for entry in benchmark("zoo_plain").ENTRIES]
    assert len(set(names)) == len(names) >= 60
