"""Records the result of every public call on ten models, and compares two versions of the package bit for bit.

    python tests/recording.py --out before.json                    # at one commit
    python tests/recording.py --out after.json --against before.json   # at another, on the same machine and torch

Bits depend on the processor and on torch, so no recording is kept with the source: make both on one machine. It imports
nothing but public names, so that it runs unchanged before and after a change of everything else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lotion_fx

VOCAB, WIDTH = 23, 32


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(20, 33), nn.Linear(33, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention and an MLP, with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class LM(nn.Module):
    """A small language model; tied, checkpointed or with a recurrent layer, which Dynamo leaves to Python."""

    def __init__(self, tied: bool = False, checkpointed: bool = False, recurrent: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.token = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True) if recurrent else None
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x if self.rnn is None else self.rnn(x)[0])


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.pointwise = nn.Conv2d(16, 20, 1, stride=2)
        self.head = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.gelu(self.grouped(F.relu(self.norm(self.stem(x))))))
        return self.head(F.gelu(self.pointwise(x)).mean((2, 3)))


class Decoder(nn.Module):
    """Transposed convolutions, plain, grouped and depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 12, 2, stride=2)
        self.grouped, self.depthwise = nn.ConvTranspose2d(12, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(F.gelu(self.grouped(F.gelu(self.up(x))))).mean((2, 3)))


class Experts(nn.Module):
    """A stack of experts, all mixed in one batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(20, 4)
        self.up = nn.Parameter(torch.randn(4, 20, 24) / 5)
        self.down = nn.Parameter(torch.randn(4, 24, 7) / 5)

    def forward(self, x: Tensor) -> Tensor:
        each = torch.bmm(F.silu(torch.bmm(x.expand(4, -1, -1), self.up)), self.down)
        return torch.einsum("ne,eno->no", self.router(x).softmax(-1), each)


class Odd(nn.Module):
    """Weights scaled, normalized, summed elementwise: what takes the Fisher form, and what is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.normalized, self.twice = nn.Parameter(torch.randn(24, 20)), nn.Parameter(torch.randn(24, 24) / 5)
        self.table = nn.Parameter(torch.randn(1, 24))
        self.head = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, F.normalize(self.normalized, dim=-1)) + self.table
        return self.head(torch.tanh(F.linear(F.linear(x, self.twice), self.twice * 0.5)))


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vectors(seed: int) -> tuple[Tensor, Tensor]:
    return _random(16, 20, seed=seed), torch.randint(7, (16,), generator=torch.Generator().manual_seed(seed))


def images(seed: int) -> tuple[Tensor, Tensor]:
    return _random(4, 3, 8, 8, seed=seed), torch.randint(7, (4,), generator=torch.Generator().manual_seed(seed))


def text(seed: int) -> tuple[Tensor, Tensor]:
    """Token ids and the next ones, every fourth of which is ignored."""
    ids = torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    targets[:, ::4] = -100
    return ids[:, :-1], targets


def loss_of(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


Batch = Callable[[int], tuple[Tensor, Tensor]]
MODELS: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
    "mlp": (MLP, vectors),
    "sequential": (lambda: nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 7)), vectors),
    "experts": (Experts, vectors),
    "odd": (Odd, vectors),
    "convnet": (ConvNet, images),
    "decoder": (Decoder, images),
    "lm": (LM, text),
    "tied": (lambda: LM(tied=True), text),
    "checkpointed": (lambda: LM(checkpointed=True), text),
    "recurrent": (lambda: LM(recurrent=True), text),
}
METHODS: dict[str, dict[str, Any]] = {
    "ptq": {"method": "ptq"},
    "ste": {"method": "ste"},
    "ste_scale": {"method": "ste_scale"},
    "rr": {"method": "rr"},
    "factored": {"curvature": "factored"},
    "full": {"curvature": "full"},
    "fisher": {"curvature": "fisher"},
    "ggn": {"curvature": "ggn"},
}
FEATURES: dict[str, dict[str, Any]] = {
    "finish": {"finish": 0.5, "steps": 3},
    "smoothstep": {"noise": "smoothstep"},
    "int4": {"fmt": "int4/tensor", "strength": 0.5},
    "only": {"only": {"*": "mxfp4", "*up*": "int8", "*head*": None}},
    "expected": {"loss_fn": loss_of},
    "diagonal": {"loss_fn": loss_of, "moments": "diagonal"},
}
IN_PYTHON = ("ste", "ste_scale", "rr", "smoothstep")  # which a weight outside of every graph refuses


