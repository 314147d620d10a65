"""`lotion-fx doctor`: what is there, and what is missing, each thing taken away in turn."""

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

from lotion_fx import doctor

OLD_PYTHON = SimpleNamespace(version_info=(3, 9, 1), version="3.9.1 (of 2020)")


def found(name: str) -> doctor.Check:
    return next(check for check in doctor.examine().checks if check.name == name)


def test_a_machine_that_runs_these_tests_is_fit():
    told = doctor.examine()
    assert told.is_fit and str(told).endswith("training runs here")
    assert found("torch").found == torch.__version__ and "analytic" in found("a training step").found


@pytest.mark.parametrize(
    ("name", "break_it", "advice"),
    [
        ("Python", lambda patch: patch.setattr(doctor, "sys", OLD_PYTHON), "3.10 or later"),
        ("torch", lambda patch: patch.setattr(torch, "__version__", "2.10.1+cpu"), "pip install 'torch>=2.11'"),
        ("C++ compiler", lambda patch: patch.setenv("CXX", "no-such-compiler"), "there is no no-such-compiler"),
        ("C++ compiler", lambda patch: patch.setattr(doctor, "PROBE", "#include <no_such.h>"), "no_such.h"),
        ("a training step", lambda patch: patch.setattr(doctor, "transform", None), "torch.compile fails"),
    ],
)
def test_what_training_needs_makes_it_unfit(name, break_it, advice, monkeypatch):
    break_it(monkeypatch)
    told = doctor.examine()
    check = next(check for check in told.checks if check.name == name)
    assert check.found is None and check.is_required and advice in check.advice
    assert not told.is_fit and str(told).endswith(f"not all that training needs is here: {name}")


def test_a_later_torch_is_fit_and_said_to_be_untested(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.15.0")
    assert found("torch").found == "2.15.0" and "last that was tested" in found("torch").advice


def test_what_is_optional_says_how_to_get_it(monkeypatch):
    version = importlib.metadata.version

    def without_clients(name):
        if name in ("gguf", "llama-cpp-python"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", without_clients)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = {check.name: check for check in doctor.examine().checks}
    assert told["gguf"].found is None and told["gguf"].advice == "pip install 'lotion_fx[export]'"
    assert told["llama-cpp-python"].advice == "pip install llama-cpp-python"
    assert told["GPU"].found is None and not any(told[name].is_required for name in ("gguf", "GPU"))
    assert doctor.examine().is_fit


def test_every_extra_that_is_named_brings_what_it_is_named_for():
    from tests.test_release import PYPROJECT

    extras = PYPROJECT["project"]["optional-dependencies"]

    def brought(extra):
        held = extras[extra]
        inner = [one.removeprefix("lotion_fx[").rstrip("]") for one in held if one.startswith("lotion_fx[")]
        return " ".join([*held, *map(brought, inner)])

    for name, _, source in doctor.OPTIONAL:
        assert " " in source or name in brought(source), name
