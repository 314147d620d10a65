"""The `lotion-fx` command; each subcommand is a typed function with its options beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

# Each command's function. What lacks a library says so when it is asked for, and the others go on without it.
COMMANDS = {
    "quickstart": "lotion_fx.examples.quickstart:main",
    "report": "lotion_fx.commands:report",
    "expected-loss": "lotion_fx.commands:expected_loss",
    "bench": "lotion_fx.commands:bench",
    "export": "lotion_fx.deploy.commands:export",
    "verify": "lotion_fx.deploy.commands:verify",
    "kernels": "lotion_fx.kernels.audit.table:main",
    "doctor": "lotion_fx.commands:doctor",
}
REPRODUCE = {
    "linear-regression": "lotion_fx.examples.linear_regression:main",
    "two-layer": "lotion_fx.examples.two_layer:main",
    "landscape": "lotion_fx.examples.landscape:main",
    "lotion": "lotion_fx.examples.reproduce.lotion:main",
    "basin": "lotion_fx.examples.reproduce.basin:main",
}
WAYS = {  # to get what a command may lack
    **dict.fromkeys(("typer", "tqdm", "matplotlib", "sklearn"), "pip install 'lotion_fx[examples]'"),
    "transformers": "pip install transformers",
    "triton": "use Linux, the one platform that has it",
}


def main() -> None:
    """Entry point of `lotion-fx`. The core package does without what the commands need: say so if it is missing."""
    try:
        app = build()
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit(f"lotion-fx: {_missing('typer')}")
    app()


def build() -> typer.Typer:
    """The command line with every subcommand."""
    app = _app("Quantization-aware training by LOTION.")
    _offer_version(app)
    _add(app, COMMANDS)
    reproduce = _app("Reproduce a figure or a table of the papers: `lotion-fx reproduce landscape --fmt fp4`.")
    _add(reproduce, REPRODUCE)
    app.add_typer(reproduce, name="reproduce")
    return app


def _offer_version(app: typer.Typer) -> None:
    import typer

    def show(wanted: bool) -> None:
        if wanted:
            import torch

            typer.echo(f"lotion_fx {version('lotion_fx')}, torch {torch.__version__}")
            raise typer.Exit

    option = typer.Option(False, "--version", is_eager=True, callback=show, help="Print versions.")

    @app.callback()
    def command(version: bool = option) -> None:
        """Quantization-aware training by LOTION."""


def _app(about: str) -> typer.Typer:
    import typer

    return typer.Typer(
        help=about, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
    )


def _add(app: typer.Typer, commands: dict[str, str]) -> None:
    for name, where in commands.items():
        module, _, function = where.partition(":")
        try:
            app.command(name)(getattr(import_module(module), function))
        except ModuleNotFoundError as error:
            library = (error.name or "").partition(".")[0]
            if library not in WAYS or library == "typer":
                raise
            anything = {"allow_extra_args": True, "ignore_unknown_options": True}
            app.command(name, context_settings=anything)(_without(name, library))


def _without(name: str, library: str) -> Callable[[], None]:
    """A command that lacks a library."""

    def told() -> None:
        sys.exit(f"lotion-fx {name}: {_missing(library)}")

    told.__doc__ = f"Not here: {_missing(library)}."
    return told


def _missing(library: str) -> str:
    return f"{library} is not installed; try: {WAYS[library]}"
