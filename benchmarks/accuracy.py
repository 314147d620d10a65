"""How much loss each way to quantize adds to full precision, against the strongest rivals, paired by seed.

    python benchmarks/accuracy.py                          # all of it: some two hours on one core
    python benchmarks/accuracy.py --formats nvfp4 --seeds 1 --hours 0.2
    python benchmarks/accuracy.py --table --page docs/accuracy.md

Each run that ends is one line of `benchmarks/accuracy/runs.jsonl`; what is there is not run again, so the same command
goes on where it was stopped. Every run of a seed starts from the same weights and sees the same batches; those that
begin by plain training go on from one full-precision run. Losses are means over 2,048 held-out windows at the weights
that are deployed.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from accuracy import log
from accuracy.encoder import Encoder
from accuracy.recipes import rows
from accuracy.runs import FORMATS, jobs, run_all
from accuracy.setting import Setting
from accuracy.table import between_markers, table
from accuracy.text import Text
from accuracy.training import Trainings

import lotion_fx
from lotion_fx.examples.runlog import commit

LOG = Path(__file__).parent / "accuracy" / "runs.jsonl"
SETTINGS = {"text": Text, "encoder": Encoder}


def some_of(known: tuple[str, ...]) -> object:
    """A parser of names with commas between them, of which it refuses those that are not known."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}: expected some of {','.join(known)}")
        return names

    return parse


def known_formats(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        try:
            lotion_fx.resolve(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=sorted(SETTINGS), default="text")
    parser.add_argument("--formats", type=known_formats, default=list(FORMATS))
    parser.add_argument("--methods", type=some_of(tuple(rows())), default=list(rows()), help="rows of the table")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...")
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--steps", type=int, help="of one training [default: the setting's]")
    parser.add_argument("--windows", type=int, help="held out [default: the setting's]")
    parser.add_argument("--inner", choices=["inductor", "aot_eager", "eager"], default="inductor")
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--work", type=Path, help="folder of trained models [default: a temporary one, of this commit]")
    parser.add_argument("--table", action="store_true", help="run nothing, print the log's table")
    parser.add_argument("--page", type=Path, help="with --table, write it between the markers of this file instead")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)  # so small a model gains nothing from more
    warnings.simplefilter("ignore")
    logging.getLogger("lotion_fx").setLevel(logging.ERROR)
    given = {"steps": args.steps, "windows": args.windows, "inner": args.inner}
    setting: Setting = SETTINGS[args.setting](**{name: value for name, value in given.items() if value is not None})
    wanted = list(jobs(setting, args.formats, args.methods, args.seeds))
    if not args.table:
        work = args.work or Path(tempfile.gettempdir()) / f"lotion_fx-accuracy-{commit()}"
        run_all(wanted, Trainings(setting, work), args.log, args.hours)
    done = log.read(args.log)
    text = table([done[job.key] for job in wanted if job.key in done], args.formats)
    if args.page is None:
        print("\n" + text)
    else:
        args.page.write_text(between_markers(args.page.read_text(), text))


if __name__ == "__main__":
    main()
