"""Losses of many kinds: does the term have the size of the increase that rounding causes, and does it help?

    python benchmarks/losses.py size      predicted over measured increase after forty steps, losses x nets x curvatures
    python benchmarks/losses.py deploy    loss at the rounded weights after training, against PTQ and STE, paired seeds

Each line is printed as it comes. The measured increase is the mean over randomized roundings of the loss less the loss
at the latent weights, the part linear in the noise taken out, with its standard error.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import lotion_fx

CLASSES = 10
Batch = tuple[Tensor, Tensor, Tensor]  # inputs, labels [rows], real targets [rows, CLASSES]
Net = Callable[[], nn.Module]
Loss = Callable[[Any, Batch], Tensor]  # of a model, or of what gives its outputs


class Mlp(nn.Module):
    """Two hidden layers, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.head, self.other = nn.Linear(64, CLASSES), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.head(h), self.other(h)


class Convolutional(Mlp):
    """Three convolutions over images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(32, 64, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(256, 64))


class Transformer(Mlp):
    """Two causal layers over bytes, a row of outputs at each position."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(128, width), nn.Parameter(0.02 * torch.randn(32, width))
        self.layers = nn.ModuleList(_Layer(width) for _ in range(2))
        self.body = nn.Linear(width, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x) + self.place
        for layer in self.layers:
            h = layer(h)
        h = F.gelu(self.body(h)).flatten(0, 1)
        return self.head(h), self.other(h)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


NETS: dict[str, Net] = {"mlp": Mlp, "convnet": Convolutional, "transformer": Transformer}


@cache
def _text() -> Tensor:
    library = Path(sysconfig.get_paths()["stdlib"])
    return torch.tensor(list(b"".join(p.read_bytes() for p in sorted(library.glob("a*.py")))), dtype=torch.long) % 128