def digest(value: Any) -> str:
    """A hash of tensors, numbers and what holds them."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous()
            found.update(repr((part.dtype, tuple(part.shape))).encode())
            found.update(part.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for name, inner in part.items():
                add(name)
                add(inner)
        elif isinstance(part, (list, tuple)):
            found.update(str(len(part)).encode())
            for inner in part:
                add(inner)
        else:
            found.update(repr(part).encode())

    add(value)
    return found.hexdigest()[:16]


def train(name: str, optimizer: str, inner: str, **settings: Any) -> dict[str, Any]:
    """Three steps, the second accumulated over two micro-batches and clipped, and everything that can be asked then."""
    make, batch = MODELS[name]
    torch.manual_seed(0)
    model = lotion_fx.transform(make(), inner=inner, **settings)
    step = {
        "adam": lambda: torch.optim.AdamW(model.parameters(), lr=1e-2),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
        "ours": lambda: lotion_fx.optim.AdamW(model.parameters(), lr=1e-2),
    }[optimizer]()
    found: dict[str, Any] = {"losses": []}
    for seed in range(3):
        step.zero_grad()
        for micro in range(1 + (seed == 1)):
            inputs, targets = batch(10 * seed + micro)
            if "loss_fn" in settings:
                loss = lotion_fx.training_loss(model, (inputs, targets))
            else:
                loss = loss_of(model(inputs), targets)
            loss.backward()
            found["losses"].append(loss.detach())
        if seed == 1:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        step.step()
    inputs, targets = batch(99)
    found["parameters"] = dict(model.named_parameters())
    found["report"] = str(lotion_fx.report(model))
    found["state"] = lotion_fx.state_dict(model)
    found["penalty"] = lotion_fx.penalty(model)
    with torch.no_grad():
        found["eval"] = model.eval()(inputs)
        with lotion_fx.full_precision(model):
            found["full precision"] = model(inputs)
        with lotion_fx.randomized(model):
            torch.manual_seed(1)
            found["randomized"] = model(inputs)
    return found


def expected(name: str, inner: str, **settings: Any) -> dict[str, Any]:
    """`expected_loss` and `calibrate` on a model that took no step."""
    make, batch = MODELS[name]
    torch.manual_seed(0)
    model = lotion_fx.transform(make(), inner=inner, **settings)
    torch.manual_seed(1)
    found: dict[str, Any] = {"expected": str(lotion_fx.expected_loss(model, batch(0), loss_of, samples=3))}
    lotion_fx.calibrate(model, [batch(1), batch(2)], loss_of, samples=3)
    return found | {"state": lotion_fx.state_dict(model)}


def resumed(inner: str) -> dict[str, Any]:
    """A run saved after one step and loaded into a fresh model."""
    parts: list[Any] = []
    for saved in (None, *range(1)):
        torch.manual_seed(0)
        model = lotion_fx.transform(LM(), inner=inner)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if saved is not None:
            model.load_state_dict(parts[0][0])
            optimizer.load_state_dict(parts[0][1])
            lotion_fx.load_state_dict(model, parts[0][2])
        inputs, targets = text(0)
        loss_of(model(inputs), targets).backward()
        optimizer.step()
        values = {key: value.clone() for key, value in model.state_dict().items()}
        parts.append((values, optimizer.state_dict(), lotion_fx.state_dict(model)))
    return {"parameters": parts[-1][0], "state": parts[-1][2]}


def by_backend(inner: str) -> dict[str, Any]:
    """The same through ``torch.compile(backend="lotion_fx")``."""
    torch.manual_seed(0)
    model = MLP()
    compiled = torch.compile(model, backend="lotion_fx", options={"fmt": "int4", "inner": inner})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for seed in range(2):
        optimizer.zero_grad()
        inputs, targets = vectors(seed)
        loss_of(compiled(inputs), targets).backward()
        optimizer.step()
    return {"parameters": dict(model.named_parameters()), "report": str(lotion_fx.report(model))}


def by_region(inner: str) -> dict[str, Any]:
    """Blocks compiled one by one."""
    torch.manual_seed(0)
    model = LM()
    lotion_fx.transform(model, inner=inner, regions=[*model.blocks, model.head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in range(2):
        optimizer.zero_grad()
        inputs, targets = text(seed)
        loss_of(model(inputs), targets).backward()
        optimizer.step()
    return {"parameters": dict(model.named_parameters()), "state": lotion_fx.state_dict(model)}


def cases(inner: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for name in MODELS:
        for label, settings in METHODS.items():
            if name == "recurrent" and label in IN_PYTHON:
                continue
            yield f"{name}/{label}/adam", lambda n=name, s=settings: train(n, "adam", inner, **s)  # type: ignore[misc]
    for name in ("mlp", "lm"):
        for label, settings in FEATURES.items():
            yield f"{name}/{label}/sgd", lambda n=name, s=settings: train(n, "sgd", inner, **s)  # type: ignore[misc]
        yield f"{name}/expected_loss", lambda n=name: expected(n, inner)  # type: ignore[misc]
    for label in ("factored", "fisher"):
        yield f"lm/{label}/ours", lambda s=METHODS[label]: train("lm", "ours", inner, **s)  # type: ignore[misc]
    yield "resumed", lambda: resumed(inner)
    yield "backend", lambda: by_backend(inner)
    yield "regions", lambda: by_region(inner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="an earlier recording")
    parser.add_argument("--inner", default="aot_eager", choices=("aot_eager", "inductor", "eager"))
    parser.add_argument("--only", default="", help="cases whose name begins so")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    before = json.loads(arguments.against.read_text()) if arguments.against else {}
    recorded: dict[str, dict[str, str]] = {}
    differing = 0
    for name, run in cases(arguments.inner):
        if not name.startswith(arguments.only):
            continue
        torch._dynamo.reset()
        began = time.perf_counter()
        try:
            recorded[name] = {part: digest(value) for part, value in run().items()}
        except ValueError as error:  # a refusal is a result as well
            recorded[name] = {"refused": str(error)}
        then = before.get(name, recorded[name] if not before else {})
        changed = [part for part in {**then, **recorded[name]} if then.get(part) != recorded[name].get(part)]
        differing += bool(changed)
        print(f"{name:32} {time.perf_counter() - began:6.1f} s  {', '.join(changed) or 'same'}", flush=True)
        arguments.out.write_text(json.dumps(recorded, indent=1))
    print(f"{len(recorded)} cases, {differing} differ")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
