"""The language models of the LOTION paper (arXiv 2510.08757) again: each method at each format, from several seeds.

    python examples/reproduce/lotion.py                    # size tiny: three quarters of an hour on one core
    python examples/reproduce/lotion.py --methods ptq,ste,lotion --formats int4/tensor --seeds 1 --hours 0.1

Each run that ends is one line of the log; what is there is not run again, so the same command goes on where it was
stopped.
"""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

import lotion_fx
from lotion_fx.examples.options import start
from lotion_fx.examples.reproduce.recipes import FORMATS, METHODS, RECIPES
from lotion_fx.examples.reproduce.runs import Bench, jobs, run_all
from lotion_fx.examples.reproduce.sharded import Sharded
from lotion_fx.examples.reproduce.sizes import SCALES, Scale
from lotion_fx.examples.reproduce.tiny import Tiny

FOLDER = Path(__file__).parent
ALL_METHODS = ",".join(METHODS)


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


def known_size(size: str) -> str:
    """The name of a size, refused where there is none of that name."""
    if size not in ("tiny", *SCALES):
        raise typer.BadParameter(f"unknown size {size!r}; expected one of tiny,{','.join(SCALES)}")
    return size


def chosen(size: str, steps: int | None, vocab: int | None, batch: int | None, shrink: bool) -> Scale:
    """A size as the command line changes it."""
    scale = SCALES[size].shrunk if shrink else SCALES[size]
    model = replace(scale.model, vocab=vocab or scale.model.vocab, batch=batch or scale.model.batch)
    return replace(scale, model=model, tokens=steps * scale.step_tokens if steps else scale.tokens)


def main(
    size: Annotated[str, typer.Option(callback=known_size, help=f"One of tiny,{','.join(SCALES)}.")] = "tiny",
    methods: Annotated[str, typer.Option(callback=known_methods, help=f"Some of {','.join(RECIPES)}.")] = ALL_METHODS,
    formats: Annotated[str, typer.Option(callback=known_formats, help="Of lotion_fx; the paper's are per tensor.")] = (
        ",".join(FORMATS)
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds 0, 1, ...")] = 3,
    steps: Annotated[int | None, typer.Option(min=4, help="Optimizer steps of a run [default: the size's].")] = None,
    hours: Annotated[float, typer.Option(help="Begin no run after so many.")] = math.inf,
    text: Annotated[Path | None, typer.Option(exists=True, help="Tokens, 2 bytes each; else Python's source.")] = None,
    vocab: Annotated[int | None, typer.Option(min=2, help="Words of --text [default: the size's].")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences a rank takes at once [default: 16].")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Activation checkpointing of each block.")] = False,
    shrink: Annotated[bool, typer.Option("--shrink", help="A model of width 64 and 8 steps: does it all run?")] = False,
    inner: Annotated[str, typer.Option(help="What compiles the graphs: inductor, aot_eager or eager.")] = "inductor",
    runs: Annotated[Path | None, typer.Option(help="Log of finished runs [default: beside this file].")] = None,
    work: Annotated[Path, typer.Option(help="Folder of checkpoints of the large sizes.")] = Path("lotion-runs"),
) -> None:
    """Train language models by the LOTION paper's methods and its rivals, and compare them at rounded weights."""
    warnings.simplefilter("ignore")
    logging.getLogger("lotion_fx").setLevel(logging.ERROR)
    bench: Bench
    if size == "tiny":
        torch.set_num_threads(1)  # so small a model gains nothing from more
        bench = Tiny(steps or 600, inner=inner)
    else:
        scale = chosen(size, steps, vocab, batch, shrink)
        bench = Sharded(scale, text, work, inner, recompute)
    wanted = list(jobs(bench, formats.split(","), methods.split(","), seeds))
    path = runs or FOLDER / f"lotion-{size}.jsonl"
    run_all(wanted, bench, path, hours)


if __name__ == "__main__":
    start(main)
