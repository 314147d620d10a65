"""A pretrained setting of `benchmarks/accuracy.py`: recipes start from its weights, which are full precision's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import pytest
import torch
from accuracy import encoder, runs
from accuracy.recipes import RECIPES
from accuracy.training import Trainings
from torch import Tensor, nn

import lotion_fx


@dataclass(frozen=True)
class Small(encoder.Encoder):
    """The encoder's way with a net of two layers on random inputs."""

    def make(self, seed: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))

    @cached_property
    def _data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        draw, teacher = torch.Generator().manual_seed(0), self.make(0)
        windows = [torch.randn(count, 32, generator=draw) for count in (1000, self.windows)]
        with torch.no_grad():
            return windows[0], teacher(windows[0]), windows[1], teacher(windows[1])


@pytest.fixture
def trainings(tmp_path) -> Trainings:
    return Trainings(Small(steps=6, windows=64, inner="aot_eager"), tmp_path)


def found(trainings: Trainings, recipe: str, rounding: str = "nearest") -> runs.log.Run:
    return runs.run(runs.Job(trainings.setting, "int3", recipe, rounding, 0), trainings)


def test_full_precision_is_what_was_pretrained(trainings):
    setting = trainings.setting
    assert found(trainings, "ptq").full_precision == 0 < found(trainings, "ptq").loss
    assert found(trainings, "ptq", "two_sided").loss < 0.7 * found(trainings, "ptq").loss
    assert {job.recipe for job in runs.jobs(setting, ["int3"], ["late_adaptive", "ptq"], 1)} == {"ptq"}


ROUNDED = {"rounded_ste": "two_sided", "rounded_rest": "descent", "searched_rest": "descent_searched"}
ROUNDED |= {"ste_clipped": "searched", "lsq_clipped": "searched"}


@pytest.mark.parametrize("name", ["ste_from_fp", *ROUNDED, "lsq", "adaptive"])
def test_training_begins_at_the_pretrained_weights(trainings, name, monkeypatch):
    """With no step done, each recipe is the rounding that it starts from."""
    monkeypatch.setattr(Small, "fit", lambda *args, **kwargs: 0.0)
    start = found(trainings, name).loss
    expected = found(trainings, "ptq", ROUNDED.get(name, "nearest")).loss
    assert start == pytest.approx(expected, rel=1e-5)


def test_the_rest_learns_while_rounded_weights_are_held(trainings):
    trained = trainings.trained("rounded_rest", "int3", 0).state
    rounded = trainings.rounded(trainings.full_precision(0).state, "int3", "descent", 0, "ptq")[0].state_dict()
    assert {name for name, value in trained.items() if torch.equal(value, rounded[name])} == {"0.weight", "2.weight"}


def test_a_phase_of_plain_training_lies_behind_and_the_term_draws_labels(trainings, monkeypatch):
    told = []
    transform = lotion_fx.transform
    monkeypatch.setattr(lotion_fx, "transform", lambda *args, **more: (told.append(more), transform(*args, **more))[1])
    assert found(trainings, "ste_from_fp").loss != found(trainings, "ptq").loss
    found(trainings, "lotion")
    trained = [more for more in told if "steps" in more]
    assert [more.get("schedule") for more in trained] == [(("ste_scale", pytest.approx(1.0)),), None]
    assert trained[1]["curvature"] == "ggn" and "curvature" not in trained[0]
    assert RECIPES["ste_from_fp"].arguments["schedule"][0] == ("plain", 0.6)


def test_windows_are_whole_and_between_the_encoders_own_tokens(tmp_path):
    path, broken = tmp_path / "a.py", tmp_path / "b.py"
    path.write_text('"""Module."""\ndef f():\n    """Function."""\nclass C:\n    pass\n')
    broken.write_text("def (")
    assert encoder.docstrings([path, broken]) == ["Module.\n\nFunction."]

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}

    words = SimpleNamespace(cls_token_id=-1, sep_token_id=-2)
    call = type("Tokenizer", (), {"__call__": staticmethod(tokenizer), **vars(words)})()
    made = encoder.windows(["x" * 65, "", "x" * 29], call)
    assert made.tolist() == [[-1, *range(at, at + 30), -2] for at in (0, 30)]
