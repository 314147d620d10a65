"""What `lotion_fx` makes of models that nobody here wrote: one table, one row a model.

    pip install -e ".[zoo]"
    python benchmarks/zoo.py [--kind plain,transformers,timm] [--only "*bert*"] [--json PATH] [--markdown PATH]

Every model is tiny, with random weights, and takes one training step under `transform(model, "nvfp4")`; then it is
evaluated. The checks, each against the same model without us (`--checks`, see `zoo_trial.Trial`):

    train      the loss is finite, and every gradient equals plain `torch.compile`'s, bit for bit
    eval       the output in eval() equals, bit for bit, that of the plain model whose weights were rounded by hand
    eager      the same, that model run by eager PyTorch
    compiled   the same, with `torch.compile` on top of the transformed model
    exported   the same, after `torch.export` of both, whose programs are frozen
    silent     every parameter has a format or a reason; nothing warns that does not under plain `torch.compile`

'exact' to 'out' are shares of the elements of product weights: parameters of two or more dimensions that meet a product
with data, as an eager run sees it that knows nothing of us (`zoo_products.py`), or that the report gives a format.
Tables of embeddings are left out by default and do not count; frozen weights count in no sum. What the report says of
each weight in full precision is in the JSON, and summed up below the table.

torch's fast path of nn.TransformerEncoder is off: it is another kernel, which modules with hooks never take.

A kind may also be a module of your own, with `ENTRIES` as `zoo_plain.py` has them.

Models run in worker processes, each of `--batch` models; one that dies or takes longer than `--limit` seconds is one
row of the table and stops nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tabulate import tabulate

KINDS = {"plain": "zoo_plain", "transformers": "zoo_transformers", "timm": "zoo_timm"}
CHECKS = ("train", "eval", "eager", "compiled", "exported", "silent")
SHARES = ("exact", "analytic", "fisher", "frozen", "out")
_ROW = "zoo: "
_START = 180.0
"""Seconds that a worker has for its imports."""


def entries(kind: str) -> dict[str, Any]:
    """The entries of a kind by name; none where its library is not installed."""
    try:
        return {entry.name: entry for entry in importlib.import_module(KINDS.get(kind, kind)).ENTRIES}
    except ModuleNotFoundError as missing:
        if kind not in KINDS:
            raise
        print(f"{kind}: {missing}; left out", file=sys.stderr)
        return {}


# ---------------------------------------------------------------------------------------------------------- the worker


def work(kind: str, names: Sequence[str], inner: str, checks: Sequence[str]) -> None:
    """Tries models out, one line of JSON each."""
    import torch
    from zoo_trial import Trial, try_out

    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    assert all(hasattr(Trial, check) for check in CHECKS)
    known = entries(kind)
    print(_ROW + "null", flush=True)  # the time of a model begins here
    for name in names:
        torch._dynamo.reset()
        print(_ROW + json.dumps(try_out(known[name], inner, checks).to_dict()), flush=True)


# ---------------------------------------------------------------------------------------------------------- the driver


def results(kind: str, names: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result a model, whatever happens to it."""
    left = list(names)
    while left:
        done = 0
        for row in _worker(kind, left, args):
            done += 1
            yield row
        if done < len(left):
            why = f"it died, or took more than {args.limit} s"
            yield {"kind": kind, "name": left[done], "passed": False, "cause": why, "checks": {}, "failed": why}
            done += 1
        left = left[done:]


