"""One model of the zoo: what `lotion_fx` makes of it beside what plain `torch.compile` does, check by check.

The oracle of each check is the model itself, a second instance with the same weights, never transformed: as it is for
gradients, with its selected weights rounded by hand for everything in ``eval()``. Equal means bit for bit, unless
Inductor compiles (whose fusions differ from graph to graph): then to a relative 1e-4.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from zoo_entry import Entry, loss_of, tensors_in
from zoo_products import meets_products

import lotion_fx

CHECKS = ("train", "eval", "eager", "compiled", "exported", "silent")
"""See `Trial`, whose methods they are."""
SHARES = ("exact", "analytic", "fisher", "frozen", "out")
_EXACT = ("exact", "second order")
_TABLES = ("embedding", "a lookup table or norm")


@dataclass
class Result:
    """One row of the table.

    Args:
        kind, name: of the entry.
        parameters: elements of all parameters.
        elements: of the product weights of two or more dimensions, by what they get (`SHARES`).
        out: why weights of two or more dimensions are left in full precision, with their elements.
        fisher: why weights take the Fisher form, with their elements.
        breaks: graph breaks of the first training forward, beyond plain `torch.compile`'s.
        seconds, plain_seconds: from the made model to after its first backward.
        checks: of each check that was asked for, what is wrong; empty where nothing is.
        skipped: of checks that say nothing of this model, why.
        failed: what stopped the trial itself.
    """

    kind: str
    name: str
    parameters: int = 0
    elements: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SHARES, 0))
    out: dict[str, int] = field(default_factory=dict)
    fisher: dict[str, int] = field(default_factory=dict)
    breaks: int = 0
    seconds: float = math.nan
    plain_seconds: float = math.nan
    checks: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: str = ""

    @property
    def passed(self) -> bool:
        return not self.failed and not any(self.checks.values())

    @property
    def cause(self) -> str:
        """Why it did not pass, in one line."""
        wrong = [f"{name}: {cause}" for name, cause in self.checks.items() if cause]
        return "; ".join([self.failed] * bool(self.failed) + wrong)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "cause": self.cause}


def try_out(entry: Entry, inner: str = "aot_eager", checks: Iterable[str] = CHECKS) -> Result:
    """Runs an entry through the checks; whatever goes wrong is in the result."""
    trial = Trial(entry, inner)
    try:
        trial.begin()
        trial.learn()
    except Exception as error:
        trial.result.failed = f"{trial.stage}: {_line(error)}"
        return trial.result
    for check in checks:
        torch._dynamo.reset()
        try:
            trial.result.checks[check] = getattr(trial, check)()
        except Exception as error:
            trial.result.checks[check] = _line(error)
    return trial.result


class Trial:
    """One model's run; each check is a method that says what is wrong, or nothing."""

    def __init__(self, entry: Entry, inner: str) -> None:
        self.entry, self.inner = entry, inner
        self.result = Result(entry.kind, entry.name)
        self.args, self.kwargs = entry.batch()
        self.gradients: dict[str, Tensor | None] = {}
        self.plain_gradients: dict[str, Tensor | None] = {}
        self.loss = math.nan
        self.stage = ""
        self.warned: list[str] = []
        self.plain_warned: list[str] = []
        self._out: list[Tensor] | None = None
        self._hand_out: list[Tensor] | None = None

    # ------------------------------------------------------------------------------------------------- the two models

    def begin(self) -> None:
        """Plain PyTorch's first step, then ours."""
        plain = self.make()
        self.stage = "plain torch.compile"
        self.result.parameters = sum(p.numel() for p in plain.parameters())
        with _recorded(self.plain_warned):
            compiled = torch.compile(plain, backend=self.inner)
            _, self.result.plain_seconds, breaks = self._first_backward(compiled)
            self.plain_gradients = _gradients(plain)
        self.stage = "eager"
        self.met = meets_products(self.make(), self.args, self.kwargs)
        torch._dynamo.reset()
        self.stage = "transformed"
        model = self.make()
        with _recorded(self.warned):
            began = time.perf_counter()
            self.model = lotion_fx.transform(model, "nvfp4", inner=self.inner, calibrate=False)
            spent = time.perf_counter() - began
            self.loss, seconds, mine = self._first_backward(self.model)
            self.gradients = _gradients(self.model)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            torch.optim.AdamW(trained, lr=1e-3).step()
        self.result.seconds, self.result.breaks = spent + seconds, mine - breaks

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.entry.make().train()

    def _first_backward(self, model: Callable[..., Any]) -> tuple[float, float, int]:
        """Loss, seconds and graph breaks of a forward and backward pass."""
        counters.clear()
        began = time.perf_counter()
        torch.manual_seed(2)
        loss = loss_of(model(*self.args, **self.kwargs))
        loss.backward()
        return loss.item(), time.perf_counter() - began, sum(counters["graph_break"].values())

    def at_latent(self) -> nn.Module:
        """A plain instance at the model's weights."""
        plain = self.make().eval()
        plain.load_state_dict(self.model.state_dict())
        return plain

    def by_hand(self) -> nn.Module:
        """The same, the selected ones rounded by hand."""
        plain = self.at_latent()
        with torch.no_grad():
            for row in self.report.rows:
                if row.format:
                    weight = plain.get_parameter(row.name)
                    axis = -1 if row.block_axis is None else row.block_axis
                    weight.copy_(lotion_fx.rounding.rtn(weight, lotion_fx.resolve(row.format), axis))
        return plain

    def learn(self) -> None:
        """Reads the report, sorting weights by what they get."""
        self.report = lotion_fx.report(self.model)
        out, fisher = defaultdict(int, self.result.out), defaultdict(int, self.result.fisher)
        for row in self.report.rows:
            elements = math.prod(row.shape)
            if len(row.shape) < 2:
                continue
            if row.format is None:
                out[row.reason] += elements
            if row.estimator == "fisher":
                fisher[row.reason] += elements
            if row.format or self._is_left_out(row):
                self.result.elements[_share(row)] += elements
        self.result.out, self.result.fisher = dict(out), dict(fisher)

    def _is_left_out(self, row: Any) -> bool:
        """Whether a weight in full precision meets a product all the same; tables that are looked up may."""
        return row.name in self.met and not row.reason.startswith(_TABLES)

    # ----------------------------------------------------------------------------------------------------- the checks

    def train(self) -> str:
        """The loss is finite and every gradient is plain PyTorch's."""
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        for name, theirs in self._expected_gradients().items():
            mine = self.gradients.get(name)
            if (mine is None) != (theirs is None):
                return f"{name} has {'no' if mine is None else 'a'} gradient, unlike plain"
            if mine is not None and (wrong := self._differs([mine], [theirs])):
                return f"gradient of {name} {wrong}"
        return ""

    def _expected_gradients(self) -> dict[str, Tensor | None]:
        """Plain PyTorch's, at the rounded values of what is frozen."""
        frozen = [r for r in self.report.rows if r.format and not self.model.get_parameter(r.name).requires_grad]
        if not frozen:
            return self.plain_gradients
        plain = self.make()
        with torch.no_grad():
            for row in frozen:
                weight = plain.get_parameter(row.name)
                axis = -1 if row.block_axis is None else row.block_axis
                weight.copy_(lotion_fx.rounding.rtn(weight, lotion_fx.resolve(row.format), axis))
        self._first_backward(torch.compile(plain, backend=self.inner))
        return _gradients(plain)

    def eval(self) -> str:
        """Its output is that of the model rounded by hand and compiled the same way; and rounding shows."""
        if any(row.format for row in self.report.rows) and not self._differs(self._run(self.at_latent()), self.out):
            return "the output is that of the latent weights"
        return self._differs(self.out, self.hand_out)

    def eager(self) -> str:
        """Its output is that of the model rounded by hand, in eager; where compiling alone changes nothing."""
        eager = self._run(self.by_hand())
        if self._differs(self.hand_out, eager):
            self.result.skipped["eager"] = "plain torch.compile changes the plain model's output"
            return ""
        return self._differs(self.out, eager)

    def compiled(self) -> str:
        """`torch.compile` on top changes nothing."""
        compiled = torch.compile(self.model.eval(), backend=self.inner)
        return self._differs(self._run(compiled), self.hand_out)

    def exported(self) -> str:
        """`torch.export` gives the model rounded by hand, where it can export that."""
        try:
            theirs = self._run(self._export(self.by_hand()))
        except Exception:
            self.result.skipped["exported"] = "plain torch.export cannot export the plain model"
            return ""
        return self._differs(self._run(self._export(self.model.eval())), theirs)

    def silent(self) -> str:
        """Every parameter has a row with a format or a reason, and nothing warns that plain PyTorch does not.

        Let alone a warning that no graph contains some weights, where the report says so too.
        """
        rows = {row.name: row for row in self.report.rows}
        for name, parameter in self.model.named_parameters():
            if name not in rows:
                return f"{name} is not in the report"
            if not rows[name].format and not rows[name].reason:
                return f"{name} is left out without a reason"
            if rows[name].format and not rows[name].estimator and not rows[name].reason:
                return f"{name} has no estimator and no reason"
            used = self.gradients.get(name) is not None and bool(self.gradients[name].any())
            if parameter.dim() > 1 and rows[name].reason.endswith("unused") and used:
                return f"{name} is called unused and has a gradient"
        for text in self.warned:
            if text not in self.plain_warned and not self._is_told_too(text):
                return f"warns: {text}"
        return ""

    def _is_told_too(self, warning: str) -> bool:
        """Whether it says which weights no graph contains, and the report says the same of each."""
        named = warning.partition(", so the term")[0].removeprefix("no compiled graph contains ").split(", ")
        unseen = {row.name for row in self.report.rows if row.reason == "reached by no compiled graph"}
        return set(named) <= unseen

    # ------------------------------------------------------------------------------------------------------ comparing

    @property
    def out(self) -> list[Tensor]:
        """Our call's output in ``eval()``."""
        if self._out is None:
            with _recorded(self.warned):
                self._out = self._run(self.model.eval())
        return self._out

    @property
    def hand_out(self) -> list[Tensor]:
        """The output of the model rounded by hand, compiled plainly."""
        if self._hand_out is None:
            torch._dynamo.reset()
            with _recorded(self.plain_warned):
                self._hand_out = self._run(torch.compile(self.by_hand(), backend=self.inner))
        return self._hand_out

    def _run(self, model: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(3)
        with torch.no_grad():
            return list(tensors_in(model(*self.args, **self.kwargs)))

    def _export(self, model: nn.Module) -> Callable[..., Any]:
        """The exported program, frozen: matmul chooses a kernel by whether an operand needs a gradient.

        Export's constants, which rounded weights become, need none.
        """
        with torch.no_grad():
            return torch.export.export(model, self.args, self.kwargs).module().requires_grad_(False)

    def _differs(self, mine: list[Tensor], theirs: list[Tensor]) -> str:
        """How far tensors are from those that they should be; empty where they are equal."""
        if [x.shape for x in mine] != [x.shape for x in theirs]:
            return f"has shapes {[tuple(x.shape) for x in mine]}, expected {[tuple(x.shape) for x in theirs]}"
        exact = self.inner != "inductor"
        for x, y in zip(mine, theirs, strict=True):
            if exact and not ((x == y) | (x.isnan() & y.isnan())).all():
                far = float((x.double() - y.double()).abs().max() / y.double().abs().max().clamp_min(1e-30))
                return f"differs by {far:.0e} of its largest value"
            if not exact and not torch.allclose(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()), equal_nan=True):
                return f"differs by {float((x - y).abs().max()):.0e}"
        return ""


def _share(row: Any) -> str:
    if row.format is None:
        return "out"
    if row.estimator is None:
        return "frozen" if row.reason.startswith("frozen") else "fisher"
    return "exact" if row.estimator in _EXACT else row.estimator


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


@contextmanager
def _recorded(texts: list[str]) -> Iterator[None]:
    """Collects the warnings of a block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts += [" ".join(str(each.message).split()) for each in caught]


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:240]
