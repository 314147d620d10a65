"""Everything that only a GPU can tell, in one command and one JSON file; under 8 minutes.

    python benchmarks/gpu.py                        # from a bare checkout: torch and triton are enough, no network
    python benchmarks/gpu.py --device cpu --quick   # the plumbing, without a device

Parts: ``step`` (the step ratio of a transformed GPT of 124 million parameters beside the plain compiled one, and peak
memory), ``kernels`` (measured beside predicted times), ``tests`` (``pytest -m gpu``). What fails is recorded with its
error, and the others go on. Nothing needs to be installed: the package is laid out by links in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECONDS = 460  # of all parts: what would begin later is left out and says so
PARTS = ("step", "kernels", "tests")


def lay_out(folder: Path) -> Path:
    """Links the checkout as it is installed: ``passes``, ``kernels`` and ``examples`` inside of ``lotion_fx``.

    Returns:
        What to put on the path.
    """
    package = folder / "lotion_fx"
    package.mkdir(parents=True)
    sources = [*(ROOT / "lotion_fx").iterdir(), *(ROOT / name for name in ("passes", "kernels", "examples"))]
    for source in sources:
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    return folder


def missing() -> list[str]:
    """What the package needs and this Python does not have."""
    from importlib.util import find_spec

    return [name for name in ("torch", "triton", "sympy", "networkx", "tabulate") if find_spec(name) is None]


def about(device: str) -> dict[str, Any]:
    """The device, the versions and the commit."""
    import torch
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit.stdout.strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }
    if device == "cuda":
        found["memory_mib"] = torch.cuda.get_device_properties(0).total_memory / 2**20
    return found


def tests(device: str, quick: bool, until: float) -> dict[str, Any]:
    """``pytest -m gpu``, or without a device and quickly the count of what it would run."""
    # Without `addopts`: workers would share the device, and a bare machine has no pytest-xdist.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["tests/kernels"]
    command += ["--collect-only"] if device == "cpu" else []
    left = max(until - time.monotonic(), 10.0)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired as stopped:
        output = (stopped.stdout or b"").decode(errors="replace")
        raise TimeoutError(f"not over after {left:.0f} s; its output ends with\n{output[-2000:]}") from None
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    return {"summary": done.stdout.strip().splitlines()[-1]}


def step(device: str, quick: bool, until: float) -> dict[str, Any]:
    import gpu_step
    import torch

    size, inner, rounds = (gpu_step.TINY, "aot_eager", 4) if quick else (gpu_step.Size(), "inductor", 20)
    on = torch.device(device)
    return {"size": vars(size), "rows": gpu_step.rows(on, size, inner=inner, rounds=rounds, until=until - 150)}


def kernels(device: str, quick: bool, until: float) -> dict[str, Any]:
    import gpu_kernels
    import torch

    return {"rows": gpu_kernels.rows(torch.device(device), quick=quick)}


def report(parts: dict[str, Callable[[str, bool, float], dict[str, Any]]], device: str, quick: bool) -> dict[str, Any]:
    """What each part found, or its error; and how long it took."""
    until = time.monotonic() + SECONDS
    found: dict[str, Any] = {}
    for name, part in parts.items():
        began = time.monotonic()
        try:
            if began > until:
                raise TimeoutError("left out: the time was up")
            found[name] = part(device, quick, until)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        found[name]["seconds"] = time.monotonic() - began
    return found


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    from tabulate import tabulate

    lines = [f"{found['device']}, torch {found['torch']}, triton {found['triton']}"]
    for name, part in found["parts"].items():
        lines.append(f"\n{name}: {part['seconds']:.0f} s")
        if "error" in part:
            lines.append(part["error"].strip().splitlines()[-1])
        rows = [
            {k: str(v).strip().splitlines()[-1] if k == "error" else v for k, v in r.items()}
            for r in part.get("rows", [])
        ]
        lines.append(tabulate(rows, headers="keys", floatfmt=".3f") if rows else part.get("summary", ""))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing compiled by Inductor in the step")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where to write everything [gpu.json]")
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    if lacking := missing():
        parser.exit(1, f"not installed here: {', '.join(lacking)}; they are pure Python but for torch and triton\n")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "no CUDA device; --device cpu --quick runs the plumbing, `lotion-fx kernels` predicts times\n")
    with tempfile.TemporaryDirectory() as folder:
        path = str(lay_out(Path(folder) / "tree"))
        sys.path[:0] = [path, str(Path(__file__).parent)]
        os.environ["PYTHONPATH"] = os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])
        known = {"step": step, "kernels": kernels, "tests": tests}
        chosen = {name: known[name] for name in PARTS if name in args.parts.split(",")}
        found = {**about(args.device), "parts": report(chosen, args.device, args.quick)}
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(text(found))
    print(f"\nall of it: {args.json}")
    return any("error" in part for part in found["parts"].values())


if __name__ == "__main__":
    sys.exit(main())
