"""Every private name that `kernels.absent_cuda` replaces is there, and is what the mock takes it for."""

import inspect
from dataclasses import replace

import pytest
import torch
import triton

from lotion_fx.kernels.absent_cuda import CACHES, MOCKS, Mock, absent_cuda, resolve
from lotion_fx.kernels.targets import TARGETS

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
