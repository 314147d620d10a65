"""Objects that raise where something is read of them."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from lotion_fx.attributes import attribute_of, config_of


class Experts(nn.Module):
    """Of which we ask all that we ask of modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)
        self.stack, self.last_g = nn.Parameter(torch.randn(3, 8, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", self.inner(x).relu(), self.stack) @ self.last_g


ASKED = [
    "config",
    "adapter_layer_names",
    "base_layer",
    "is_transposed",
    "last_v",
    "save_pretrained",
    "generation_config",
]


def raising(name: str, error: Exception) -> nn.Module:
    def get(self):
        raise error

    return type("Raising", (Experts,), {name: property(get)})()


def all_tools(model: nn.Module, folder) -> None:
    x, y = torch.randn(4, 8), torch.randn(4, 2)
    lotion_fx.transform(model, "int4", inner="eager")
    lotion_fx.report(model)  # what is read of weights that no graph saw
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    assert {row.format for row in lotion_fx.report(model).rows if row.name == "inner.weight"} == {"int4"}
    model.eval()(x)
    lotion_fx.expected_loss(model, (x, y), F.mse_loss)
    lotion_fx.export(model, folder / "export")


@pytest.mark.parametrize("error", [RuntimeError("not built yet"), KeyError("name"), NotImplementedError()], ids=repr)
@pytest.mark.parametrize("name", ASKED)
def test_a_property_that_raises_is_not_there(name, error, tmp_path):
    all_tools(raising(name, error), tmp_path)


class Values(dict):
    def values(self):
        raise RuntimeError("not to be read")


class Items(list):
    def __iter__(self):
        raise RuntimeError("not to be read")


class Lazy:
    """A proxy that is asked for what it stands for."""

    def __getattribute__(self, name: str):
        raise RuntimeError(f"no {name} yet")


def odd(value) -> nn.Module:
    model = Experts()
    model.held = model.inner.held = value
    return model


@pytest.mark.parametrize(
    "made", [lambda: Values(a=1), lambda: Items([1]), lambda: [Lazy()], lambda: {"lazy": (Lazy(),)}]
)
@pytest.mark.parametrize("trains", [True, False])
def test_a_container_that_raises_does_no_harm(made, trains):
    model = lotion_fx.transform(odd(made()), "int4", inner="eager", method="ste").train(trains)
    model(torch.randn(4, 8))


def test_a_weight_that_such_a_container_holds_is_told_of():
    """What it holds is read past its own ways."""
    model = Experts()
    model.inner.held = Values(view=model.inner.weight.detach()[:4])
    lotion_fx.transform(model, "int4", inner="eager").eval()
    with pytest.warns(UserWarning, match="'inner.weight': inner.held is a view of its values"):
        model(torch.randn(4, 8))


class Everything(Experts):
    """Answers to any name, as modules that forward to what they wrap."""

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "is_made" not in vars(self):
                raise
            return lambda *args: None


def test_a_module_that_answers_to_any_name_is_no_adapter(tmp_path):
    model = Everything()
    model.is_made = True
    lotion_fx.transform(model, "int4", inner="eager").eval()(torch.randn(4, 8))
    assert {row.name for row in lotion_fx.report(model).rows if row.format} >= {"inner.weight", "stack"}
    lotion_fx.export(model, tmp_path / "export")
    assert not (tmp_path / "export" / "config.json").exists()


def test_what_was_raised_is_logged(caplog):
    with caplog.at_level(logging.INFO, "lotion_fx.attributes"):
        assert attribute_of(raising("config", RuntimeError("not built yet")), "config", 3) == 3
        assert attribute_of(nn.Linear(1, 1), "config", 4) == 4
    (record,) = caplog.records
    assert record.getMessage() == "Raising.config raised RuntimeError, and is left out"
    assert "not built yet" in caplog.text


class OtherConfig(dict):
    """Of another library, with the methods of transformers'."""

    vocab_size = 10
    use_cache = True

    @classmethod
    def from_dict(cls, values):
        raise AssertionError("not ours to call")

    to_dict = from_dict


def test_a_configuration_is_transformers_where_it_is_an_instance_of_its(tmp_path):
    model = Experts()
    model.config, model.save_pretrained = OtherConfig(), lambda folder: None
    assert config_of(model) is None
    lotion_fx.transform(model, "int4", inner="eager")
    model(torch.randn(4, 8)).sum().backward()
    lotion_fx.export(model, tmp_path / "export")
    assert not (tmp_path / "export" / "config.json").exists()
    transformers = pytest.importorskip("transformers")
    model.config = transformers.GPT2Config()
    assert config_of(model) is model.config
