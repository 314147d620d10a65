"""The rows of the table as data: how a model is trained, and how its weights are rounded in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lotion_fx.examples.forking import after_plain
from lotion_fx.examples.runlog import fingerprint
from lotion_fx.numerics.formats import Format

ROUNDINGS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "gptq": {"method": "gptq"},
    "two_sided": {"method": "two_sided"},
    "descent": {"method": "descent"},
    "rounds": {"method": "descent", "rounds": 4},
    "searched": {"method": "nearest", "scales": "searched"},
    "gptq_searched": {"method": "gptq", "scales": "searched"},
    "descent_searched": {"method": "descent", "scales": "searched"},
    "descent_auto": {"method": "descent", "scales": "auto"},
    "descent_many": {"method": "descent", "scales": "searched"},
    "in_order": {"method": "descent", "in_order": True},
    "in_order_searched": {"method": "descent", "scales": "searched", "in_order": True},
    "in_order_rounds": {"method": "descent", "rounds": 4, "in_order": True},
    "adaround": {},
}
"""What `lotion_fx.round_` is told, ``in_order=False`` where nothing is said; "nearest" is what a model in ``eval()``
runs at without it, and "adaround" is not ours."""

BATCHES = {"rounds": 32, "in_order_rounds": 32, "descent_many": 100}
"""How many a rounding sees, where not the few that the others see. Other numbers need another name, by which the log
tells runs apart. Rounds are 224 passes forward and backward."""

SAID = {
    "gptq": "GPTQ",
    "two_sided": "two-sided rounding",
    "searched": "searched scales",
    "gptq_searched": "GPTQ at searched scales",
    "descent_searched": "descent at searched scales",
    "descent_auto": "descent at the better scales",
    "descent_many": "descent at searched scales, 100 batches",
    "in_order": "descent in order",
    "in_order_searched": "descent in order at searched scales",
    "in_order_rounds": "descent in order, rounds",
    "adaround": "AdaRound",
}
"""What the table calls a rounding, where not as it is called here."""

REST = 10.0
"""Biases and norms learn at so many times the learning rate of weights: better than 1, level with 30 (one seed)."""


def scale_rate(fmt: Format) -> float:
    """Over the weights' learning rate, that which trains scales by them: the best of 1, 3 and 10 (one seed)."""
    if fmt.grid.bits <= 2 or not isinstance(fmt.block, int):
        return 10.0
    return 3.0 if fmt.grid.bits == 3 else 1.0


REVISION = 1
"""Of what no recipe says: raise it where a change of the code changes what every run measures."""

