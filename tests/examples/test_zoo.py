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


def test_a_sample_of_transformers_passes(tmp_path) -> None:
    pytest.importorskip("transformers")
    sample = "--kind", "transformers", "--only", "llama,bert", "--checks", "train,eval,silent"
    rows, _ = run(tmp_path, *sample)
    assert len(rows) == 2
    for row in rows.values():
        assert row["passed"], row["cause"]
        assert row["breaks"] <= 0 and row["elements"]["analytic"] > 1000 and not row["elements"]["out"]


BAD = """
import os, time
import torch
from torch import nn
from zoo_entry import Entry, normal

def die():
    os._exit(3)

def sleep():
    time.sleep(600)

class Deaf(nn.Linear):
    def __init__(self):
        super().__init__(16, 16)
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls

make = lambda: nn.Linear(16, 4)
ENTRIES = [Entry("bad_models", name, made, normal((3, 16))) for name, made in
           {"first": make, "dies": die, "raises": lambda: 1 / 0, "sleeps": sleep, "drifts": Deaf, "last": make}.items()]
"""


def test_one_bad_model_loses_no_other(tmp_path) -> None:
    (tmp_path / "bad_models.py").write_text(BAD)
    markdown = tmp_path / "zoo.md"
    checks = "--checks", "train,eval", "--limit", "10", "--markdown", str(markdown)
    rows, printed = run(tmp_path, "--kind", "bad_models", *checks, path=str(tmp_path))
    passed = {name for name, row in rows.items() if row["passed"]}
    assert passed == {"first", "last"} and len(rows) == 6
    assert rows["dies"]["cause"] == rows["sleeps"]["cause"] == "it died, or took more than 10.0 s"
    assert "division by zero" in rows["raises"]["cause"] and "differs by" in rows["drifts"]["checks"]["eval"]
    assert "bad_models: 2/6 passed" in printed and "| drifts " in markdown.read_text()


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


def test_a_zoo_is_as_large_as_it_says(benchmark) -> None:
    entries = benchmark("zoo_plain").ENTRIES
    assert len({entry.name for entry in entries}) == len(entries) >= 60
    for entry in entries[::10]:
        assert entry.make.__doc__ or entry.name
