"""What the examples' command lines share: their checks of options, and how one runs as a script."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import lotion_fx

PICTURES = (".png", ".svg", ".pdf", ".jpg")
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text, which goes to stderr.")]


def known_format(fmt: str) -> str:
    """The name of a format, refused where there is none of that name."""
    try:
        lotion_fx.resolve(fmt)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return fmt


def known_formats(names: str) -> str:
    """Names of formats with commas between them, refused where there is none of a name."""
    for name in names.split(","):
        known_format(name)
    return names


def some_of(kind: str, known: Iterable[str]) -> Callable[[str | None], str | None]:
    """What takes names with commas between them, or None, and refuses those not known; ``kind`` says of what."""
    expected = list(known)

    def check(names: str | None) -> str | None:
        for name in names.split(",") if names is not None else []:
            if name not in expected:
                raise typer.BadParameter(f"unknown {kind} {name!r}; expected some of {','.join(expected)}")
        return names

    return check


def in_a_folder(path: Path | None) -> Path | None:
    """A file to write, refused where its folder is not there, or it is a folder itself."""
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; name a file")
    return None if path is None else _placed(path)


def a_picture(path: Path | None) -> Path | None:
    """A plot to write, refused where it cannot be, or its ending is no picture's."""
    if path is not None and path.suffix not in PICTURES:
        raise typer.BadParameter(f"{path} is no picture; let its name end in one of {', '.join(PICTURES)}")
    return in_a_folder(path)


def a_new_folder(path: Path) -> Path:
    """A folder to write into, refused where a file has its name, or there is none to make it in."""
    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"{path} is a file; name a folder")
    return _placed(path)


def _placed(path: Path) -> Path:
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}")
    return path


ReportTo = Annotated[
    Path | None, typer.Option("--report", callback=in_a_folder, help="Write one HTML page: tables, curves, versions.")
]


def print_rows(rows: Iterable[Any]) -> None:
    """Dataclasses as a list of JSON objects, on stdout."""
    typer.echo(json.dumps([asdict(row) for row in rows], indent=1))


def start(main: Callable[..., None]) -> None:
    """Runs a command as a script."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
