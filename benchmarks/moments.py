"""What a moment stream costs: the step with the loss in the graph, next to the plain compiled step.

    python benchmarks/moments.py [--rounds 20] [--json PATH]

Three models on synthetic batches: an MLP, a small ConvNet and the quickstart's GPT. 'joint graph' is `transform` as it
is by default; 'closed' has the loss in the graph and streams where no covariance need be dropped; 'diagonal' streams as
far as there are rules: a layer with a random input makes its variance by two more products, and each has its backward.
FLOPs are Inductor's own counts of matrix products; step ratios are medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from step import CountFlops, interleaved
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor import config

import lotion_fx
from lotion_fx.examples.quickstart import CONTEXT, GPT, VOCAB

CASES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain again": None,
    "joint graph": {},
    "closed": {"loss_fn": "model"},
    "diagonal": {"loss_fn": "model", "moments": "diagonal"},
}


class WithLoss(nn.Module):
    """A model and its cross-entropy in one module, as all cases run it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.body(x).flatten(0, -2), y.flatten())


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    body = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 64))
    return body, torch.randn(512, 256), torch.randint(64, (512,))


def convnet() -> tuple[nn.Module, Tensor, Tensor]:
    layers = [nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1)]
    body = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10))
    return body, torch.randn(64, 1, 32, 32), torch.randint(10, (64,))


def gpt() -> tuple[nn.Module, Tensor, Tensor]:
    return GPT(), torch.randint(VOCAB, (32, CONTEXT)), torch.randint(VOCAB, (32, CONTEXT))


MODELS = {"MLP": mlp, "ConvNet": convnet, "GPT": gpt}


def build(make: Callable[[], Any], case: dict[str, Any] | None) -> Callable[[], None]:
    """The function that takes one training step."""
    torch.manual_seed(0)
    body, x, y = make()
    model = WithLoss(body)
    if case is None:
        model.compile()
    else:
        lotion_fx.transform(model, "nvfp4", **case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    config.post_grad_custom_post_pass = CountFlops()
    config.force_disable_caches = True  # a cached graph is not counted
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for model in args.models.split(","):
        steps: dict[str, Callable[[], None]] = {}
        flops = {}
        for name, case in CASES.items():
            torch._dynamo.reset()
            CountFlops.total = 0
            steps[name] = build(MODELS[model], case)
            steps[name]()
            flops[name] = CountFlops.total
            steps[name]()
        for name, row in interleaved(steps, args.rounds).items():
            rows.append({"model": model, "case": name, "flops": flops[name] / flops["plain"], **row})
    table = []
    for row in rows:
        quartiles = f"{row['ratio_low']:.2f} .. {row['ratio_high']:.2f}"
        table.append([row["model"], row["case"], f"{row['ratio']:.2f}", quartiles, f"{row['flops']:.2f}"])
    print(tabulate(table, ["model", "case", "step ratio", "middle half", "FLOPs"], disable_numparse=True))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
