"""One weight in one layer: its forward with taps, and its curvature as a sum written out in float64.

A case marks its layer's outputs and inputs with ``tap``. In the graph a tap is the identity; in the oracle it records
the value, autograd gives each output's gradient g, and the case says which sum of g^2 x^2 the weight's curvature is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lotion_fx.passes.attach.probe import Code, Layout
from tests.passes.curvature.running import Factors, close, flat, latent, loss_of, marginals, product, randn, run, said


@dataclass
class Case:
    """One weight in one layer.

    ``forward(w, tap, *data)`` gives the layer's output; ``expected(g, v)`` h, and natural factors where there are any,
    from the gradients and the values that were tapped.
    """

    shape: tuple[int, ...]
    groups: int
    rows: int
    forward: Callable[..., Tensor]
    expected: Callable[..., Any]
    data: tuple[Any, ...] = ()
    op: str | None = None
    tolerance: float = 1e-5


def linear(forward: Callable[..., Tensor], *data: Tensor, shape: tuple[int, ...] = (5, 7), **options: Any) -> Case:
    """Weight [O, I]; taps x [..., I] and y [..., O]."""
    return Case(shape, 1, shape[0], forward, lambda g, v: product(flat(g["y"]), flat(v["x"])), data, **options)


def oracle(case: Case, weight: Tensor) -> tuple[Tensor, Factors | None]:
    """The case in float64: gradients of the taps by autograd, then the sum written out."""
    values: dict[str, Tensor] = {}

    def tap(name: str, value: Tensor) -> Tensor:
        return values.setdefault(name, value)  # a recomputation taps again

    def double(value: Any) -> Any:
        return value.double() if value.is_floating_point() else value

    leaf = weight.double().requires_grad_()
    loss = loss_of(case.forward(leaf, tap, *map(double, case.data)))
    on_the_way = {name: value for name, value in values.items() if value.requires_grad}
    gradients = torch.autograd.grad(loss, list(on_the_way.values()))
    g = dict(zip(on_the_way, gradients, strict=True))
    expected = case.expected(g, {name: value.detach() for name, value in values.items()})
    return expected if isinstance(expected, tuple) else (expected, None)


@dataclass
class Both:
    """One probe for the two kinds, so that one trace serves both."""

    full: Layout
    factored: Layout

    @property
    def size(self) -> int:
        return self.full.size + self.factored.size

    @staticmethod
    def attach(weight: Tensor, probe: Tensor, both: Any) -> Tensor:
        first, second = probe[: both.full.size], probe[both.full.size :]
        return latent(latent(weight, first, both.full), second, both.factored)


def assert_equals_the_sum(case: Case, table: str) -> None:
    """Runs a case with both kinds of layout: each is what the sum written out gives, and known as analytic."""
    weight = randn(*case.shape) / 2
    full, factored = (Layout(kind, case.shape, case.groups, case.rows) for kind in ("full", "factored"))

    def function(w: Tensor, *data: Any) -> Tensor:
        return loss_of(case.forward(w, lambda _, value: value, *data))

    made = run(function, [weight], [Both(full, factored)], case.data, table, attach=Both.attach)
    for resolution in made.resolutions:
        assert resolution.code == Code.ANALYTIC and not resolution.reason, resolution
        if case.op and table == "none":
            assert resolution.op == case.op
    h, natural = oracle(case, weight)
    probes = made.probes[0].split((full.size, factored.size))
    close(probes[0][: full.payload], h, case.tolerance)
    for part, expected in zip(factored.split(probes[1]), natural or marginals(h, factored), strict=True):
        close(part, expected, case.tolerance)
    assert all(said(probe)[:2] == [1, Code.ANALYTIC] for probe in probes)
