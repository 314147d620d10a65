"""Every kernel on every shape: what is compiled, audited and gated for an architecture."""

from __future__ import annotations

import fnmatch

from lotion_fx.kernels.audit import product_works, weight_works
from lotion_fx.kernels.audit.work import Work

WORKS = (
    weight_works.adamw_works,
    product_works.curvature_works,
    weight_works.pack_works,
    product_works.packed_works,
    product_works.scaled_works,
    weight_works.smooth_works,
    product_works.variance_works,
)


def catalog(arch: int, pattern: str = "*") -> list[Work]:
    """Every kernel of `lotion_fx.kernels` on every shape.

    Args:
        arch: a key of `TARGETS`.
        pattern: of kernel names, ``"smooth/*"``.
    """
    return [work for works in WORKS for work in works(arch) if fnmatch.fnmatch(work.kernel, pattern)]
