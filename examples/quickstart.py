"""Train a byte-level GPT with 4-bit weights, by every method, on the Python source already on this machine.

Each method trains the same model from the same seed on the same batches; one call, `lotion_fx.transform`, is all that
differs, and a second one, `lotion_fx.round_`, where the weights are rounded adaptively in the end. What counts is the
validation loss at the weights one would deploy, less that of full precision at the same seed. Full precision is trained
once a seed, and methods that begin by plain training go on from there.

    python examples/quickstart.py                # NVFP4
    python examples/quickstart.py --quick        # a smoke run, too short to rank the methods
    python examples/quickstart.py --fmt int4/tensor --seeds 3 --json > rows.json
"""

from __future__ import annotations

import math
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from tqdm import tqdm

import lotion_fx
from lotion_fx.examples.forking import Checkpoint, after_plain
from lotion_fx.examples.options import Json, ReportTo, a_picture, known_format, print_rows, some_of, start
from lotion_fx.examples.quickstart_results import Curve, Row, label_of, plot, table, write_page

FORK = 0.6  # the share of the training after which methods that begin by plain training go on from one checkpoint

# The arguments of `lotion_fx.transform`, and what the table calls the method. "ptq" trains the latent weights as they
# are, so that its run is the full-precision run as well.
METHODS: dict[str, dict[str, Any]] = {
    "ptq": {"method": "ptq"},
    "ste": {"method": "ste"},
    "ste_scale": {"method": "ste_scale"},
    "ste_from_fp": {"schedule": (("plain", FORK), ("ste_scale", 1 - FORK))},
    "lotion": {"method": "lotion"},
    "lotion_finish": {"method": "lotion", "finish": 0.4},
    "adaptive": {"noise": "adaptive", "schedule": (("plain", FORK), ("lotion", 1 - FORK))},
}
# Rounded to nearest each method is a row; these are rows more, by `lotion_fx.round_`.
ROUNDINGS = {"ptq": ("gptq", "descent"), "adaptive": ("descent",)}
DEFAULT_METHODS = "ptq,ste_scale,ste_from_fp,lotion,lotion_finish,adaptive"
QUICK_METHODS = "ptq,ste_scale,lotion_finish"

VOCAB = 96  # printable ASCII and newline
CONTEXT, BATCH = 64, 32
WINDOWS = 2048  # held out, for the loss in the end: over 256 it scatters by more than the methods differ at NVFP4
EVALS = 12  # points on a validation curve, each over an eighth of the windows
CALIBRATION = 8  # batches of the training text that adaptive rounding sees
PLOT = Path("quickstart.png")

# ------------------------------------------------------------------ data
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data"}
PRINTABLE = bytes(range(32, 127)) + b"\n"
TO_TOKEN = bytes(PRINTABLE.find(byte) % 256 for byte in range(256))
UNPRINTABLE = bytes(set(range(256)) - set(PRINTABLE))


def source_files(root: Path) -> list[Path]:
    """The library's own modules, sorted; not its tests, its tables or what others installed under it."""
    files = [path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)]
    if len(files) < 20:
        raise FileNotFoundError(f"{root} holds {len(files)} Python source files, too few to train on")
    return sorted(files)


def split_files(files: list[Path], share: float = 0.05) -> tuple[list[Path], list[Path]]:
    """Train and validation files. By file, so that no validation window continues a training one."""
    shuffled = random.Random(0).sample(files, len(files))
    held_out = max(1, round(share * len(files)))
    return shuffled[held_out:], shuffled[:held_out]


def tokens(files: list[Path]) -> Tensor:
    """One int64 vector of token numbers below `VOCAB`; other bytes are dropped."""
    text = b"\n".join(path.read_bytes() for path in files)
    return torch.frombuffer(bytearray(text.translate(TO_TOKEN, UNPRINTABLE)), dtype=torch.uint8).long()


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """[n, CONTEXT + 1] tokens: the inputs and, one further, the targets."""
    return text[starts[:, None] + torch.arange(CONTEXT + 1)]


def spread_windows(text: Tensor, count: int = WINDOWS) -> Tensor:
    """Windows at even distances over the whole text."""
    return windows(text, torch.linspace(0, len(text) - CONTEXT - 1, count).long())


def calibration(text: Tensor, seed: int, count: int = CALIBRATION) -> list[tuple[Tensor, Tensor]]:
    """Batches for adaptive rounding, (inputs, targets), of the training's own size."""
    draw = torch.Generator().manual_seed(5000 + seed)
    starts = torch.randint(len(text) - CONTEXT, (count, BATCH), generator=draw)
    return [(batch[:, :-1], batch[:, 1:]) for batch in (windows(text, at) for at in starts)]


