"""A checkpoint of two ranks is gone on from by another number of them as by these two."""

import warnings

import pytest
import torch
from torch import nn

import lotion_fx
from tests.models import counted
from tests.runtime import launching
from tests.runtime.test_distributed import assert_close

KINDS = {
    "full": {"curvature": "full", "momentum": True},
    "fisher": {"curvature": "fisher", "momentum": False},
    "apart": {"curvature": "fisher", "momentum": True},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    jobs = {
        f"{name}{load}": ("resumed", KINDS[name] | {"folder": str(folder / name), "load": load})
        for name in KINDS
        for load in (False, True)
    }
    for name in KINDS:
        (folder / name).mkdir()
    two = launching.launched(jobs)
    later = {name: job for name, job in jobs.items() if job[1]["load"]}
    return two, {1: launching.launched(later, 1), 2: two, 4: launching.launched(later, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "fisher"])
def test_any_number_of_ranks_goes_on(checkpoints, name):
    saved, loaded = checkpoints
    reference = loaded[2][f"{name}True"][0]
    assert "error" not in reference and "error" not in saved[f"{name}False"][0], reference
    for found in (rank for ranks in loaded.values() for rank in ranks[f"{name}True"]):
        assert "error" not in found, found["error"]
        assert not found["warned"]
        assert_close(found["parameters"], reference["parameters"], 1e-5)


@pytest.mark.slow
def test_a_state_that_each_rank_has_a_part_of_is_refused_elsewhere(checkpoints):
    _, loaded = checkpoints
    refused = [loaded[2]["apartTrue"][1], *loaded[1]["apartTrue"], *loaded[4]["apartTrue"]]
    assert all("curvature='fisher'" in found["error"] and "take AdamW" in found["error"] for found in refused)


def test_a_step_that_only_makes_an_optimizer_s_state_is_none():
    torch.manual_seed(0)
    model = counted(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), "int4", inner="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    state = lotion_fx.state_dict(model)
    assert state["phases"][0]["steps"] == 0 and all(weight["ema"] is None for weight in state["weights"].values())
