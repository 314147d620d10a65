"""What `round_`'s rounds are worth: plain training, descent, and then so many rounds, on so many batches.

    python benchmarks/rounds.py [--formats nvfp4,mxfp4,int4] [--batches 32] [--rounds 0,4] [--seeds 3]

The quickstart's byte-level GPT; held-out loss above full precision, nats per byte, mean and standard error over the
seeds. A round is a forward and backward pass over the batches, and two come before the first.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from accuracy.deployment import holding
from accuracy.text import Text
from accuracy.training import Trainings
from tabulate import tabulate

import lotion_fx
from lotion_fx.examples.paired import Mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="nvfp4,mxfp4,int4")
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--rounds", default="0,4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--work", type=Path, help="folder of trained models [default: a temporary one]")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lotion_fx").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    setting, counts = Text(steps=args.steps), [int(count) for count in args.rounds.split(",")]
    trainings = Trainings(setting, args.work or Path(tempfile.mkdtemp()))
    rows = []
    for fmt in args.formats.split(","):
        above: dict[int, list[float]] = {count: [] for count in counts}
        for seed in range(args.seeds):
            plain = trainings.full_precision(seed)
            for count in counts:
                torch.compiler.reset()
                model = lotion_fx.transform(holding(setting, plain.state), fmt, method="ptq", inner="aot_eager").eval()
                batches = setting.calibration(seed, args.batches)
                lotion_fx.round_(model, batches, setting.loss, method="descent", rounds=count)
                above[count].append(setting.evaluate(model) - plain.latent)
        rows.append([fmt, *(str(Mean.of(found)) for found in above.values())])
    headers = ["format", *(f"{count} rounds" for count in counts)]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
