"""The `lotion-fx` command; each subcommand is a typed function with its options beside it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Entry point of `lotion-fx`. The core package does without what the commands need: say so if it is missing."""
    try:
        app = build()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "tqdm", "matplotlib"):
            raise
        sys.exit(f"lotion-fx: {error.name} is not installed; try: pip install 'lotion_fx[examples]'")
    app()


def build() -> typer.Typer:
    """The command line with every subcommand."""
    import typer

    from lotion_fx.deploy import commands
    from lotion_fx.examples import landscape, linear_regression, quickstart, two_layer

    app = typer.Typer(
        help="Quantization-aware training by LOTION.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.command("quickstart")(quickstart.main)
    app.command("linear-regression")(linear_regression.main)
    app.command("two-layer")(two_layer.main)
    app.command("landscape")(landscape.main)
    app.command("export")(commands.export)
    app.command("verify")(commands.verify)
    if find_spec("triton"):  # Linux alone has it
        from lotion_fx.kernels.audit import table

        app.command("kernels")(table.main)
    return app
