"""Does it cost accuracy that curvature rests: LOTION with it gathered in each step, in every k-th, and as by default.

    python benchmarks/refresh.py --steps 2000                    # the default against every step
    python benchmarks/refresh.py --refresh 1,2,4,8 --formats int3

The quickstart's byte-level GPT, seeds paired; losses at latent weights, at those rounded to nearest and two-sided, each
less that of the first of ``--refresh``, mean and standard error over the seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from pathlib import Path

import torch
from accuracy.deployment import holding, rounded
from accuracy.text import Text
from tabulate import tabulate

import lotion_fx
from lotion_fx.examples.paired import Mean

WEIGHTS = ("latent", "nearest", "two_sided")


def losses(setting: Text, fmt: str, refresh: str, seed: int) -> dict[str, float]:
    """Of one training, at each of `WEIGHTS`."""
    torch.compiler.reset()
    model = setting.make(seed)
    lotion_fx.transform(model, fmt, refresh=None if refresh == "default" else int(refresh))
    torch.manual_seed(seed)
    setting.fit(model, seed, setting.optimizer(list(model.parameters())), 0, lambda step: None)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    models = [holding(setting, state), *(rounded(setting, state, fmt, how, seed)[0] for how in WEIGHTS[1:])]
    return {name: setting.evaluate(each) for name, each in zip(WEIGHTS, models, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="int3,int4/tensor")
    parser.add_argument("--refresh", default="1,default", help="some of default,1,2,...")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--log", type=Path, help="append a line of JSON for each training")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lotion_fx").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    setting, kinds = Text(steps=args.steps), args.refresh.split(",")
    rows = []
    for fmt in args.formats.split(","):
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for seed in range(args.seeds):
            for kind in kinds:
                found[kind].append(losses(setting, fmt, kind, seed))
                line = json.dumps({"format": fmt, "seed": seed, "refresh": kind, **found[kind][-1]})
                print(line, flush=True)
                if args.log is not None:
                    with args.log.open("a") as file:
                        file.write(line + "\n")
        for kind in kinds:
            pairs = list(zip(found[kind], found[kinds[0]], strict=True))
            means = [f"{statistics.fmean(mine[name] for mine in found[kind]):.4f}" for name in WEIGHTS[-1:]]
            rows.append([fmt, kind, *(str(Mean.of([a[name] - b[name] for a, b in pairs])) for name in WEIGHTS), *means])
    headers = ["format", "refresh", *(f"{name}, less {kinds[0]}'s" for name in WEIGHTS), "two_sided"]
    print(f"\n{args.steps} steps\n\n" + tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
