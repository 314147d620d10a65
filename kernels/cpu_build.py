"""The C++ kernels of this folder, compiled once on a machine at their first use, and loaded.

A plain C interface, so that one file is compiled in a second or two, without torch's headers, and serves every torch.
The library lies under a hash of all that decides it: source, flags, compiler. It is written to a file of its own and
then renamed: of two processes that build at once, neither loads half of one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

# Processors are told apart at run time, never by the flags: a home directory may be shared by several machines. No sum
# and product is contracted but where the source says so; nobody reads floating-point exceptions, which would keep
# loops that choose from being vectorized.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-trapping-math")
_OPENMP = ("-fopenmp",)
_COMPILERS = ("g++", "clang++", "c++")
_SECONDS = 300  # that a compiler may take


def folder() -> Path:
    """``$XDG_CACHE_HOME/lotion_fx/cpu``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lotion_fx" / "cpu"


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The library of ``<name>.cpp``; None, with one warning, where it cannot be compiled or loaded."""
    try:
        return ctypes.CDLL(str(built(Path(__file__).with_name(f"{name}.cpp"), compiler(), folder())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"{name}: the C++ kernel for CPUs is not there, and products with packed weights take a slow path: {error}",
            stacklevel=2,
        )
        return None


def compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX``, or the first of g++, clang++ and c++ that there is.

    Raises:
        RuntimeError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    found = [named] if named else [[each] for each in _COMPILERS]
    for command in found:
        if shutil.which(command[0]):
            return command
    tried = " ".join(named) if named else ", ".join(_COMPILERS)
    raise RuntimeError(f"no C++ compiler ({tried}); install one, or name it in CXX")


def built(source: Path, command: list[str], into: Path) -> Path:
    """The shared library of a source, compiled unless it lies there already.

    Args:
        command: the compiler's.
        into: the folder of libraries; one for this process alone where it cannot be written.

    Raises:
        RuntimeError: the compiler fails; with its last lines.
    """
    version = subprocess.run([*command, "--version"], capture_output=True, timeout=_SECONDS).stdout
    key = hashlib.sha256(repr((command, version, FLAGS, _OPENMP)).encode() + source.read_bytes()).hexdigest()[:16]
    target = into / f"{source.stem}-{key}.so"
    if target.exists():
        return target
    try:
        into.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=into)
    except OSError:
        target = Path(tempfile.mkdtemp(prefix="lotion_fx")) / target.name
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        _compile(source, command, Path(name))
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _compile(source: Path, command: list[str], target: Path) -> None:
    for threads in (_OPENMP, ()):  # some compilers come without OpenMP
        line = [*command, *FLAGS, *threads, str(source), "-o", str(target)]
        done = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
        if done.returncode == 0:
            return
    raise RuntimeError(f"{shlex.join(line)} failed: {' '.join(done.stderr.split())[-300:]}")
