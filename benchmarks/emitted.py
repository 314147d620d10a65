"""What training a block costs under each method in the graphs that Inductor emits for a GPU that need not be there.

    python benchmarks/emitted.py [--arch 80] [--dtype bfloat16] [--batch 16] [--length 1024] [--width 768] [--json PATH]

Inductor's own count over the forward and the backward graph of one pre-norm block with four weights, next to the same
block plain. 'bytes' are what every kernel reads and writes, those of the matrix products and of the attention included;
'fused' are those of the Triton kernels that Inductor generates alone. 'kernels' are launches of Triton kernels and
calls of libraries; 'sums' are vectors that a kernel leaves to ATen to finish. 'step' is the update at the optimizer's
step, once however many micro-batches there were. Predicted from the source, not measured.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from tabulate import tabulate

from lotion_fx.kernels.emit.emitted import emitted

CASES: dict[str, dict[str, Any]] = {
    "plain": {"method": None},
    "lotion factored nvfp4": {"method": "lotion", "fmt": "nvfp4"},
    "lotion factored int4/128": {"method": "lotion", "fmt": "int4/128"},
    "lotion fisher nvfp4": {"method": "lotion", "fmt": "nvfp4", "curvature": "fisher"},
    "lotion full nvfp4": {"method": "lotion", "fmt": "nvfp4", "curvature": "full"},
    "ste nvfp4": {"method": "ste", "fmt": "nvfp4"},
    "ste_scale nvfp4": {"method": "ste_scale", "fmt": "nvfp4"},
}
WEIGHTS = 4


def row(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One case's counts."""
    settings = {
        "dtype": getattr(torch, args.dtype),
        "shape": (args.batch, args.length, args.width),
        "heads": args.heads,
    }
    graphs = emitted(args.arch, **CASES[name], **settings)
    *training, step = graphs if graphs[-1].graph == "step" else [*graphs, None]
    return {
        "case": name,
        "bytes": sum(graph.bytes for graph in training),
        "fused_bytes": sum(graph.fused_bytes for graph in training),
        "kernels": sum(len(graph.triton_launches) + len(graph.library_calls) for graph in training),
        "sums": sum(graph.workspace_sums for graph in training),
        "step_bytes": step.bytes if step else 0,
        "step_kernels": len(step.triton_launches) if step else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=80)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 by autocast")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated; 'plain' is always in")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    rows = [row(name, args) for name in dict.fromkeys(["plain", *args.cases.split(",")])]
    plain, table = rows[0], []
    for each in rows:
        each["bytes_ratio"] = each["bytes"] / plain["bytes"]
        each["fused_ratio"] = each["fused_bytes"] / plain["fused_bytes"]
        each["kernels_more_per_weight"] = (each["kernels"] - plain["kernels"]) / WEIGHTS
        cells = [each["case"], f"{each['bytes'] / 1e6:.1f}", f"{each['bytes_ratio']:.3f}", f"{each['fused_ratio']:.3f}"]
        cells += [each["kernels"], f"{each['kernels_more_per_weight']:.2f}", each["sums"]]
        table.append([*cells, f"{each['step_bytes'] / 1e6:.1f}", each["step_kernels"]])
    headers = ["method", "MB", "bytes", "fused", "kernels", "more a weight", "sums", "step MB", "step kernels"]
    print(f"block of width {args.width}, {args.batch} x {args.length}, {args.dtype}, sm_{args.arch}")
    print(tabulate(table, headers, disable_numparse=True, colalign=("left", *["right"] * 8)))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
