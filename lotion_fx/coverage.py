"""`report`: what happens to every parameter, and why."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lotion_fx.by_hand import PATIENCE
from lotion_fx.missing import IDLE
from lotion_fx.passes.attach.probe import Code
from lotion_fx.schedule import METHODS
from lotion_fx.shards import local_of
from lotion_fx.state import Weight, names_of, registry, smoothings_of
from lotion_fx.unhooked import tell
from lotion_fx.unseen import axis_told
from lotion_fx.update import term_of


@dataclass(frozen=True)
class Row:
    """One parameter.

    Args:
        name: qualified name.
        shape: as the model holds it.
        format: the format's name, None in full precision.
        estimator: ``"analytic"``, ``"ggn"`` (analytic, at labels of the model's own), ``"fisher"``; ``"exact"`` or
            ``"second order"`` with the loss in the graph, see `expected_loss`; or None (no term).
        reason: why ``"fisher"``, or why not quantized; of a moment stream, its approximations; and why the block axis
            is not known, where it is not.
        uses: the ops that meet data with it.
        block_axis: the dimension its blocks run along; where that is assumed, ``reason`` says so, and why.
        sqnr: signal to quantization noise of rounding to nearest, in dB.
        term: its part of the expected-loss term, at the present curvature; None in a moment stream, where
            `expected_loss` tells it.
        share: the part of the whole term that is.
    """

    name: str
    shape: tuple[int, ...]
    format: str | None
    estimator: str | None
    reason: str
    uses: tuple[str, ...]
    block_axis: int | None
    sqnr: float | None
    term: float | None
    share: float | None


@dataclass(frozen=True)
class CoverageReport:
    """Every parameter of a transformed model. ``str()`` is a table, ``to_dict()`` for machines.

    Args:
        rows: one for each parameter.
        size: measured over counted size of the term and its standard error, see `transform`'s ``calibrate``; None
            where nothing was measured, and the count stands.
        measurements: how many steps it comes from.
        unmeasured: why the size was not measured though it was to be; else empty.
        phase: of the training, see `transform`'s ``schedule``.
        next_phase: the phase to come and the step that it begins with, where 0 is the first; None in the last.
        steps: optimizer steps so far.
    """

    rows: tuple[Row, ...]
    size: tuple[float, float] | None = None
    measurements: int = 0
    unmeasured: str = ""
    phase: str = "lotion"
    next_phase: tuple[str, int] | None = None
    steps: int = 0

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}: no such parameter; the report has {', '.join(r.name for r in self.rows[:8])} ...")

    @property
    def term(self) -> float:
        """The whole expected-loss term, in units of the loss, before ``strength``."""
        return sum(row.term or 0.0 for row in self.rows)

    @property
    def coverage(self) -> float:
        """The share of all parameters (elements) that is quantized."""
        total = sum(math.prod(row.shape) for row in self.rows)
        return sum(math.prod(row.shape) for row in self.rows if row.format) / max(total, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, as JSON has them: None for what is no finite number."""
        return {
            "coverage": self.coverage,
            "term": _finite(self.term),
            "size": _finite(self.size),
            "measurements": self.measurements,
            "unmeasured": self.unmeasured,
            "phase": self.phase,
            "next_phase": self.next_phase,
            "steps": self.steps,
            "parameters": [{name: _finite(value) for name, value in asdict(row).items()} for row in self.rows],
        }

    def __str__(self) -> str:
        """The table: as wide as its texts are, or as the terminal where it is printed on one."""
        table = [
            [
                row.name,
                "x".join(map(str, row.shape)),
                row.format or "-",
                row.estimator or "-",
                "-" if row.block_axis is None else str(row.block_axis),
                "" if row.sqnr is None else f"{row.sqnr:.1f}",
                "" if row.share is None else f"{row.share:.1%}",
                "; ".join(filter(None, [row.reason, " ".join(row.uses) if row.format or not row.reason else ""])),
            ]
            for row in self.rows
        ]
        headers = ["parameter", "shape", "format", "estimator", "axis", "SQNR dB", "share", "uses, or why not"]
        rows = [headers, *table]
        if sys.stdout.isatty():
            _fit(rows, shutil.get_terminal_size().columns)
        foot = f"{self.coverage:.1%} of all parameters quantized; expected-loss term {self.term:.3g}"
        if self.size is not None:
            error = abs(self.term) * self.size[1] / self.size[0]
            foot += f" ± {error:.1g}, measured in {self.measurements} steps as {self.size[0]:.3g} times the count"
        elif self.unmeasured:
            foot += f", its size not measured: {self.unmeasured}"
        foot += f"\nphase {self.phase!r}, after {self.steps} steps"
        if self.next_phase is not None:
            foot += "; {!r} begins after {}".format(*self.next_phase)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * width for width in widths])
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([*lines, foot])


