"""How transform, the first step, later steps and memory grow with the depth and with the width of a model.

    python benchmarks/scaling.py [--depths 2,4,8,16,32,64] [--widths 128,256,512,1024] [--json PATH]

The quickstart's GPT under the plain compiler and under lotion_fx, each in a process of its own that finds no cache, on
one thread. 'whole' compiles the model as one graph, 'blocks' each distinct block once (``regions="blocks"``; for plain,
``compile()`` of each block and of the head). Seconds are of CPU time, the C++ compiler's included; a step is the median
of several; memory is the peak of the process. The exponents are slopes in logarithms: 1 is linear growth.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import lotion_fx
from lotion_fx.examples import quickstart

Row = dict[str, Any]
KEYS = ("transform", "first", "step", "peak")


def plain_whole(model: nn.Module) -> None:
    model.compile()


def plain_blocks(model: nn.Module) -> None:
    for block in (*model.blocks, model.head):
        block.compile()


CASES: dict[str, Callable[[nn.Module], Any]] = {
    "plain whole": plain_whole,
    "lotion_fx whole": lambda model: lotion_fx.transform(model, "int4"),
    "plain blocks": plain_blocks,
    "lotion_fx blocks": lambda model: lotion_fx.transform(model, "int4", regions="blocks"),
}


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    used = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(case: str, depth: int, width: int, batch: int) -> Row:
    """One case, in a process that has done nothing else."""
    torch.manual_seed(0)
    warm = nn.Linear(4, 4)
    warm.compile()
    warm(torch.randn(2, 4)).sum().backward()  # starts the compiler
    torch._dynamo.reset()
    model = quickstart.GPT(width, depth)
    tokens = torch.randint(quickstart.VOCAB, (batch, quickstart.CONTEXT + 1))
    began = time.perf_counter()
    CASES[case](model)
    transform = time.perf_counter() - began
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> float:
        before = cpu_seconds()
        optimizer.zero_grad()
        quickstart.next_token_loss(model, tokens).backward()
        optimizer.step()
        return cpu_seconds() - before

    first, _, _, *later = [step() for _ in range(12)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = {"transform": transform, "first": first, "step": statistics.median(later), "peak": peak}
    return {"case": case, "depth": depth, "width": width, "parameters": parameters, **found}


def fresh(case: str, depth: int, width: int, args: argparse.Namespace) -> Row:
    """`measure` in a process of its own."""
    sizes = [f"--depths={depth}", f"--widths={width}", f"--batch={args.batch}"]
    own = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, f"--alone={case}", *sizes],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | own,
    )
    if done.returncode:
        raise SystemExit(f"{case}, depth {depth}, width {width}: ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x, by least squares."""
    return statistics.linear_regression([math.log(a) for a in x], [math.log(b) for b in y]).slope


def show(rows: list[Row], along: str, title: str) -> None:
    """A line for each size and case, and one with the exponents of each case."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        for row in mine:
            plain = next((r for r in rows if r[along] == row[along] and r["case"] == _plain(case)), row)
            numbers = (f"{1e3 * row['transform']:.0f}", f"{row['first']:.1f}", f"{1e3 * row['step']:.0f}")
            ratio = f"{row['step'] / plain['step']:.3f}"
            lines.append([case, row[along], f"{row['parameters'] / 1e6:.2f}", *numbers, ratio, f"{row['peak']:.0f}"])
        if len(mine) > 1:
            slopes = [f"{exponent([row[along] for row in mine], [row[key] for row in mine]):.2f}" for key in KEYS]
            lines.append([case, "exponent", "", *slopes[:3], "", slopes[3]])
    headers = ["", along, "M parameters", "transform ms", "first step s", "step ms", "over plain", "peak MiB"]
    print(f"\n{title}\n")
    print(tabulate(lines, headers, tablefmt="github", disable_numparse=True))


def _plain(case: str) -> str:
    return f"plain {case.split()[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="2,4,8,16,32,64", help="at width 64")
    parser.add_argument("--widths", default="128,256,512,1024", help="at depth 8")
    parser.add_argument("--deepest-whole", type=int, default=16, help="compile deeper models by blocks alone")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--alone", choices=list(CASES), help="measure one case in this process, as JSON")
    args = parser.parse_args()
    depths, widths = ([int(n) for n in text.split(",")] for text in (args.depths, args.widths))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.alone:
        print(json.dumps(measure(args.alone, depths[0], widths[0], args.batch)))
        return
    deep = [(c, d, 64) for c in CASES for d in depths if "blocks" in c or d <= args.deepest_whole]
    wide = [(c, 8, w) for c in CASES for w in widths if "blocks" in c]
    rows = [fresh(*job, args) for job in tqdm([*deep, *wide], disable=None)]
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    show(rows[: len(deep)], "depth", f"GPT of width 64, {args.batch} x {quickstart.CONTEXT} tokens")
    show(rows[len(deep) :], "width", f"GPT of depth 8, {args.batch} x {quickstart.CONTEXT} tokens")


if __name__ == "__main__":
    main()
