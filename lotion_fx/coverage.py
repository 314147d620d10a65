"""`report`: what happens to every parameter, and why."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from lotion_fx.passes.attach.probe import Code
from lotion_fx.shards import local_of
from lotion_fx.state import Weight, names_of, registry
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
        reason: why ``"fisher"``, or why not quantized; of a moment stream, its approximations.
        uses: the ops that meet data with it.
        block_axis: the dimension its blocks run along.
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
    """Every parameter of a transformed model. ``str()`` is a table, ``to_dict()`` for machines."""

    rows: tuple[Row, ...]

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
        """Plain numbers, strings, lists and dictionaries."""
        return {"coverage": self.coverage, "term": self.term, "parameters": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        table = [
            (
                _short(row.name, 34),
                "x".join(map(str, row.shape)),
                row.format or "-",
                row.estimator or "-",
                "-" if row.block_axis is None else row.block_axis,
                "" if row.sqnr is None else f"{row.sqnr:.1f}",
                "" if row.share is None else f"{row.share:.1%}",
                _short(row.reason or " ".join(row.uses), 34, keep_end=False),
            )
            for row in self.rows
        ]
        headers = ("parameter", "shape", "format", "estimator", "axis", "SQNR dB", "share", "uses, or why not")
        foot = f"\n{self.coverage:.1%} of all parameters quantized; expected-loss term {self.term:.3g}"
        return tabulate(table, headers, disable_numparse=True) + foot


def _short(text: str, width: int, *, keep_end: bool = True) -> str:
    if len(text) <= width:
        return text
    return "..." + text[3 - width :] if keep_end else text[: width - 3] + "..."


@torch.no_grad()
def report(model: nn.Module) -> CoverageReport:
    """What happens to every parameter of a transformed model, and why.

    Uses, estimator and block axis are known once the model ran, the term and its shares after the first step. Of a
    sharded parameter, SQNR and term are those of this rank's shard: nothing is communicated.

    Raises:
        ValueError: the model is not under lotion_fx.
    """
    found = [(name, weight, term_of(weight)) for weight, name in names_of(model).items()]
    total = sum(float(term) for _, _, term in found if term is not None)
    rows = {name: _row(name, weight, term, total) for name, weight, term in found}
    for name, parameter in model.named_parameters():
        if registry[parameter] is None:
            reason = "not there when the model was transformed"
            rows[name] = Row(name, tuple(parameter.shape), None, None, reason, (), None, None, None, None)
    return CoverageReport(tuple(rows.values()))


def _row(name: str, weight: Weight, term: torch.Tensor | None, total: float) -> Row:
    uses = tuple(dict.fromkeys(use.op for use in weight.uses or ()))
    if not weight.selected:
        reason = weight.excluded or weight.why_not
        return Row(name, weight.shape, None, None, reason, uses, None, None, None, None)
    estimator, reason = _estimator(weight)
    part = None if term is None else float(term)
    share = part / total if part is not None and total > 0 else None
    axis = None if weight.uses is None and weight.curvature.code is None else weight.axis
    return Row(
        name, weight.shape, weight.quantizer.format.name, estimator, reason, uses, axis, _sqnr(weight), part, share
    )


def _estimator(weight: Weight) -> tuple[str | None, str]:
    settings, certificate, code = weight.smoothing.settings, weight.gathered.certificate, weight.curvature.code
    if settings.method != "lotion":
        return None, f"method={settings.method!r} has no expected-loss term"
    if not weight.smoothing.tally.has_term:
        return None, "finishing without the term"
    parameter = weight.parameter()
    if parameter is not None and not parameter.requires_grad:
        return None, "frozen: no gradient reaches it"
    if certificate is not None:
        return certificate.kind, str(certificate).partition(": ")[2]
    if code is None:
        return None, "no step was taken yet" if weight.uses is not None else "not run yet"
    if code is Code.ANALYTIC:
        return "ggn" if settings.samples_labels else "analytic", ""
    return "fisher", code.reason


def _sqnr(weight: Weight) -> float | None:
    parameter = weight.parameter()
    if parameter is None or not (local := local_of(parameter).float()).numel():
        return None
    noise = (weight.quantizer.rtn(local) - local).square().sum()
    return float(10 * torch.log10(local.square().sum() / noise)) if noise > 0 else math.inf
