"""Pipelines as users write them: the examples, run through the graph alone, with the warnings that they all raise."""

from functools import partial

import pytest

import lotion_fx


@pytest.fixture(autouse=True)
def graph_alone(monkeypatch, tmp_path):
    """No C++ is compiled, and nothing is written but under ``tmp_path``."""
    monkeypatch.setattr(lotion_fx, "transform", partial(lotion_fx.transform, inner="aot_eager"))
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_DISABLED"):
        monkeypatch.setenv(name, "1")


def pytest_collection_modifyitems(items):
    for item in items:
        if "pipelines" in item.path.parts:
            for text in (
                "ignore::FutureWarning",
                "ignore::DeprecationWarning",
                "ignore:.*:UserWarning:(torch|lightning)",
            ):
                item.add_marker(pytest.mark.filterwarnings(text))