Phases = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Args:
        label: what the table calls it.
        arguments: of `lotion_fx.transform`, besides the format and the number of steps. A schedule that begins with
            "plain" goes on from the full-precision run of its seed, and one that is nothing else costs no training.
        roundings: of `ROUNDINGS`, those to deploy it by.
        rival: it has no expected-loss term: what our best row is to be at or below.
        learned: trained by `lsq`, from where its schedule's plain phase ends.
        rounded_first: of `ROUNDINGS`: it starts at weights that `lotion_fx.round_` has rounded.
        clipped: it starts at searched scales, with weights clipped to them, or under `lsq` the scales alone.
        held: the quantized weights are, under ``method="scales"`` their codes alone, and all others are trained, at
            `REST` times the learning rate.
        distills: from the end of its first phase on the loss is the divergence from the full-precision model at the
            end of its own training.
    """

    label: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    roundings: tuple[str, ...] = ("nearest",)
    rival: bool = False
    learned: bool = False
    rounded_first: str = ""
    clipped: bool = False
    held: bool = False
    distills: bool = False

    @property
    def trains_scales(self) -> bool:
        """Whether codes are held and scales are trained, which powers of two cannot be."""
        return self.arguments.get("method") == "scales"

    @property
    def first_share(self) -> float:
        """How much of the training the first phase is."""
        schedule = self.arguments.get("schedule")
        return 1.0 - self.arguments.get("finish", 0.0) if not isinstance(schedule, tuple) else schedule[0][1]

    @property
    def fork(self) -> float:
        """The share of the training that the full-precision run does for it."""
        return 1.0 if self.arguments.get("method") == "ptq" else after_plain(self.arguments)[0]

    @property
    def has_phases(self) -> bool:
        """Whether `lotion_fx.transform` needs to know the number of steps."""
        return bool({"schedule", "finish", "start"} & self.arguments.keys()) or self.arguments.get("method") == "cage"

    def fingerprint(self, **conditions: Any) -> str:
        """Eight digits that change with anything that may change the trained model; its label and rows are none."""
        what = {"arguments": dict(self.arguments), "learned": self.learned, "distills": self.distills}
        # Apart, for the log has runs of before there were any.
        what |= {"rounded_first": self.rounded_first, "held": self.held} if self.held else {}
        what |= {"clipped": True} if self.clipped else {}
        return fingerprint(revision=REVISION, **what, **conditions)


BOTH = ("nearest", "two_sided")
ALL = (
    *BOTH,
    "descent",
    "rounds",
    "descent_searched",
    "descent_auto",
    "in_order",
    "in_order_searched",
    "in_order_rounds",
)
STE_FROM_FP = {"schedule": (("plain", 0.6), ("ste_scale", 0.4))}
LSQ_FROM_FP = {"schedule": (("plain", 0.6), ("lsq", 0.4))}


def _held(name: str, label: str, rounding: str) -> dict[str, Recipe]:
    """Rounded first, then trained with its codes held: all but the quantized weights, or their scales as well."""
    rest = Recipe(f"{label}, then the rest", {"method": "ste"}, rounded_first=rounding, held=True)
    scales = Recipe(f"{label}, then scales and the rest", {"method": "scales"}, rounded_first=rounding, held=True)
    return {f"{name}_rest": rest, f"{name}_scales": scales}


RECIPES: dict[str, Recipe] = {
    "ptq": Recipe("PTQ", {"method": "ptq"}, tuple(ROUNDINGS), rival=True),
    "ste_from_fp": Recipe("full precision, then STE", STE_FROM_FP, BOTH, rival=True),
    "cage": Recipe("CAGE", {"method": "cage"}, BOTH, rival=True),
    "ste_clipped": Recipe("full precision, then STE from searched scales", STE_FROM_FP, rival=True, clipped=True),
    "lsq": Recipe("full precision, then LSQ", LSQ_FROM_FP, rival=True, learned=True),
    "lsq_clipped": Recipe(
        "full precision, then LSQ from searched scales", LSQ_FROM_FP, rival=True, learned=True, clipped=True
    ),
    "lotion": Recipe("LOTION", {"method": "lotion"}, BOTH),
    "lotion_finish": Recipe("LOTION with finish", {"method": "lotion", "finish": 0.4}, BOTH),
    "lotion_ste": Recipe(
        "LOTION, then STE", {"calibrate": False, "schedule": (("lotion", 0.7), ("ste_scale", 0.3))}, ("nearest",)
    ),
    "measured_ste": Recipe(
        "LOTION, its size measured, then STE", {"schedule": (("lotion", 0.7), ("ste_scale", 0.3))}, ("nearest",)
    ),
    "late_adaptive": Recipe(
        "full precision, then LOTION for `round_`",
        {"noise": "adaptive", "calibrate": False, "schedule": (("plain", 0.6), ("lotion", 0.4))},
        ALL,
    ),
    "adaptive": Recipe("LOTION for `round_`", {"noise": "adaptive", "calibrate": False}, ALL),
    "rounded_ste": Recipe("`round_`, then STE", {"method": "ste_scale"}, rounded_first="two_sided"),
    "rounded_rest": Recipe("`round_`, then the rest", {"method": "ste"}, rounded_first="descent", held=True),
    **_held("searched", "`round_` at searched scales", "descent_searched"),
    **_held("many", "`round_` at searched scales on 100 batches", "descent_many"),
    **_held("ordered", "`round_` in order at searched scales", "in_order_searched"),
    "late_lotion": Recipe("full precision, LOTION", {"schedule": (("plain", 0.6), ("lotion", 0.4))}, BOTH),
    "late_start": Recipe(
        "full precision, LOTION, STE", {"schedule": (("plain", 0.6), ("lotion", 0.2), ("ste_scale", 0.2))}, BOTH
    ),
    "ste_distilled": Recipe("full precision, then STE, distilled", STE_FROM_FP, rival=True, distills=True),
}


def row_name(recipe: str, rounding: str) -> str:
    """What the log calls a row."""
    return recipe if rounding == "nearest" else f"{recipe}+{rounding}"


def rows() -> dict[str, tuple[str, str]]:
    """Each row's recipe and rounding, in the table's order."""
    return {row_name(name, rounding): (name, rounding) for name, each in RECIPES.items() for rounding in each.roundings}


def label_of(row: str) -> str:
    """What the table calls a row."""
    name, rounding = rows()[row]
    end = "" if rounding == "nearest" else f" + {SAID.get(rounding, rounding)}"
    return RECIPES[name].label + end
