"""The language models of the LOTION paper (arXiv 2510.08757) again: each method at each format, from several seeds.

    python examples/reproduce/lotion.py                    # size tiny: three quarters of an hour on one core
    python examples/reproduce/lotion.py --methods ptq,ste,lotion --formats int4/tensor --seeds 1 --hours 0.1

    python examples/reproduce/lotion.py --table --figures figures --report lotion.html    # of what the log has
    python examples/reproduce/lotion.py --size 150m --dry-run                             # what a full size will take
    torchrun --nproc-per-node 8 -m lotion_fx.examples.reproduce.lotion --size 150m --text tokens.bin
    torchrun --nproc-per-node 1 -m lotion_fx.examples.reproduce.lotion --size small --formats int4/tensor --seeds 1

Each run that ends is one line of the log; what is there is not run again, so the same command goes on where it was
stopped.
"""

from __future__ import annotations

import logging
import math
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from lotion_fx.examples.options import Json, in_a_folder, known_formats, print_rows, some_of, start
from lotion_fx.examples.reproduce.lotion_report import write_figures, write_report
from lotion_fx.examples.reproduce.plan import launch, plan, shown
from lotion_fx.examples.reproduce.recipes import FORMATS, METHODS, RECIPES
from lotion_fx.examples.reproduce.results import added_table, margins_table, markdown
from lotion_fx.examples.reproduce.runs import Bench, Run, finished, jobs, recorded, run_all
from lotion_fx.examples.reproduce.sharded import Sharded
from lotion_fx.examples.reproduce.sizes import SCALES, Scale
from lotion_fx.examples.reproduce.tiny import Tiny

FOLDER = Path(__file__).parent
known_methods = some_of("method", RECIPES)
ALL_METHODS, ALL_FORMATS = ",".join(METHODS), ",".join(FORMATS)


def known_size(size: str) -> str:
    """The name of a size, refused where there is none of that name."""
    if size not in ("tiny", *SCALES):
        raise typer.BadParameter(f"unknown size {size!r}; expected one of tiny,{','.join(SCALES)}")
    return size


def known_inner(inner: str) -> str:
    """What compiles the graphs, refused where there is none of that name."""
    if inner not in ("inductor", "aot_eager", "eager"):
        raise typer.BadParameter(f"unknown {inner!r}; expected inductor, aot_eager or eager")
    return inner


def chosen(size: str, steps: int | None, vocab: int | None, batch: int | None, shrink: bool) -> Scale:
    """A size as the command line changes it."""
    if size == "tiny":
        raise typer.BadParameter(f"--dry-run is of a size for GPUs: add --size {', '.join(SCALES)}")
    scale = SCALES[size].shrunk if shrink else SCALES[size]
    model = replace(scale.model, vocab=vocab or scale.model.vocab, batch=batch or scale.model.batch)
    return replace(scale, model=model, tokens=steps * scale.step_tokens if steps else scale.tokens)


def foretold(scale: Scale, methods: Sequence[str], gpus: int, recompute: bool, as_json: bool) -> None:
    """Prints what a training of a size will take, by the curvatures that methods need; and tries the launch."""
    kinds = dict.fromkeys(RECIPES[method].arguments.get("curvature", "factored") for method in methods)
    plans = [plan(scale, gpus, kind, recompute) for kind in kinds]
    say = partial(typer.echo, err=as_json)
    say(shown(plans))
    if as_json:
        print_rows(plans)
    say("\nthe same, shrunk, on two CPU ranks over gloo: ", nl=False)
    say(f"ran, and left its line in the log:\n{launch(scale.name)}")


def show(
    found: Sequence[Run], formats: Sequence[str], figures: Path | None, report: Path | None, as_json: bool
) -> None:
    """Prints the tables of finished runs, and writes what is asked for."""
    say = partial(typer.echo, err=as_json)
    if as_json:
        print_rows(found)
    if not any(run.method == "ptq" for run in found):
        say("no run of ptq is in the log, so there is no full precision to compare with: add ptq to --methods")
        return
    for table in (added_table(found, formats), margins_table(found, formats)):
        say("\n" + markdown(table))
    if figures is not None:
        say(f"\nfigures: {', '.join(map(str, write_figures(found, formats, figures)))}")
    if report is not None:
        write_report(found, formats, shlex.join(["python", *sys.argv]), report)
        say(f"report: {report}")


def main(
    size: Annotated[str, typer.Option(callback=known_size, help=f"One of tiny,{','.join(SCALES)}.")] = "tiny",
    methods: Annotated[str, typer.Option(callback=known_methods, help=f"Some of {','.join(RECIPES)}.")] = ALL_METHODS,
    formats: Annotated[str, typer.Option(callback=known_formats, help="The paper's are per tensor.")] = ALL_FORMATS,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds 0, 1, ...")] = 3,
    steps: Annotated[int | None, typer.Option(min=4, help="Optimizer steps of a run [default: the size's].")] = None,
    hours: Annotated[float, typer.Option(help="Begin no run after so many.")] = math.inf,
    text: Annotated[Path | None, typer.Option(exists=True, help="Tokens, 2 bytes each; else Python's source.")] = None,
    vocab: Annotated[int | None, typer.Option(min=2, help="Words of --text [default: the size's].")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences a rank takes at once [default: 16].")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Activation checkpointing of each block.")] = False,
    shrink: Annotated[bool, typer.Option("--shrink", help="A model of width 64 and 8 steps: does it all run?")] = False,
    inner: Annotated[str, typer.Option(callback=known_inner, help="inductor, aot_eager or eager.")] = "inductor",
    runs: Annotated[Path | None, typer.Option(help="Log of finished runs [default: beside this file].")] = None,
    work: Annotated[Path, typer.Option(help="Folder of checkpoints of the large sizes.")] = Path("lotion-runs"),
    table: Annotated[bool, typer.Option("--table", help="Run nothing; show what the log has.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Memory, FLOPs and hours, predicted.")] = False,
    gpus: Annotated[int, typer.Option(min=1, help="Of --dry-run.")] = 8,
    figures_to: Annotated[Path | None, typer.Option("--figures", help="Folder for PNG and SVG.")] = None,
    report_to: Annotated[
        Path | None, typer.Option("--report", callback=in_a_folder, help="Write one HTML page.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train language models by the LOTION paper's methods and its rivals, and compare them at rounded weights.

    lotion-fx reproduce lotion --table --report lotion.html

    lotion-fx reproduce lotion --methods ptq,ste,lotion --formats int4/tensor --seeds 1 --hours 0.1

    lotion-fx reproduce lotion --size 150m --dry-run
    """
    warnings.simplefilter("ignore")
    logging.getLogger("lotion_fx").setLevel(logging.ERROR)
    names, kinds, path = methods.split(","), formats.split(","), runs or FOLDER / f"lotion-{size}.jsonl"
    if dry_run:
        return foretold(chosen(size, steps, vocab, batch, shrink), names, gpus, recompute, as_json)
    if table:
        found = recorded(path, size, kinds, names, seeds)
    else:
        bench: Bench
        if size == "tiny":
            torch.set_num_threads(1)  # so small a model gains nothing from more
            bench = Tiny(steps or 600, inner=inner)
        else:
            bench = Sharded(chosen(size, steps, vocab, batch, shrink), text, work, inner, recompute)
        wanted = list(jobs(bench, kinds, names, seeds))
        run_all(wanted, bench, path, hours)
        if not bench.writes:
            return
        found = finished(wanted, path)
    show(found, kinds, figures_to, report_to, as_json)


if __name__ == "__main__":
    start(main)
