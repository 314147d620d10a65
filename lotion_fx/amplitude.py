"""How large the noise of the next measurement is, in units of that of randomized rounding."""

from __future__ import annotations

import math

LITTLE, MUCH = 2.0, 6.0
"""How many standard deviations of what hides it an increase is to show at least, and at most. That is the slope on one
batch: of noise k times as large the increase is k^2 times as large, and shows k times as much. Where rounding's own
noise shows it between these two, the noise is that; larger noise disturbs the step, and the optimizer's moments."""

WIDEST, LEAST, CHANGE = 0.5, 0.25, 4.0
"""But noise is no wider than so much of the weights, beyond which the increase is not of second order, unless rounding
is; no narrower than so much of rounding's; and no further than this factor from one measurement to the next."""


def next_amplitude(now: float, seen: float, widest: float) -> float:
    """A power of two.

    Args:
        now: the one of this measurement.
        seen: its increase, in standard deviations of what hides it.
        widest: the weights over its noise, root mean squares.
    """
    if not (seen > 0 and math.isfinite(widest)):
        return now
    shown = seen / now  # by rounding's own noise
    wanted = LITTLE / shown if shown < LITTLE else min(MUCH / shown, 1.0)
    wanted = min(max(wanted, now / CHANGE, LEAST), now * CHANGE, max(now * WIDEST * widest, 1.0))
    return float(2.0 ** round(math.log2(wanted)))