def _worker(kind: str, names: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The results of one process; ends early where it dies or a model takes too long."""
    command = [sys.executable, __file__, "--work", kind, "--inner", args.inner, "--checks", ",".join(args.checks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    errors = None if args.verbose else subprocess.DEVNULL
    process = subprocess.Popen(
        [*command, "--names", *names], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
    )
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: Iterable[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    try:
        limit = _START
        while (line := lines.get(timeout=limit)) is not None:
            if line.startswith(_ROW):
                limit = args.limit
                if row := json.loads(line.removeprefix(_ROW)):
                    yield row
    except queue.Empty:
        pass
    finally:
        process.kill()
        process.wait()


# ----------------------------------------------------------------------------------------------------------- the table


def table(rows: Sequence[dict[str, Any]], form: str) -> str:
    headers = ["kind", "model", "parameters", *SHARES, "breaks", "first step, s", "plain, s", "passed, or why not"]
    return tabulate([_cells(row) for row in rows], headers, tablefmt=form, disable_numparse=True)


def _cells(row: dict[str, Any]) -> list[str]:
    verdict = "yes" if row["passed"] else row["cause"].replace("|", "/")[:200]
    if "elements" not in row:
        return [row["kind"], row["name"], *[""] * (len(SHARES) + 4), verdict]
    total = sum(row["elements"].values())
    shares = [f"{row['elements'][share] / total:.1%}" if row["elements"][share] else "" for share in SHARES]
    times = [f"{row['seconds']:.1f}", f"{row['plain_seconds']:.1f}"]
    return [row["kind"], row["name"], f"{row['parameters']:,}", *shares, f"{row['breaks']:+d}", *times, verdict]


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line a kind, then why weights are left out or take the Fisher form."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        group = [row for row in rows if row["kind"] == kind]
        elements = sum((Counter(row.get("elements", {})) for row in group), Counter())
        good, total = elements["analytic"] + elements["exact"], elements.total() - elements["frozen"] or 1
        passed = sum(row["passed"] for row in group)
        lines.append(f"{kind}: {passed}/{len(group)} passed; {good / total:.2%} of product weights analytic or exact")
        lines += [f"    {check}: {count} fail" for check, count in _failures(group).items()]
        skipped = Counter(f"{check}: {why}" for row in group for check, why in row.get("skipped", {}).items())
        lines += [f"    {check}: {count} models" for check, count in skipped.items()]
    for key, title in (("out", "in full precision, with two or more dimensions"), ("fisher", "in the Fisher form")):
        reasons = sum((Counter(row.get(key, {})) for row in rows), Counter())
        lines += [f"{title}: {elements:,} elements: {reason}" for reason, elements in reasons.most_common()]
    return lines


def _failures(rows: Iterable[dict[str, Any]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for row in rows:
        found.update(check for check, cause in row["checks"].items() if cause)
        found["trial"] += bool(row.get("failed"))
    return +found


def _markdown(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    command = f"python benchmarks/zoo.py --kind {','.join(args.kind)} --markdown {args.markdown}"
    kinds = "\n".join(f"* {line.strip()}" for line in summary(rows))
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    return (
        f"# The zoo\n\nWhat `lotion_fx` makes of {len(rows)} models ({_versions()}), by\n\n```bash\n{command}\n```\n\n"
        f"{about}\n\n## In all\n\n{kinds}\n\n## Model by model\n\n{table(rows, 'github')}\n"
    )


def _versions() -> str:
    """The libraries that are installed, and the day."""
    found = []
    for name in ("torch", "transformers", "timm"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([*found, f"{datetime.now():%Y-%m-%d}"])


def chosen(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    for kind in args.kind:
        known = entries(kind)
        yield kind, [name for name in known if any(fnmatch.fnmatch(name, glob) for glob in args.only.split(","))]


def passed_before(args: argparse.Namespace) -> list[dict[str, Any]]:
    """With ``--resume``, the rows of ``--json`` that passed every check that is asked for."""
    if not args.resume or not Path(args.json).exists():
        return []
    rows = json.loads(Path(args.json).read_text())
    return [row for row in rows if row["passed"] and set(args.checks) <= row["checks"].keys()]


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every model's row, in the order of the kinds and their entries."""
    rows = passed_before(args)
    lock = threading.Lock()

    def one(batch: tuple[str, list[str]]) -> None:
        for row in results(*batch, args):
            with lock:
                rows.append(row)
                print(f"{len(rows):4d} {row['kind']} {row['name']}: {row['cause'] or 'passed'}", flush=True)
                if args.json:
                    Path(args.json).write_text(json.dumps(rows, indent=1))

    groups = dict(chosen(args))
    known = {(row["kind"], row["name"]) for row in rows}
    left = {kind: [name for name in names if (kind, name) not in known] for kind, names in groups.items()}
    batches = [
        (kind, names[i : i + args.batch]) for kind, names in left.items() for i in range(0, len(names), args.batch)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, batches))
    order = [(kind, name) for kind, names in groups.items() for name in names]
    return sorted(
        (row for row in rows if (row["kind"], row["name"]) in order),
        key=lambda row: order.index((row["kind"], row["name"])),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: tuple(text.split(","))  # noqa: E731
    parser.add_argument("--kind", type=names, default=tuple(KINDS), help=f"of {','.join(KINDS)}, or a module's name")
    parser.add_argument("--only", default="*", metavar="GLOBS", help="comma-separated, of models' names")
    parser.add_argument("--checks", type=names, default=CHECKS, help=f"of {','.join(CHECKS)}")
    parser.add_argument("--inner", default="aot_eager", help="aot_eager, inductor or eager")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one model")
    parser.add_argument("--batch", type=int, default=12, help="models in one process")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --json that passed")
    parser.add_argument("--markdown", metavar="PATH")
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.checks) - set(CHECKS):
        parser.error(f"--checks {unknown.pop()}: expected some of {','.join(CHECKS)}")
    if unknown := [kind for kind in args.kind if importlib.util.find_spec(KINDS.get(kind, kind)) is None]:
        parser.error(f"--kind {unknown[0]}: expected some of {','.join(KINDS)}, or a module that has ENTRIES")
    if args.resume and not args.json:
        parser.error("--resume: expected --json, whose rows are kept")
    if args.work:
        return work(args.work, args.names, args.inner, args.checks)
    rows = run(args)
    print("\n" + table(rows, "simple"), *summary(rows), sep="\n")
    if args.markdown:
        Path(args.markdown).write_text(_markdown(rows, args))
    return None


if __name__ == "__main__":
    main()
