"""PyTorch's private interfaces to what is compiled ahead of time, see `private`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor import aoti_compile_and_package, aoti_load_package


def compile_package(program: torch.export.ExportedProgram, path: str) -> None:
    """Compiles an exported program into a .pt2 file, its constants as they are: freezing would make them dense."""
    options = {"freezing": False, "aot_inductor.use_runtime_constant_folding": False}
    aoti_compile_and_package(program, package_path=path, inductor_configs=options)


def load_package(path: str) -> Callable[..., Any]:
    """The function that a .pt2 file holds."""
    loaded: Callable[..., Any] = aoti_load_package(path)
    return loaded


def constants_of(library: str) -> dict[str, Tensor]:
    """The constants of a library for CPUs out of such a file, by their names in the program."""
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(library, 1)
    return {name: constant.clone() for name, constant in runner.extract_constants_map(False).items()}
