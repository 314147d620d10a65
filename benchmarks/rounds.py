"""What `round_`'s rounds are worth: plain training, descent, and then so many rounds, on so many batches.

    python benchmarks/rounds.py [--formats nvfp4,mxfp4,int4] [--batches 32] [--rounds 0,4] [--seeds 3] [--train-on 216]

The quickstart's byte-level GPT; held-out loss above full precision, nats per byte, mean and standard error over the
seeds. A round is a forward and backward pass over the batches, and two come before the first. With --train-on the same
model is trained on besides, for so many steps on fresh batches: plainly, and at rounded weights (STE with its scale).
"""

from __future__ import annotations

import argparse
import logging
import math
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


def trained_on(setting: Text, trainings: Trainings, fmt: str, method: str, seed: int, steps: int) -> float:
    """The loss in `eval()` after training went on from the end of plain training, at a learning rate of 1e-3 again."""
    torch.compiler.reset()
    model = holding(setting, trainings.full_precision(seed).state)
    if method != "plain":
        lotion_fx.transform(model, fmt, method=method, inner="aot_eager")
    optimizer = torch.optim.Adam(model.parameters())
    for step, (inputs, targets) in enumerate(setting.calibration(1000 + seed, steps)):
        rate = 1e-3 * min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        setting.loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return setting.evaluate(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="nvfp4,mxfp4,int4")
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--rounds", default="0,4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--train-on", type=int, default=0, help="steps [default: none]")
    parser.add_argument("--work", type=Path, help="folder of trained models [default: a temporary one]")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lotion_fx").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    setting, counts = Text(steps=args.steps), [int(count) for count in args.rounds.split(",")]
    trainings = Trainings(setting, args.work or Path(tempfile.mkdtemp()))
    on = ("plain", "ste_scale") if args.train_on else ()
    rows = []
    for fmt in args.formats.split(","):
        above: dict[int | str, list[float]] = {way: [] for way in (*counts, *on)}
        for seed in range(args.seeds):
            plain = trainings.full_precision(seed)
            for count in counts:
                torch.compiler.reset()
                model = lotion_fx.transform(holding(setting, plain.state), fmt, method="ptq", inner="aot_eager").eval()
                batches = setting.calibration(seed, args.batches)
                lotion_fx.round_(model, batches, setting.loss, method="descent", rounds=count, in_order=False)
                above[count].append(setting.evaluate(model) - plain.latent)
            for method in on:
                found = trained_on(setting, trainings, fmt, method, seed, args.train_on)
                above[method].append(found - plain.latent)
        rows.append([fmt, *(str(Mean.of(found)) for found in above.values())])
    headers = ["format", *(f"{count} rounds" for count in counts), *(f"{method}, trained on" for method in on)]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
