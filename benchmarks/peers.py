"""The same model under lotion_fx and under its peers: what a step costs, and what loss is deployed at equal steps.

    pip install -e ".[peers]"
    python benchmarks/peers.py step  [--width 256] [--depth 4] [--rounds 20]
    python benchmarks/peers.py train [--steps 600] [--seeds 3]

Everyone quantizes the weights of every linear layer to INT4 in blocks of 32 with a scale of float32, and is compiled by
Inductor as it would be by its user. `step` interleaves all in one process; 'plain again' is the noise; cold start,
peak memory and graph breaks are each of a fresh process. 'lotion_fx at rest' is a step that gathers no curvature, three
of four after the first thousand; its cold start holds both kinds. `train` is the training of the quickstart.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lotion_fx
from lotion_fx.examples import quickstart
from lotion_fx.examples.paired import Mean
from lotion_fx.timing import interleaved, seconds

BLOCK = 32
FORMAT = "int4"


class StraightThrough(nn.Module):
    """What one writes by hand: symmetric INT4 codes in blocks of a row, straight through."""

    def forward(self, w: Tensor) -> Tensor:
        blocks = w.unflatten(-1, (-1, BLOCK))
        scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
        rounded = (blocks / scale).round().clamp(-7, 7) * scale
        return w + (rounded.flatten(-2) - w).detach()


def by_hand(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", StraightThrough())
    return compiled(model)


def by_torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weights = IntxFakeQuantizeConfig(torch.int4, group_size=BLOCK, is_symmetric=True)
    quantize_(model, QATConfig(weight_config=weights, step="prepare"))
    return compiled(model)


def by_modelopt(model: nn.Module) -> nn.Module:
    import modelopt.torch.quantization as modelopt

    own = {"num_bits": 4, "block_sizes": {-1: BLOCK, "type": "static"}}
    off: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    config = {"quant_cfg": [*off, {"quantizer_name": "*weight_quantizer", "cfg": own}], "algorithm": "max"}
    tokens = torch.randint(quickstart.VOCAB, (2, quickstart.CONTEXT))
    return compiled(modelopt.quantize(model, config, lambda model: model(tokens)))


def compiled(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def ours(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: lotion_fx.transform(model, FORMAT, **options)


CASES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": compiled,
    "plain again": compiled,
    "lotion_fx": ours(noise="adaptive"),
    "lotion_fx at rest": ours(noise="adaptive", refresh=1_000_000),
    "lotion_fx, STE": ours(method="ste"),
    "parametrize, STE": by_hand,
    "torchao QAT": by_torchao,
    "ModelOpt QAT": by_modelopt,
}
NEEDS = {"torchao QAT": "torchao", "ModelOpt QAT": "modelopt"}


def can_run(case: str) -> bool:
    """Whether what a case needs is installed; says so where it is not."""
    if case in NEEDS and find_spec(NEEDS[case]) is None:
        print(f"{case}: {NEEDS[case]} is not installed; pip install -e '.[peers]'", file=sys.stderr)
        return False
    return True


def build(case: str, args: argparse.Namespace) -> Callable[[], None]:
    """What takes one training step with a case's model."""
    torch.manual_seed(0)
    model = CASES[case](quickstart.GPT(args.width, args.depth))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = torch.randint(quickstart.VOCAB, (args.batch, quickstart.CONTEXT + 1))

    def step() -> None:
        optimizer.zero_grad()
        quickstart.next_token_loss(model, batch).backward()
        optimizer.step()

    return step


def held() -> int:
    """Bytes of all tensors that are alive."""
    storages = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, nn.Parameter):
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


def alone(case: str, args: argparse.Namespace) -> dict[str, float]:
    """Of this process, which has done nothing else: seconds until two steps are done, its peak memory, graph breaks."""
    torch._inductor.config.force_disable_caches = True
    began = time.perf_counter()
    step = build(case, args)
    step()
    step()
    cold = time.perf_counter() - began
    step()
    gc.collect()
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cold": cold, "peak": peak, "breaks": breaks, "held": held()}


def fresh(case: str, args: argparse.Namespace) -> dict[str, float]:
    """`alone` in a process of its own."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("width", "depth", "batch")]
    command = [sys.executable, __file__, "step", f"--alone={case}", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}: its process ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def step_costs(args: argparse.Namespace) -> None:
    cases = [case for case in CASES if can_run(case)]
    each = {case: fresh(case, args) for case in cases}
    steps = {}
    for case in cases:
        torch._dynamo.reset()
        steps[case] = build(case, args)
        for _ in range(3):
            steps[case]()
    timed = interleaved(
        {case: partial(seconds, step, torch.device("cpu")) for case, step in steps.items()}, args.rounds
    )
    parameters = sum(p.numel() for p in quickstart.GPT(args.width, args.depth).parameters())
    rows = []
    for case in cases:
        found, time_of = each[case], timed[case]
        extra = (found["held"] - each["plain"]["held"]) / parameters
        spread = f"{time_of['ratio_low']:.2f} .. {time_of['ratio_high']:.2f}"
        more = f"{found['peak'] - each['plain']['peak']:+.0f}"
        rows.append([case, f"{time_of['ratio']:.3f}", spread, more, f"{extra:.2f}", f"{found['breaks']:.0f}"])
        rows[-1].append(f"{found['cold']:.1f}")
    print(f"GPT width {args.width}, depth {args.depth}, {args.batch} x {quickstart.CONTEXT}, {args.rounds} rounds")
    headers = ["", "step ratio", "middle half", "peak MiB", "held B/param", "graph breaks", "cold start s"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def deployed(case: str, seed: int, args: argparse.Namespace, data: tuple[Tensor, Tensor]) -> float:
    """The held-out loss, after training, of a case's model in ``eval()``."""
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = quickstart.GPT()
    if case == "lotion_fx":
        lotion_fx.transform(model, FORMAT, noise="adaptive", schedule="auto", steps=args.steps)
    else:
        model = CASES[case](model)
    quickstart.fit(model, seed, args.steps, data[0], lambda step: None)
    if case == "lotion_fx":
        lotion_fx.round_(model.eval(), quickstart.calibration(data[0], seed), quickstart.cross_entropy)
    return quickstart.evaluate(model, quickstart.spread_windows(data[1], args.windows))


def train(args: argparse.Namespace) -> None:
    split = quickstart.split_files(quickstart.source_files(Path(sysconfig.get_paths()["stdlib"])))
    data = quickstart.tokens(split[0]), quickstart.tokens(split[1])
    losses: dict[str, list[float]] = {}
    for case in (case for case in CASES if case not in ("plain again", "lotion_fx at rest") and can_run(case)):
        losses[case] = [deployed(case, seed, args, data) for seed in range(args.seeds)]
        print(case, " ".join(f"{loss:.4f}" for loss in losses[case]), file=sys.stderr, flush=True)
    rows = []
    for case, mine in losses.items():
        above = Mean.of([a - b for a, b in zip(mine, losses["plain"], strict=True)])
        rows.append([case, f"{statistics.fmean(mine):.4f}", "" if case == "plain" else str(above)])
    print(tabulate(rows, ["", "loss", "above plain"], tablefmt="github", disable_numparse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "train"])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=2048)
    parser.add_argument("--alone", choices=list(CASES), help="measure one case in this process, as JSON")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if args.alone:
        print(json.dumps(alone(args.alone, args)))
    else:
        {"step": step_costs, "train": train}[args.what](args)


if __name__ == "__main__":
    main()
