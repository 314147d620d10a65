"""The language models of the LOTION paper (arXiv 2510.08757) again: each method at each format, from several seeds.

    python examples/reproduce/lotion.py                    # size tiny: three quarters of an hour on one core
    python examples/reproduce/lotion.py --methods ptq,ste,lotion --formats int4/tensor --seeds 1 --hours 0.1

Each run that ends is one line of the log; what is there is not run again, so the same command goes on where it was
stopped.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

import lotion_fx
from lotion_fx.examples.options import start
from lotion_fx.examples.reproduce.recipes import FORMATS, METHODS, RECIPES
from lotion_fx.examples.reproduce.runs import finished, jobs, run_all
from lotion_fx.examples.reproduce.tiny import Tiny

LOG = Path(__file__).parent / "lotion-{size}.jsonl"


def known_formats(names: str) -> str:
    """Names of formats with commas between them, refused where there is none of a name."""
    for name in names.split(","):
        try:
            lotion_fx.resolve(name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return names


def known_methods(names: str) -> str:
    """Names of methods with commas between them, refused where there is none of a name."""
    for name in names.split(","):
        if name not in RECIPES:
            raise typer.BadParameter(f"unknown method {name!r}; expected some of {','.join(RECIPES)}")
    return names


def main(
    methods: Annotated[str, typer.Option(callback=known_methods, help=f"Some of {','.join(RECIPES)}.")] = ",".join(
        METHODS
    ),
    formats: Annotated[str, typer.Option(callback=known_formats, help="Of lotion_fx; /tensor as in the paper.")] = (
        ",".join(FORMATS)
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds 0, 1, ...")] = 3,
    steps: Annotated[int, typer.Option(min=20, help="Optimizer steps of a run.")] = 600,
    hours: Annotated[float, typer.Option(help="Begin no run after so many.")] = float("inf"),
    inner: Annotated[str, typer.Option(help="What compiles the graphs: inductor, aot_eager or eager.")] = "inductor",
    log: Annotated[Path | None, typer.Option(help="Of finished runs [default: beside this file].")] = None,
) -> None:
    """Train language models by the LOTION paper's methods and its rivals, and compare them at rounded weights."""
    torch.set_num_threads(1)  # so small a model gains nothing from more
    warnings.simplefilter("ignore")
    logging.getLogger("lotion_fx").setLevel(logging.ERROR)
    bench = Tiny(steps, inner=inner)
    wanted = list(jobs(bench, formats.split(","), methods.split(","), seeds))
    path = log or Path(str(LOG).format(size=bench.size))
    run_all(wanted, bench, path, hours)
    finished(wanted, path)


if __name__ == "__main__":
    start(main)
