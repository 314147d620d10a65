"""What the examples' command lines share: their checks of options, and how one runs as a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

import lotion_fx


def known_format(fmt: str) -> str:
    """The name of a format, refused where there is none of that name."""
    try:
        lotion_fx.resolve(fmt)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return fmt


def in_a_folder(path: Path | None) -> Path | None:
    """A file to write, refused where its folder is not there."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}")
    return path


def start(main: Callable[..., None]) -> None:
    """Runs a command as a script."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
