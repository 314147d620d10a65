"""PyTorch's private interfaces to compiling in one of several threads, see `private`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._dynamo.convert_frame import compile_lock


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside, this thread alone compiles, as where Dynamo does: under its lock, and with its flag up.

    Without the flag FX's own, which is every thread's, would forbid the others to call compiled code meanwhile.
    """
    with compile_lock:
        before = torch.compiler._is_compiling_flag
        torch.compiler._is_compiling_flag = True
        try:
            yield
        finally:
            torch.compiler._is_compiling_flag = before