# ------------------------------------------------------------------ model
class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        nn.init.normal_(self.token.weight, std=0.3)
        nn.init.normal_(self.position.weight, std=0.1)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith((".out", ".down"))
                nn.init.normal_(module.weight, std=0.5 / math.sqrt(width * (2 * depth if residual else 1)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return cross_entropy(model(batch[:, :-1]), batch[:, 1:])


# ------------------------------------------------------------------ training and evaluation


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Tensor) -> float:
    """Mean loss; in batches of the training shape, so that no graph is compiled for another."""
    model.eval()  # the forward is now at RTN weights, unless a context below says otherwise
    loss = statistics.fmean(next_token_loss(model, batch).item() for batch in held_out.split(BATCH))
    model.train()
    return loss


def adam(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1.2e-2, betas=(0.9, 0.99))


def fit(
    model: nn.Module,
    seed: int,
    steps: int,
    text: Tensor,
    after_step: Callable[[int], None],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    begin: int = 0,
    loss_of: Callable[[nn.Module, Tensor, int], Tensor] | None = None,
) -> float:
    """Trains a model in place, and gives the seconds that this took, compilation included.

    Args:
        seed: of the batches' order, of its own: every method sees the same batches.
        after_step: called with the number of each step.
        optimizer: over the model's parameters; `adam` of them by default.
        begin: how many of the ``steps`` the model and the optimizer have behind them.
        loss_of: of a model, a batch and the number of the step; `next_token_loss` by default.
    """
    optimizer = optimizer or adam(model.parameters())
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # a schedule that begins late looks for it
    schedule = torch.optim.lr_scheduler.LambdaLR(  # 5 % warm-up, then a cosine down to 2 %
        optimizer,
        lambda step: min(1.0, (step + 1) / (0.05 * steps)) * (0.51 + 0.49 * math.cos(math.pi * step / steps)),
        last_epoch=begin - 1,
    )
    order = torch.Generator().manual_seed(1000 + seed)
    seconds = 0.0
    for step in range(1, steps + 1):
        began = time.perf_counter()
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=order)
        if step <= begin:
            continue
        batch = windows(text, starts)
        loss = loss_of(model, batch, step) if loss_of else next_token_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - began
        after_step(step)
    return seconds


@dataclass
class Run:
    """One training: its rows, its validation curve, and what methods that begin by plain training may go on from."""

    rows: list[Row]
    curve: Curve
    checkpoint: Checkpoint | None


