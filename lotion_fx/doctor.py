"""What this machine can run: what training needs, what else there is, and how to get what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

from lotion_fx.coverage import report
from lotion_fx.progress import with_a_bar
from lotion_fx.transformation import transform

OLDEST, NEWEST = (2, 11), (2, 14)  # of torch: what the tests run under

# Distribution, what it is for, and what brings it.
OPTIONAL = [
    ("triton", "kernels on a GPU, `lotion-fx kernels`", "comes with torch on Linux"),
    *((name, "the examples and `lotion-fx reproduce`", "examples") for name in ("tqdm", "matplotlib", "scikit-learn")),
    ("transformers", "checkpoints, layouts compressed-tensors, torchao, modelopt, bitsandbytes", "test"),
    ("compressed-tensors", "layouts compressed-tensors and modelopt", "export"),
    ("torchao", "layout torchao", "export"),
    ("bitsandbytes", "layout bitsandbytes", "export"),
    ("gguf", "layout gguf", "export"),
    ("llama-cpp-python", "layout gguf, read by llama.cpp", "pip install llama-cpp-python"),
    *((name, "layout onnx", "export") for name in ("onnx", "onnxscript", "onnxruntime")),
    ("openvino", "layout onnx, read by OpenVINO", "export"),
    *((name, "the examples of docs/pipelines.md", "pipelines") for name in ("accelerate", "lightning", "peft", "trl")),
]

# What Inductor includes in the C++ that it writes.
PROBE = "#include <Python.h>\n#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


@dataclass(frozen=True)
class Check:
    """One thing that was looked for.

    Args:
        name: of it.
        found: what there is; None where it is missing or does not work.
        needed_for: what does without it.
        is_required: whether training needs it.
        advice: how to get it; empty where it is there.
    """

    name: str
    found: str | None
    needed_for: str
    is_required: bool = False
    advice: str = ""


@dataclass(frozen=True)
class Examination:
    """All that was looked for. ``str()`` is a table."""

    checks: tuple[Check, ...]

    @property
    def is_fit(self) -> bool:
        """Whether all that training needs is there."""
        return all(check.found is not None for check in self.checks if check.is_required)

    def __str__(self) -> str:
        rows = [
            [check.name, check.found or ("MISSING" if check.is_required else "-"), check.needed_for, check.advice]
            for check in self.checks
        ]
        widths = [None, 40, 44, 60]
        table = tabulate(rows, ["", "found", "for", "to get it"], disable_numparse=True, maxcolwidths=widths)
        lacking = [check.name for check in self.checks if check.is_required and check.found is None]
        foot = f"not all that training needs is here: {', '.join(lacking)}" if lacking else "training runs here"
        return f"{table}\n{foot}"


def examine() -> Examination:
    """Looks for all of it; takes seconds, as a model is transformed and a line of C++ compiled."""
    looks: list[Callable[[], Check]] = [
        _python,
        _torch,
        _training,
        _compiler,
        _gpu,
        *(partial(_optional, entry) for entry in OPTIONAL),
    ]
    return Examination(tuple(look() for look in with_a_bar("looking", looks, len(looks))))


def _python() -> Check:
    has = sys.version_info >= (3, 10)
    advice = "" if has else f"Python {sys.version.split()[0]} is too old: 3.10 or later"
    return Check("Python", sys.version.split()[0] if has else None, "everything", True, advice)


def _torch() -> Check:
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST:
        advice = f"torch {torch.__version__} is too old: pip install 'torch>={OLDEST[0]}.{OLDEST[1]}'"
        return Check("torch", None, "everything", True, advice)
    later = f"later than {NEWEST[0]}.{NEWEST[1]}, the last that was tested" if found > NEWEST else ""
    return Check("torch", torch.__version__, "everything", True, later)


def _training() -> Check:
    """A layer under each kind of forward, through the graphs that training compiles, without Inductor."""

    def run() -> str:
        model = transform(nn.Linear(32, 8), "int4", inner="aot_eager", calibrate=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(4, 32)).square().mean().backward()
        optimizer.step()
        return f"one layer, one step: {report(model)['weight'].estimator}"

    advice = "torch.compile fails on one linear layer: {}"
    return _tried("a training step", "everything", run, advice)


def _compiler() -> Check:
    """A C++ compiler with OpenMP and Python's headers, which is what Inductor wants on a CPU."""

    def run() -> str:
        wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        compiler = next((path for path in map(shutil.which, wanted) if path), None)
        if compiler is None:
            raise FileNotFoundError(f"there is no {' or '.join(wanted)}")
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(PROBE)
            command = [compiler, "-fopenmp", "-I", sysconfig.get_path("include"), "-c", str(source), "-o", os.devnull]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError((done.stderr.strip() or f"{compiler} ended with {done.returncode}").splitlines()[0])
        return compiler

    advice = "{}; apt install g++ python3-dev, or set CXX; until then inner='aot_eager' trains, more slowly"
    return _tried("C++ compiler", "compiled steps and packed products on a CPU", run, advice)


def _tried(name: str, needed_for: str, run: Callable[[], str], advice: str) -> Check:
    try:
        return Check(name, run(), needed_for, True)
    except Exception as error:  # whatever it is, it is what there is to tell
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Check(name, None, needed_for, True, advice.format(told))


def _gpu() -> Check:
    needed_for = "compiled steps on a GPU"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return Check("GPU", f"{torch.cuda.get_device_name()}, sm_{major}{minor}", needed_for)
    built = "this torch is built without CUDA" if torch.version.cuda is None else "no device is seen by CUDA"
    return Check("GPU", None, needed_for, False, f"{built}; all but kernels runs on a CPU")


def _optional(entry: tuple[str, str, str]) -> Check:
    name, needed_for, source = entry
    try:
        return Check(name, version(name), needed_for)
    except PackageNotFoundError:
        advice = source if " " in source else f"pip install 'lotion_fx[{source}]'"
        return Check(name, None, needed_for, False, advice)
