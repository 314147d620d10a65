"""Files and folders written whole or not at all: a reader finds the old one or the new one, never a mixture.

What is written grows under a name of its own beside the target, is flushed to the disk, and then takes the target's
name in one step. What a killed process left of such a name is removed by the next one that writes to the same target.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

MARK = "lotion_fx.json"
"""The file by which a folder is known as an export of ours: JSON, which names all others under ``files``."""
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str], *, is_folder: bool) -> Iterator[Path]:
    """Gives a place to write to, which stands at ``path`` when the block ends; if it raises, ``path`` is as it was.

    Args:
        path: where a former export may be. A link is followed.
        is_folder: whether a folder is written, else a file.

    Raises:
        ValueError: something else is there, which must not be lost.
        OSError: it cannot be written; says what ``path`` was.
    """
    target = Path(path).expanduser().resolve()
    _check(target, is_folder)
    place = target.parent / f".{target.name}.lotion_fx-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
        if is_folder:
            place.mkdir()
        else:
            place.touch()
            place.unlink()
    except OSError as error:
        why = (
            f"path={str(target)!r}: nothing can be written there ({error.strerror}); name a place in a writable folder"
        )
        raise OSError(error.errno, why) from error
    try:
        yield place
        _flush(place)
        _check(target, is_folder)
        _move(place, target)
    finally:
        _remove(place)
    _flush_folder(target.parent)


def _check(target: Path, is_folder: bool) -> None:
    if not os.path.lexists(target):
        return
    if is_folder != target.is_dir():
        has = "a folder" if target.is_dir() else "a file"
        raise ValueError(f"path={str(target)!r}: there is {has} of this name; expected {_expected(is_folder)}")
    if is_folder and target in (here := Path.cwd(), *here.parents):
        raise ValueError(
            f"path={str(target)!r}: the folder that this program runs in would be replaced; give a new folder in it"
        )
    if is_folder and (others := _others(target)):
        raise ValueError(
            f"path={str(target)!r}: this folder holds other files than an export, such as {others[0]!r}, which would "
            "be lost; give a new or an empty folder"
        )
    if not is_folder and not target.is_file():
        raise ValueError(f"path={str(target)!r}: this is no plain file; expected {_expected(is_folder)}")


def _others(folder: Path) -> list[str]:
    """What is in a folder that its `MARK` does not name."""
    try:
        named = set(json.loads((folder / MARK).read_bytes())["files"]) | {MARK}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        named = set()
    return sorted(
        f for each in folder.rglob("*") if not each.is_dir() and (f := each.relative_to(folder).as_posix()) not in named
    )


def _expected(is_folder: bool) -> str:
    return "a new folder, or one that was exported before" if is_folder else "a new file, or one to replace"


def _clean(target: Path) -> None:
    """Removes what processes that are gone have left beside a target."""
    for left in target.parent.glob(f".{_escaped(target.name)}.lotion_fx-*-*"):
        process = left.name.split(".lotion_fx-")[-1].split("-")[0]
        if process.isdecimal() and not _lives(int(process)):
            _remove(left)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _move(place: Path, target: Path) -> None:
    """Gives what is at ``place`` the target's name. What stood there is at ``place`` afterwards, or is gone."""
    if not target.is_dir():
        os.replace(place, target)
        return
    if _exchanged(place, target):
        return
    # No exchange here: for a moment nothing is there, and the old one stands beside under a name of the same kind.
    aside = place.with_name(f"{place.name}-old")
    os.rename(target, aside)
    try:
        os.rename(place, target)
    except OSError:
        os.rename(aside, target)
        raise
    _remove(aside)


def _exchanged(place: Path, target: Path) -> bool:
    """Swaps two names in one step, where the system and the file system can."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    if renameat2(_HERE, os.fsencode(place), _HERE, os.fsencode(target), _EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(target))


def _flush(place: Path) -> None:
    """To the disk, so that a name never stands for a file that a power cut has emptied."""
    if not place.is_dir():
        with place.open("rb") as file:
            os.fsync(file.fileno())
        return
    for folder, _, names in os.walk(place):
        for name in names:
            _flush(Path(folder, name))
        _flush_folder(Path(folder))


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems know no such thing
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
