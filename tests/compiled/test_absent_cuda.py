"""Every private name that `kernels.absent_cuda` replaces is there, and is what the mock takes it for."""

import inspect
from dataclasses import replace

import pytest
import torch
import triton

from lotion_fx.kernels.emit.absent_cuda import CACHES, MOCKS, Mock, absent_cuda, resolve
from lotion_fx.kernels.targets import TARGETS
from tests.harness.versions import needs_emission

KINDS = {
    "function": lambda found, held: inspect.isfunction(found) or inspect.isbuiltin(found),
    "static method": lambda found, held: isinstance(held, staticmethod),
    "method": lambda found, held: inspect.isroutine(held) and not isinstance(held, (staticmethod, classmethod)),
    "class": lambda found, held: inspect.isclass(found),
    "value": lambda found, held: not callable(found),
}


def check(mock: Mock) -> None:
    where = f"torch {torch.__version__}, triton {triton.__version__}: {mock.owner}.{mock.name}"
    owner = resolve(mock.owner)
    assert hasattr(owner, mock.name), f"{where} is gone; kernels/absent_cuda.py replaces it because {mock.why}"
    found, held = getattr(owner, mock.name), inspect.getattr_static(owner, mock.name)
    assert KINDS[mock.kind](found, held), f"{where} is no {mock.kind} any more, but {found!r}; {mock.why}"


@pytest.mark.parametrize("mock", MOCKS, ids=lambda mock: f"{mock.owner}.{mock.name}")
def test_what_is_mocked_is_there(mock):
    check(mock)


@pytest.mark.parametrize("mock", MOCKS, ids=lambda mock: f"{mock.owner}.{mock.name}")
def test_a_name_that_is_gone_or_another_is_named(mock):
    with pytest.raises(AssertionError, match=f"{mock.name}_gone is gone; .*because {mock.why}"):
        check(replace(mock, name=f"{mock.name}_gone"))
    other = "value" if mock.kind != "value" else "function"
    with pytest.raises(AssertionError, match=f"{mock.name} is no {other} any more"):
        check(replace(mock, kind=other))


def test_the_caches_are_where_they_were():
    for owner in CACHES:
        held = [getattr(value, "__func__", value) for value in vars(resolve(owner)).values()]
        assert any(hasattr(value, "cache_clear") for value in held), (
            f"torch {torch.__version__}: {owner} caches nothing"
        )


@needs_emission
def test_inside_there_is_one_device_of_the_architecture():
    for arch in TARGETS:
        with absent_cuda(arch):
            properties = torch.cuda.get_device_properties(0)
            assert (properties.major, properties.minor) == (arch // 10, arch % 10)
            assert properties.multi_processor_count == TARGETS[arch].multiprocessors
            assert triton.runtime.driver.active.get_current_target().arch == arch
            assert torch._inductor.runtime.hints.DeviceProperties.create(torch.device("cuda", 0)).cc == arch


@needs_emission
def test_outside_nothing_is_left():
    before = [getattr(resolve(mock.owner), mock.name) for mock in MOCKS]
    with absent_cuda(80):
        pass
    assert [getattr(resolve(mock.owner), mock.name) for mock in MOCKS] == before
