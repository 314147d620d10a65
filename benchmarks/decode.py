"""How fast a model generates on a CPU, one token at a time, with packed weights and with torch's own.

    python benchmarks/decode.py [--width 768] [--depth 12] [--rounds 15] [--dtype float32] [--json PATH]

A GPT of 100 million parameters with random weights, its linear layers and its head alone: what reads weights. One step
is one token through all of them. One process; rounds interleave the models in a new random order each, and a ratio is
taken within a round, so that other work on the machine is in both. Rows of other runtimes join where `OTHERS` has one
that imports.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import lotion_fx
from lotion_fx.kernels.cpu_linear import instructions
from lotion_fx.timing import interleaved, seconds

VOCAB = 16384
PACKED = ("int4/bf16", "nvfp4/pow2", "mxfp4", "nf4")
BARS = {"int4/bf16": 3.0, "nvfp4/pow2": 2.5, "mxfp4": 2.5}  # times torch's bfloat16
CPU = torch.device("cpu")

Step = tuple[Callable[[], object], int]  # one token, and the bytes of the weights


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value = self.qkv(self.norms[0](x)).chunk(3, -1)[2]  # attention to one token is its value
        x = x + self.out(value)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Decoder(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def bytes_of(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def made(width: int, depth: int, fmt: str | None, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = Decoder(width, depth)
    if fmt is None:
        return model.to(dtype).eval()
    model = lotion_fx.transform(model, fmt=fmt, inner="eager").eval()
    with torch.no_grad():
        model(torch.randn(1, 1, width))
    return lotion_fx.quantize(model).to(dtype)


def onnxruntime_int4(width: int, depth: int) -> Step:
    """The same model in int4, exported, by onnxruntime with activations in float32."""
    import onnxruntime

    torch.manual_seed(0)
    model, x = lotion_fx.transform(Decoder(width, depth), "int4", inner="eager").eval(), torch.randn(1, 1, width)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model(x)
        told = lotion_fx.export(model, f"{folder}/model.onnx", "onnx", example_inputs=(x,))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(told.path, options, providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    return partial(session.run, None, {name: x.numpy()}), told.nbytes


def llama_cpp(fmt: str, width: int, depth: int) -> Step:
    """A Llama of as many weights by llama.cpp, whose activations have 8 bits; attention to 32 tokens included."""
    from llama_cpp import Llama
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 8 * width // 3 // 64 * 64, "num_hidden_layers": depth}
    config = LlamaConfig(vocab_size=VOCAB, num_attention_heads=width // 64, bos_token_id=0, eos_token_id=1, **shape)
    model = lotion_fx.transform(LlamaForCausalLM(config), fmt, inner="eager").eval()
    with tempfile.TemporaryDirectory() as folder:
        told = lotion_fx.export(model, f"{folder}/model.gguf", "gguf")
        threads = torch.get_num_threads()
        client = Llama(str(told.path), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)
    client.eval(list(range(2, 34)))
    return partial(client.eval, [5]), told.nbytes


# A row's name, the package it stands on, and what makes its step of a width and a depth.
OTHERS: dict[str, tuple[str, Callable[[int, int], Step]]] = {
    "onnxruntime int4": ("onnxruntime", onnxruntime_int4),
    "llama.cpp Q4_0": ("llama_cpp", partial(llama_cpp, "int4/32/fp16")),
    "llama.cpp MXFP4": ("llama_cpp", partial(llama_cpp, "mxfp4")),
    "llama.cpp NVFP4": ("llama_cpp", partial(llama_cpp, "nvfp4/pow2")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of packed models' inputs")
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    models = {"torch bfloat16": (None, torch.bfloat16), "torch float32": (None, torch.float32)}
    models |= {fmt: (fmt, dtype) for fmt in PACKED}
    steps: dict[str, Callable[[], float]] = {}
    size: dict[str, int] = {}
    for name, (fmt, its) in models.items():
        model = made(args.width, args.depth, fmt, its)
        x = torch.randn(1, 1, args.width, dtype=its)
        steps[name], size[name] = partial(seconds, partial(model, x), CPU), bytes_of(model)
    for name, (package, runtime) in OTHERS.items():
        if importlib.util.find_spec(package):
            step, size[name] = runtime(args.width, args.depth)
            steps[name] = partial(seconds, step, CPU)
    with torch.inference_mode():
        found = interleaved(steps, args.rounds, base="torch bfloat16")
    for name, row in found.items():
        row.update(tokens_per_s=1e3 / row["step_ms"], speedup=1 / row["ratio"], bytes=size[name])
    count = sum(p.numel() for p in Decoder(args.width, args.depth).parameters())
    print(f"{count / 1e6:.1f}M parameters, {torch.get_num_threads()} threads, {instructions()}, {args.dtype} inputs")
    rows = [
        (n, r["tokens_per_s"], r["speedup"], 1 / r["ratio_high"], 1 / r["ratio_low"], BARS.get(n), r["bytes"] / 1e6)
        for n, r in found.items()
    ]
    headers = ("model", "tokens/s", "x torch bf16", "from", "to", "bar", "MB")
    print(tabulate(rows, headers, floatfmt=("", ".1f", ".2f", ".2f", ".2f", ".1f", ".1f")))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