@dataclass(frozen=True)
class Bench:
    """What all runs share.

    Args:
        inner: what compiles the training graphs.
        text: to train on.
        held_out: windows of other files.
    """

    fmt: str
    steps: int
    inner: str
    text: Tensor
    held_out: Tensor

    def train(self, method: str, seed: int, plain: Run | None = None) -> Run:
        """Trains by one method, evaluates, and rounds in each way that is asked for.

        Args:
            plain: the run of "ptq" with the same seed, whose checkpoint a method that begins plainly goes on from.
        """
        torch.manual_seed(seed)
        model = GPT()
        share, arguments = after_plain(METHODS[method])
        fork = plain.checkpoint if plain and share else None
        begin = fork.step if fork else 0
        if fork:
            model.load_state_dict(fork.model)
        total = self.steps - begin if {"schedule", "finish"} & arguments.keys() else None
        lotion_fx.transform(model, fmt=self.fmt, **arguments, steps=total, inner=self.inner)
        optimizer = adam(model.parameters())
        if fork:
            fork.resume(optimizer, model.parameters())
        curve = [point for point in plain.curve if point[0] <= begin] if plain else []
        checkpoint = None
        label = f"{label_of(method)}, seed {seed}"
        with tqdm(total=self.steps, initial=begin, desc=label, leave=False, disable=None) as bar:

            def after_step(step: int) -> None:
                nonlocal checkpoint
                bar.update()
                if step % max(1, self.steps // EVALS) == 0 or step == self.steps:
                    curve.append((step, evaluate(model, self.held_out[::8])))
                    bar.set_postfix(loss=f"{curve[-1][1]:.3f}")
                if step == round(FORK * self.steps):
                    checkpoint = Checkpoint.of(step, model, optimizer)

            seconds = fit(model, seed, self.steps, self.text, after_step, optimizer=optimizer, begin=begin)
        seconds += share * plain.rows[0].seconds if plain else 0.0
        return Run(self.rows(method, model, seed, seconds), curve, checkpoint)

    def rows(self, method: str, model: nn.Module, seed: int, seconds: float) -> list[Row]:
        """What a trained model is worth, by each rounding."""
        with lotion_fx.randomized(model):  # every forward draws anew
            rr = evaluate(model, self.held_out)
        with lotion_fx.full_precision(model):
            latent = evaluate(model, self.held_out)
        found = [Row(method, self.fmt, seed, evaluate(model, self.held_out), rr, latent, round(seconds, 1))]
        for rounding in ROUNDINGS.get(method, ()):
            loss, more = self.rounded(model.state_dict(), rounding, seed)
            found.append(Row(f"{method}+{rounding}", self.fmt, seed, loss, None, latent, round(seconds + more, 1)))
        return found

    def rounded(self, state: dict[str, Tensor], rounding: str, seed: int) -> tuple[float, float]:
        """The loss at adaptively rounded weights, and the seconds that rounding took."""
        model = GPT()
        model.load_state_dict(state)
        lotion_fx.transform(model, fmt=self.fmt, method="ptq", inner="aot_eager")
        began = time.perf_counter()
        lotion_fx.round_(model, calibration(self.text, seed), cross_entropy, method=rounding)
        seconds = time.perf_counter() - began
        return evaluate(model, self.held_out), seconds


# ------------------------------------------------------------------ command line
known_methods = some_of("method", METHODS)


def main(
    fmt: Annotated[str, typer.Option(callback=known_format, help="Number format of the Linear weights.")] = "nvfp4",
    seeds: Annotated[int, typer.Option(min=1, help="Runs per method, with seeds 0, 1, ...")] = 1,
    steps: Annotated[int | None, typer.Option(min=10, help="Training steps [default: 600; 200 with --quick].")] = None,
    methods: Annotated[
        str | None,
        typer.Option(callback=known_methods, help=f"Some of {','.join(METHODS)} [default: all but ste]."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps, windows and methods, no C++ compiled.")] = False,
    as_json: Json = False,
    plot_to: Annotated[Path, typer.Option("--plot", callback=a_picture, help="Write the curves.")] = PLOT,
    report_to: ReportTo = None,
) -> None:
    """Train a small GPT on the Python library's own source by several quantization methods and compare them.

    lotion-fx quickstart --fmt int4/tensor --seeds 3 --json > rows.json
    """
    say = partial(typer.echo, err=as_json)
    torch.set_num_threads(1)  # so small a model gains nothing from more, and suffers from them on a busy machine
    steps = steps or (200 if quick else 600)
    inner = "aot_eager" if quick else "inductor"  # the same graphs: Inductor's code is faster, and slow to compile
    chosen = (methods or (QUICK_METHODS if quick else DEFAULT_METHODS)).split(",")
    names = list(dict.fromkeys(["ptq", *chosen]))  # its latent run is what all are compared with
    training, validation = split_files(source_files(Path(sysconfig.get_paths()["stdlib"])))
    text, unseen = tokens(training), tokens(validation)
    say(f"{len(text) / 1e6:.1f} MB to train on, {len(unseen) / 1e6:.1f} MB held out; {fmt}, {steps} steps")

    bench = Bench(fmt, steps, inner, text, spread_windows(unseen, WINDOWS // 4 if quick else WINDOWS))
    rows: list[Row] = []
    curves: dict[str, list[Curve]] = {name: [] for name in names}
    for seed in range(seeds):
        plain = None
        for name in names:
            run = bench.train(name, seed, plain)
            if plain is None:
                plain, full = run, run.rows[0]
                rows.append(Row("full_precision", "fp32", seed, full.latent, None, full.latent, full.seconds))
            rows.extend(run.rows)
            curves[name].append(run.curve)
            for row in run.rows:
                say(f"{label_of(row.method)}, seed {seed}: {row.loss:.4f} in {row.seconds:.0f} s")
    say("\n" + table(rows))
    if quick:
        say("A quick run shows that everything works; it is too short to rank the methods.")
    full_precision = statistics.fmean(row.loss for row in rows if row.method == "full_precision")
    figure = plot(curves, full_precision, fmt, plot_to)
    say(f"curves: {plot_to}")
    if report_to is not None:
        command = f"lotion-fx quickstart --fmt {fmt} --seeds {seeds} --steps {steps} --methods {','.join(chosen)}"
        told = {"format": fmt, "steps": steps, "methods": ", ".join(names), "inner": inner}
        write_page(rows, figure, told, command + " --quick" * quick, report_to)
        say(f"report: {report_to}")
    if as_json:
        print_rows(rows)


if __name__ == "__main__":
    start(main)