@cache
def _teacher(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(99)
        return NETS[kind]().requires_grad_(False)


def batches(kind: str, seed: int, rows: int = 128) -> Iterator[Batch]:
    """Batches of one net without end: labels and targets of a fixed random net of its kind, with noise."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        if kind == "transformer":
            starts = torch.randint(len(_text()) - 32, (rows // 16,), generator=draw)
            x = torch.stack([_text()[start : start + 32] for start in starts])
        else:
            x = torch.randn((rows, 32) if kind == "mlp" else (rows, 1, 8, 8), generator=draw)
        real = _teacher(kind)(x)[0]
        real = (real - real.mean(0)) / real.std(0)
        real = real + 0.3 * torch.randn(real.shape, generator=draw)
        yield x, real.argmax(-1), real


def _masked(model: nn.Module, batch: Batch) -> Tensor:
    each = F.cross_entropy(model(batch[0])[0], batch[1], reduction="none")
    return (each * (torch.arange(len(each)) % 16 == 0)).mean()


def _ignored(model: nn.Module, batch: Batch) -> Tensor:
    labels = torch.where(torch.arange(len(batch[1])) % 4 == 0, batch[1], -100)
    return F.cross_entropy(model(batch[0])[0], labels)


def _contrastive(model: nn.Module, batch: Batch) -> Tensor:
    """InfoNCE between the two heads."""
    a, b = (F.normalize(out[:64], dim=-1) for out in model(batch[0]))
    return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))


def _clipped_ratio(model: nn.Module, batch: Batch) -> Tensor:
    """PPO's surrogate, with the real targets as logits of the old policy and for advantages, and its value loss."""
    logits, value = model(batch[0])
    chosen = batch[1][:, None]
    ratio = (logits.log_softmax(-1).gather(1, chosen) - batch[2].log_softmax(-1).gather(1, chosen)).exp()
    advantage = batch[2][:, :1]
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return (value[:, :1] - batch[2][:, 1:2]).square().mean() - gain.mean()


def _cross_entropy(scale: float = 1.0, **options: Any) -> Loss:
    return lambda model, batch: scale * F.cross_entropy(model(batch[0])[0], batch[1], **options)


def _squared(deviation: float) -> Loss:
    return lambda model, batch: F.mse_loss(model(batch[0])[0], deviation * batch[2])


LOSSES: dict[str, Loss] = {
    "cross entropy": _cross_entropy(),
    "sum": _cross_entropy(reduction="sum"),
    "100 x mean": _cross_entropy(100.0),
    "masked mean": _masked,
    "label smoothing": _cross_entropy(label_smoothing=0.1),
    "ignored labels": _ignored,
    "squares, deviation .01": _squared(0.01),
    "squares, deviation 1": _squared(1.0),
    "squares, deviation 100": _squared(100.0),
    "Huber": lambda model, batch: F.huber_loss(model(batch[0])[0], 3 * batch[2]),
    "binary, sum": lambda model, batch: F.binary_cross_entropy_with_logits(
        model(batch[0])[0], (batch[2] > 0).float(), reduction="sum"
    ),
    "InfoNCE": _contrastive,
    "two heads": lambda model, batch: (
        F.cross_entropy((out := model(batch[0]))[0], batch[1]) + F.mse_loss(out[1], batch[2])
    ),
    "clipped ratios": _clipped_ratio,
}


def increase(model: nn.Module, loss: Loss, data: Iterator[Batch], rounds: int) -> tuple[float, float]:
    """The measured increase of the loss under randomized rounding, and its standard error."""
    rows = {row.name: row for row in lotion_fx.report(model).rows if row.format}
    parameters = {name: p for name, p in model.named_parameters() if name in rows}
    own = {name: p.detach().clone() for name, p in parameters.items()}
    found = []
    with lotion_fx.full_precision(model):
        for _ in range(rounds):
            batch = next(data)
            before = loss(model, batch)
            slopes = dict(zip(parameters, torch.autograd.grad(before, list(parameters.values())), strict=True))
            linear = 0.0
            with torch.no_grad():
                for name, p in parameters.items():
                    axis = -1 if rows[name].block_axis is None else rows[name].block_axis
                    drawn = lotion_fx.rounding.rr(own[name], lotion_fx.resolve(rows[name].format), axis)
                    linear += float((slopes[name] * (drawn - own[name])).sum())
                    p.copy_(drawn)
                found.append(float(loss(model, batch)) - float(before) - linear)
                for name, p in parameters.items():
                    p.copy_(own[name])
    return statistics.fmean(found), statistics.stdev(found) / math.sqrt(rounds)


def train(
    kind: str, loss: Loss, count: int, seed: int, rate: float = 3e-3, *, decays: bool = True, **options: Any
) -> nn.Module:
    """A net trained by Adam on fresh batches, under `lotion_fx.transform` with these options.

    Args:
        decays: the learning rate does, by a cosine to 0 at the end.
    """
    torch.manual_seed(seed)
    torch.compiler.reset()
    model, data = lotion_fx.transform(NETS[kind](), inner="aot_eager", **options), batches(kind, seed)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    for _ in range(count):
        loss(model, next(data)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if decays:
            schedule.step()
    return model


def size(args: argparse.Namespace) -> None:
    rows = []
    for kind, name, curvature in itertools.product(args.nets, args.losses, args.curvatures):
        start, ratios, told, terms, increases = time.perf_counter(), [], [], [], []
        for seed in args.seeds:
            options = {"fmt": args.formats[0], "curvature": curvature, "decays": not args.constant}
            model = train(kind, LOSSES[name], args.steps, seed, **options)
            report = lotion_fx.report(model)
            measured, _ = increase(model, LOSSES[name], batches(kind, 12345 + seed), args.rounds)
            size, error = report.size or (math.nan, math.nan)
            terms.append(report.term)
            increases.append(measured)
            told.append(error / size)
            ratios.append(math.log(report.term / measured) if measured > 0 else math.nan)
        known = [ratio for ratio in ratios if not math.isnan(ratio)]
        center = math.exp(statistics.fmean(known)) if known else math.nan
        error = center * statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
        rows.append(
            [kind, name, curvature, f"{statistics.fmean(terms):.3g}", f"{statistics.fmean(increases):.3g}",
             f"{center:.2f} ± {error:.2f}" + (f" ({len(known)})" if len(known) < len(args.seeds) else ""),
             f"{statistics.fmean(told):.0%}"]
        )  # fmt: skip
        print(" | ".join(map(str, rows[-1])), f"| {time.perf_counter() - start:.0f} s", flush=True)
    headers = ["net", "loss", "curvature", "term", "measured", "ratio", "error of one"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


METHODS: dict[str, dict[str, Any]] = {
    "ptq": {"method": "ptq"},
    "ste": {"method": "ste"},
    "ste scale": {"method": "ste_scale"},
    "lotion": {},
    "finish": {"finish": 0.4},
    "early": {"finish": 0.7, "finish_term": False},
    "adaptive": {"noise": "adaptive"},
    "recommended": {"noise": "adaptive", "schedule": "auto"},
    "rounds": {"noise": "adaptive", "schedule": "auto"},
    "in order": {"noise": "adaptive", "schedule": "auto"},
    "in order + rounds": {"noise": "adaptive", "schedule": "auto"},
}
ROUNDED = {
    "adaptive": (8, 0, False),
    "recommended": (32, 0, False),
    "rounds": (32, 4, False),
    "in order": (32, 0, True),
    "in order + rounds": (32, 4, True),
}
"""Those whose weights `lotion_fx.round_` rounds in the end: by how many batches and rounds, and whether in order.
Others go to nearest."""
MINE = ("lotion", "finish", "early", "adaptive", "recommended", "rounds", "in order", "in order + rounds")
RIVALS = ("ptq", "ste", "ste scale")


_trained = lru_cache(maxsize=16)(train)  # methods that train alike, and round otherwise, train once


def deployed(method: str, kind: str, name: str, fmt: str, seed: int, steps: int) -> float:
    """The loss on fresh batches at the weights that are deployed after training by one of `METHODS`."""
    chosen, loss = METHODS[method], LOSSES[name]
    options = {**chosen, "steps": steps} if {"finish", "schedule"} & chosen.keys() else chosen
    model = copy.deepcopy(_trained(kind, loss, steps, seed, fmt=fmt, **options)).eval()
    if method in ROUNDED:
        count, rounds, in_order = ROUNDED[method]
        given = [(batch[0], batch) for batch in itertools.islice(batches(kind, 20_000 + seed), count)]
        options = {"method": "descent", "rounds": rounds, "in_order": in_order}
        lotion_fx.round_(model, given, lambda out, batch: loss(lambda _: out, batch), **options)
    held_out = batches(kind, 10_000 + seed, rows=512)
    with torch.no_grad():
        return statistics.fmean(float(loss(model, next(held_out))) for _ in range(4))


def deploy(args: argparse.Namespace) -> None:
    rows = []
    pairs = [(m, r) for m, r in itertools.product(MINE, RIVALS) if m in args.methods and r in args.methods]
    for fmt, kind, name in itertools.product(args.formats, args.nets, args.losses):
        ends = {
            method: [deployed(method, kind, name, fmt, seed, args.steps) for seed in args.seeds]
            for method in args.methods
        }
        row = [fmt, kind, name, *(f"{statistics.fmean(each):.4g}" for each in ends.values())]
        for mine, rival in pairs:
            paired = [a - b for a, b in zip(ends[mine], ends[rival], strict=True)]
            error = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else math.nan
            row.append(f"{statistics.fmean(paired):+.2g} ± {error:.1g}")
        rows.append(row)
        print(" | ".join(row), flush=True)
    differences = [f"{mine} - {rival}" for mine, rival in pairs]
    print(tabulate(rows, ["format", "net", "loss", *args.methods, *differences], disable_numparse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["size", "deploy"])
    parser.add_argument("--nets", type=lambda s: s.split(","), default=list(NETS))
    parser.add_argument("--losses", type=lambda s: s.split(";"), default=list(LOSSES), help="names, with ; between")
    parser.add_argument("--methods", type=lambda s: s.split(","), default=list(METHODS))
    parser.add_argument("--curvatures", type=lambda s: s.split(","), default=["factored", "full", "fisher"])
    parser.add_argument("--formats", type=lambda s: s.split(","), default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--constant", action="store_true", help="the learning rate, of size; it decays to 0 otherwise")
    args = parser.parse_args()
    args.seeds = range(args.first_seed, args.first_seed + args.seeds)
    args.formats = args.formats or (["int4"] if args.what == "size" else ["int4", "int3"])
    args.steps = args.steps or (40 if args.what == "size" else 300)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    {"size": size, "deploy": deploy}[args.what](args)


if __name__ == "__main__":
    main()
