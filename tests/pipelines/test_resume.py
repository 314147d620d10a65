"""Trainer, Lightning and Accelerate resume bit for bit, in the middle of a finishing phase, with no line added."""

import pytest
import torch

import lotion_fx


def assert_equal(resumed, whole):
    for (name, mine), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert lotion_fx.report(resumed).to_dict() == lotion_fx.report(whole).to_dict()
    phases = [lotion_fx.state_dict(model)["phases"][0] for model in (resumed, whole)]
    assert phases[0]["phase"] == "finish" and phases[0]["steps"] == phases[1]["steps"]
    estimators = {row.estimator for row in lotion_fx.report(whole).rows if row.format}
    assert estimators == {"analytic"}


def test_accelerate():
    pytest.importorskip("accelerate")
    from lotion_fx.examples import with_accelerate

    whole = with_accelerate.main("whole", steps=48)
    with_accelerate.main("half", steps=32)
    assert_equal(with_accelerate.main("half", steps=16, resume=True), whole)


def test_trainer():
    pytest.importorskip("transformers")
    from lotion_fx.examples import with_trainer

    whole = with_trainer.main("whole", steps=40)
    with_trainer.main("half", steps=30)
    assert_equal(with_trainer.main("half", steps=40, resume=True), whole)


def test_lightning():
    pytest.importorskip("lightning")
    from lotion_fx.examples import with_lightning

    whole = with_lightning.main("whole", epochs=4)
    with_lightning.main("half", epochs=3)
    assert_equal(with_lightning.main("rest", epochs=4, checkpoint="half/last.ckpt"), whole)