def _fit(rows: list[list[str]], width: int) -> None:
    """Cuts names at their beginning, and reasons at their end, so that a table is no wider than that."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = width - sum(widths[1:-1]) - 2 * (len(widths) - 1)
    for_name = max(min(widths[0], room // 2), room - widths[-1])
    for_reason = max(room - min(widths[0], for_name), 0)
    for row in rows:
        row[0] = row[0] if len(row[0]) <= for_name else "..." + row[0][3 - for_name :]
        row[-1] = row[-1] if len(row[-1]) <= for_reason else row[-1][: for_reason - 3] + "..."


@torch.no_grad()
def report(model: nn.Module) -> CoverageReport:
    """What happens to every parameter of a transformed model, and why.

    Uses, estimator and block axis are known once the model ran, the term and its shares after the first step. Of a
    sharded parameter, SQNR and term are those of this rank's shard: nothing is communicated.

    Raises:
        ValueError: the model is not under lotion_fx.
    """
    names, smoothings = names_of(model), smoothings_of(model)
    for smoothing in smoothings:
        tell(smoothing)
    found = [(name, weight, term_of(weight)) for weight, name in names.items()]
    total = sum(float(term) for _, _, term in found if term is not None)
    rows = {name: _row(name, weight, term, total) for name, weight, term in found}
    parameters = dict(model.named_parameters())
    for (name, parameter), weight in zip(parameters.items(), registry.find(parameters.values()), strict=True):
        if weight is None:
            reason = "not there when the model was transformed"
            rows[name] = Row(name, tuple(parameter.shape), None, None, reason, (), None, None, None, None)
    tally = smoothings[0].tally
    return CoverageReport(
        tuple(rows.values()),
        size=tally.measuring.common,
        measurements=tally.measuring.draws,
        unmeasured=tally.measuring.why_not if tally.phase.has_term else "",
        phase=tally.phase.name,
        next_phase=tally.next_phase,
        steps=tally.steps,
    )


def _row(name: str, weight: Weight, term: torch.Tensor | None, total: float) -> Row:
    uses = tuple(dict.fromkeys(use.op for use in weight.uses or ()))
    if not weight.selected:
        reason = weight.excluded or weight.why_not
        return Row(name, weight.shape, None, None, reason, uses, None, None, None, None)
    estimator, reason = _estimator(weight)
    part = None if term is None else float(term)
    share = part / total if part is not None and total > 0 else None
    has_run = weight.uses is not None or weight.smoothing.tally.forwards > 0
    axis = weight.axis if has_run else None  # a graph may still tell another
    reason = "; ".join(filter(None, [reason, _assumed(weight) if has_run else ""]))
    return Row(
        name, weight.shape, weight.quantizer.format.name, estimator, reason, uses, axis, _sqnr(weight), part, share
    )


def _assumed(weight: Weight) -> str:
    """That blocks run along the last dimension for want of a better, why, and what helps; empty where it is known."""
    use, block = weight.contraction, weight.quantizer.format.block
    single = sum(length > 1 for length in weight.shape) < 2
    known = use is not None and (use.axis is not None or not use.is_product)
    owners = [(ref(), attribute) for ref, attribute in weight.owners]
    if block == "tensor" or single or known or axis_told(owners, weight.shape) is not None:
        return ""
    why = "no graph shows what sums over it" if use is None else f"{use.op} sums over no one dimension that is known"
    teach = ", or teach lotion_fx the op by register_contraction" if use is not None and "." in use.op else ""
    return f"blocks along dimension {weight.axis} by assumption: {why}; keep the one that is summed over last{teach}"


def _estimator(weight: Weight) -> tuple[str | None, str]:
    settings, certificate, code = weight.smoothing.settings, weight.gathered.certificate, weight.curvature.code
    if not weight.smoothing.tally.has_term:
        phase = weight.smoothing.tally.phase.name
        is_method_s = settings.schedule.shares == METHODS[settings.method] == ((phase, 1.0),)
        told = f"method={settings.method!r}" if is_method_s else f"phase {phase!r}"
        return None, f"{told} has no expected-loss term"
    parameter = weight.parameter()
    if parameter is not None and not parameter.requires_grad:
        return None, "frozen: no gradient reaches it"
    if certificate is not None:
        return certificate.kind, str(certificate).partition(": ")[2]
    if code is None:
        return None, _not_stepped(weight)
    idle = weight.gathered.last_step is not None and weight.gathered.last_step < weight.smoothing.tally.steps
    absent = IDLE if idle else weight.curvature.absent
    if code is Code.ANALYTIC:
        return "ggn" if settings.samples_labels else "analytic", absent
    return "fisher", absent or code.reason


def _not_stepped(weight: Weight) -> str:
    """Why there is no curvature of a weight yet."""
    tally = weight.smoothing.tally
    if weight.uses is None and not tally.forwards:
        return "not run yet"
    if tally.steps and not tally.term_steps:
        return "no step with the term was taken yet"
    if tally.steps:
        return "no gradient in any step so far" if weight.gathered.has_optimizer else "in no optimizer that has stepped"
    passes = tally.backwards
    return "no step was taken yet" + (
        f", after {passes} forwards with backward: does a torch.optim optimizer hold it?" if passes >= PATIENCE else ""
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sqnr(weight: Weight) -> float | None:
    parameter = weight.parameter()
    if parameter is None or not (local := local_of(parameter).float()).numel():
        return None
    noise = (weight.quantizer.rtn(local) - local).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(local.square().sum() / noise))
