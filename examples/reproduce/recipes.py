"""The methods of the LOTION paper's comparison as data, with those that this toolkit adds and a rival of its."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lotion_fx.examples.runlog import fingerprint

REVISION = 1
"""Of what no recipe says: raise it where a change of the code changes what every run measures."""

FORMATS = ("int8/tensor", "int4/tensor", "fp4/tensor")
"""Those of the paper: levels -127 to 127, -7 to 7 and E2M1, each weight with one scale, its absolute maximum over the
largest level. Any other format of lotion_fx runs as well."""


@dataclass(frozen=True)
class Recipe:
    """One way to train and to round.

    Args:
        label: what figures and tables call it.
        arguments: of `lotion_fx.transform`, besides the format and the number of steps.
        color: its own in every figure; the palette of Okabe and Ito, which the colour-blind can tell apart.
        two_sided: whether `lotion_fx.round_` rounds the weights in the end, instead of to nearest.
    """

    label: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    color: str = "#000000"
    two_sided: bool = False

    @property
    def has_phases(self) -> bool:
        """Whether `lotion_fx.transform` needs to know the number of steps."""
        return bool({"schedule", "finish"} & self.arguments.keys()) or self.arguments.get("method") == "cage"

    def fingerprint(self, **conditions: Any) -> str:
        """Changes with anything that may change a run's result; label and colour are none."""
        what = {"arguments": dict(self.arguments), "two_sided": self.two_sided}
        return fingerprint(revision=REVISION, **what, **conditions)


RECIPES: dict[str, Recipe] = {
    "ptq": Recipe("PTQ", {"method": "ptq"}, "#7f7f7f"),
    "ste": Recipe("QAT", {"method": "ste"}, "#e69f00"),
    "ste_scale": Recipe("QAT, scale differentiated", {"method": "ste_scale"}, "#d55e00"),
    "cage": Recipe("CAGE", {"method": "cage"}, "#cc79a7"),
    "lotion": Recipe("LOTION", {"method": "lotion"}, "#0072b2"),
    "lotion_full": Recipe("LOTION, full curvature", {"method": "lotion", "curvature": "full"}, "#56b4e9"),
    "lotion_fisher": Recipe("LOTION, Fisher", {"method": "lotion", "curvature": "fisher"}, "#f0e442"),
    "finish": Recipe("LOTION with finish", {"method": "lotion", "finish": 0.4}, "#009e73"),
    "round_": Recipe(
        "plain, LOTION for round_",
        {"noise": "adaptive", "calibrate": False, "schedule": (("plain", 0.6), ("lotion", 0.4))},
        "#000000",
        two_sided=True,
    ),
}
"""By the names of the command line. The paper's QAT is ``ste``: straight through, the scale a constant in the backward
pass; its LOTION takes the empirical Fisher for the curvature, as ``lotion_fisher`` does."""

METHODS = ("ptq", "ste", "ste_scale", "lotion", "finish", "round_")
"""Those that run where none are named."""
