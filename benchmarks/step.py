"""What a training step costs under each method, next to the plain compiled step.

    python benchmarks/step.py [--width 256] [--depth 4] [--fmt nvfp4] [--rounds 40] [--after 3] [--json PATH]

One process, one model a method, all from one seed. Rounds interleave the methods in a new random order each; a row is
the median over rounds of its step time over the plain step's of the same round, and the middle half of those ratios.
'plain again' is a second plain model: its spread is the noise. FLOPs and bytes are Inductor's own counters over the
forward, backward and update graphs; they do not depend on the machine's load. State is what stays allocated between
steps beyond the plain model's, over the number of quantized parameters. 'lotion at rest' is a step that gathers no
curvature, three of four after the first thousand. ``--after`` so many steps rounds begin: the first of a training look
at the size of the term more often than all others.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn
from torch._inductor import compile_fx, config, metrics
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_utils import count_flops_fx

import lotion_fx
from lotion_fx.examples.quickstart import CONTEXT, GPT, VOCAB, next_token_loss
from lotion_fx.state import weights_of
from lotion_fx.timing import interleaved, seconds

CASES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain again": None,
    "ste": {"method": "ste"},
    "ste_scale": {"method": "ste_scale"},
    "lotion factored": {"method": "lotion"},
    "lotion at rest": {"method": "lotion", "refresh": 1_000_000},
    "lotion full": {"method": "lotion", "curvature": "full"},
    "lotion fisher": {"method": "lotion", "curvature": "fisher"},
    "scales": {"method": "scales"},
}


class CountFlops(CustomGraphPass):
    """Adds up the matrix-product FLOPs of every graph that Inductor lowers."""

    total = 0

    def __call__(self, graph: fx.Graph) -> None:
        CountFlops.total += sum(count_flops_fx(node) or 0 for node in graph.nodes if node.op == "call_function")

    def uuid(self) -> None:
        return None


def build(case: dict[str, Any] | None, args: argparse.Namespace) -> tuple[nn.Module, Callable[[], None]]:
    """A model and the function that takes one training step with it."""
    torch.manual_seed(0)
    model = GPT(args.width, args.depth)
    if case is None:
        model.compile()
    else:
        lotion_fx.transform(model, args.fmt, **case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = torch.randint(VOCAB, (args.batch, CONTEXT + 1))

    def step() -> None:
        optimizer.zero_grad()
        next_token_loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return model, step


def persistent(model: nn.Module) -> float:
    """Bytes of curvature state per quantized parameter."""
    try:
        weights = [weight for weight in weights_of(model) if weight.selected]
    except ValueError:
        return 0.0
    kept = [
        tensor for weight in weights for tensor in (weight.curvature.ema, weight.gathered.probe) if tensor is not None
    ]
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    return held / sum(torch.Size(weight.shape).numel() for weight in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--after", type=int, default=3, help="steps of each model before the first round")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fmt", default="nvfp4")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated; 'plain' is always in")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    config.post_grad_custom_post_pass = CountFlops()
    config.force_disable_caches = True  # cold compile times, and counters that count
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # bytes are counted only for its log
    compile_fx.inductor_metrics_log.propagate = False
    torch.set_num_threads(args.threads)
    rows: dict[str, dict[str, float]] = {}
    steps: dict[str, Callable[[], None]] = {}
    for name in dict.fromkeys(["plain", *args.cases.split(",")]):
        torch._dynamo.reset()
        metrics.reset()
        CountFlops.total = 0
        began = time.perf_counter()
        model, steps[name] = build(CASES[name], args)
        if name == "lotion at rest":  # the first step gathers, by graphs that no later one runs
            steps[name]()
            metrics.reset()
            CountFlops.total, began = 0, time.perf_counter()
        steps[name]()
        compiling = time.perf_counter() - began
        rows[name] = {"bytes": metrics.num_bytes_accessed, "flops": CountFlops.total, "compile": compiling}
        for _ in range(max(args.after, 3) - 1):  # the second has Adam's moments: curvature='fisher' compiles once more
            steps[name]()
        rows[name]["state"] = persistent(model)
    cpu = torch.device("cpu")
    timed = interleaved({name: partial(seconds, step, cpu) for name, step in steps.items()}, args.rounds)
    plain = rows["plain"]
    table = []
    for name, row in rows.items():
        row.update(timed[name])
        row.update({f"{key}_ratio": row[key] / plain[key] for key in ("bytes", "flops", "compile")})
        spread = f"{row['ratio_low']:.2f} .. {row['ratio_high']:.2f}"
        numbers = (f"{row[f'{key}_ratio']:.3f}" for key in ("flops", "bytes"))
        table.append([name, f"{row['step_ms']:.1f}", f"{row['ratio']:.3f}", spread, *numbers, f"{row['state']:.3f}"])
        table[-1].append(f"{row['compile_ratio']:.2f}")
    headers = ["method", "ms", "step ratio", "middle half", "FLOPs", "bytes moved", "state B/param", "cold compile"]
    print(
        f"GPT width {args.width}, depth {args.depth}, batch {args.batch} x {CONTEXT}, {args.fmt}, {args.rounds} rounds"
    )
    print(tabulate(table, headers, disable_numparse=True, colalign=("left", *["right"] * 7)))
    if args.json:
        with open(args.json, "w") as file:
            json.dump([{"method": name, **row} for name, row in rows.items()], file, indent=1)


if __name__ == "__main__":
    main()
