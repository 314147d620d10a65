"""What takes long to compile is announced, once for a call."""

import time

import pytest
import torch

import lotion_fx
from lotion_fx import announcing
from lotion_fx.announcing import Announcer
from tests.models import MLP


def test_a_long_compile_is_announced_while_it_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(announcing, "PATIENCE", 0.05)
    announcer = Announcer()
    with announcer.compiling("one graph"):
        time.sleep(0.3)
        assert [record.getMessage().partition(",")[0] for record in caplog.records] == ["compiling one graph"]
    with announcer.compiling("another"):
        time.sleep(0.1)
    assert len(caplog.records) == 1
    announcer.new_call()
    with announcer.compiling("a third"):
        time.sleep(0.3)
    assert "a third" in caplog.records[1].getMessage()


def test_many_short_ones_are_announced_together_and_few_are_not(monkeypatch, caplog):
    monkeypatch.setattr(announcing, "PATIENCE", 0.25)
    announcer = Announcer()
    with announcer.compiling("a"):
        time.sleep(0.15)
    time.sleep(0.3)
    assert not caplog.records
    with announcer.compiling("b"):
        time.sleep(0.3)
    assert "compiling b" in caplog.records[0].getMessage()


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "lotion_fx"]


@pytest.mark.parametrize("finishing", [False, True])
def test_a_model_announces_its_graphs(finishing, monkeypatch, caplog):
    torch.compiler.reset()
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager")
    model(torch.randn(4, 20)).sum().backward()
    caplog.clear()
    monkeypatch.setattr(announcing, "PATIENCE", 0.0)
    if finishing:
        lotion_fx.finish(model)
        model(torch.randn(4, 20))
        assert "a graph of phase 'finish'" in said(caplog)[0]
    else:
        model(torch.randn(4, 20))
        assert not said(caplog)  # it is compiled


@pytest.mark.parametrize("regions", [None, "blocks"])
def test_who_waits_for_many_alike_blocks_is_told_of_regions(regions, monkeypatch, caplog):
    torch.compiler.reset()
    monkeypatch.setattr(announcing, "PATIENCE", 0.0)
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()) for _ in range(5)))
    lotion_fx.transform(model, "int4/8", inner="aot_eager", regions=regions)
    model(torch.randn(4, 8))
    assert said(caplog)
    assert ("regions='blocks' compiles one of its 5 alike blocks" in said(caplog)[0]) == (regions is None)
