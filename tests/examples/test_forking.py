"""Trainings that go on from a plain checkpoint: what is plain in a schedule, and that nothing is lost on the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lotion_fx.examples import quickstart
from lotion_fx.examples.forking import Checkpoint, after_plain


def test_the_rest_of_a_schedule_is_a_training_of_its_own():
    share, rest = after_plain({"schedule": (("plain", 0.6), ("lotion", 0.2), ("ste_scale", 0.2)), "strength": 2.0})
    assert share == 0.6
    assert rest["strength"] == 2.0
    assert [name for name, _ in rest["schedule"]] == ["lotion", "ste_scale"]
    assert [part for _, part in rest["schedule"]] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "lotion", "finish": 0.4},
        {"schedule": (("lotion", 0.6), ("plain", 0.4))},
        {"schedule": (("plain", 1.0),)},
        {"schedule": "auto"},
    ],
)
def test_what_does_not_begin_plainly_and_go_on_is_left_whole(arguments):
    assert after_plain(arguments) == (0.0, arguments)


def steps(begin: int, end: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep=lambda step: None) -> None:
    text = torch.arange(2000) * 7 % quickstart.VOCAB
    quickstart.fit(model, 0, end, text, keep, optimizer=optimizer, begin=begin)


def test_a_training_that_goes_on_is_the_one_that_never_stopped():
    """Bit for bit: batches, learning rates, Adam's moments and weights."""
    torch.manual_seed(0)
    whole = quickstart.GPT(width=16, depth=1, heads=2)
    optimizer = quickstart.adam(whole.parameters())
    kept: list[Checkpoint] = []
    steps(
        0, 9, whole, optimizer, lambda step: kept.append(Checkpoint.of(step, whole, optimizer)) if step == 4 else None
    )

    model = quickstart.GPT(width=16, depth=1, heads=2)
    model.load_state_dict(kept[0].model)
    resumed = quickstart.adam(model.parameters())
    kept[0].resume(resumed, model.parameters())
    steps(kept[0].step, 9, model, resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    moved = [not torch.equal(value, kept[0].model[name]) for name, value in model.state_dict().items()]
    assert all(moved)
