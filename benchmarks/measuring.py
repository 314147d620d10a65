"""What measuring the term's size costs a training: the loss with and without it, in paired runs.

    python benchmarks/measuring.py [--format int4/tensor] [--seeds 12] [--first 0] [--steps 600]

The quickstart's byte-level GPT, trained by LOTION; held-out loss at the latent weights and at those rounded to nearest,
less that of the same training without measuring (``calibrate=False``), nats per byte: mean and standard error.
"apart" measures nothing either and starts from weights moved by 1e-4 of themselves: what runs differ by for no reason.
"measured" takes the size it finds, "measured, unused" the counted one, so that the steps at noisy weights alone differ.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any
from unittest import mock

import torch
from accuracy.deployment import holding, rounded
from accuracy.text import Text
from tabulate import tabulate

import lotion_fx
from lotion_fx.examples.paired import Mean
from lotion_fx.measuring import Measuring

WAYS: dict[str, dict[str, Any]] = {
    "counted": {"calibrate": False},
    "apart": {"calibrate": False},
    "measured": {},
    "measured, unused": {},
}


def _counted(measuring: Measuring, weight: Any, steps: int) -> float:
    return 1.0 if measuring.draws else 0.0


def losses(setting: Text, way: str, fmt: str, seed: int) -> tuple[float, float, float | None]:
    """The held-out loss at the latent weights and at those rounded to nearest, and measured over counted size."""
    torch.compiler.reset()
    model = setting.make(seed)
    if way == "apart":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-4 * torch.randn_like(parameter))
    lotion_fx.transform(model, fmt, **WAYS[way])
    torch.manual_seed(seed)
    factor = _counted if way.endswith("unused") else Measuring.factor
    with mock.patch.object(Measuring, "factor", factor):
        setting.fit(model, seed, setting.optimizer(model.parameters()), 0, lambda step: None)
    size, state = lotion_fx.report(model).size, {name: value.clone() for name, value in model.state_dict().items()}
    latent = setting.evaluate(holding(setting, state))
    return latent, setting.evaluate(rounded(setting, state, fmt, "nearest", seed)[0]), size and size[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="int4/tensor")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="of the seeds")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lotion_fx").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    setting = Text(steps=args.steps)
    apart: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    sizes: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(args.first, args.first + args.seeds):
        counted = losses(setting, "counted", args.format, seed)
        for way in list(WAYS)[1:]:
            latent, nearest, size = losses(setting, way, args.format, seed)
            apart[way].append((latent - counted[0], nearest - counted[1]))
            sizes[way] += [] if size is None else [size]
            print(f"seed {seed}, {way}: latent {apart[way][-1][0]:+.4f}, nearest {apart[way][-1][1]:+.4f}, size {size}",
                  flush=True)  # fmt: skip
    rows = []
    for way, pairs in list(apart.items())[1:]:
        columns = [*zip(*pairs, strict=True), sizes[way]]
        rows.append([way, *(str(Mean.of(column)) if column else "" for column in columns)])
    print(tabulate(rows, ["", "latent", "to nearest", "size found"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
