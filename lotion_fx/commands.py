"""`lotion-fx report`, `expected-loss`, `bench` and `doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer

from lotion_fx import doctor as looked
from lotion_fx import step_ratio
from lotion_fx.coverage import report as reported
from lotion_fx.deploy.commands import Json, errors_in_a_line
from lotion_fx.expected import ExpectedLoss
from lotion_fx.expected import expected_loss as expected
from lotion_fx.schedule import METHODS as ALL
from lotion_fx.subject import subject, transformed

Source = Annotated[
    str,
    typer.Argument(
        help="package.module:callable or file.py:callable, of what returns a model, (model, batch) or (model, batch, "
        "loss_fn); or the folder of a Hugging Face checkpoint."
    ),
]
Format = Annotated[str | None, typer.Option(help="Format to transform the model to: nvfp4, int4/bf16, ...")]
Only = Annotated[str | None, typer.Option(help="Which weights: lm, linear or all.")]

METHODS = [method for method, shares in ALL.items() if len(shares) == 1]  # others have no one step
INNER = ("inductor", "aot_eager", "eager")


def report(source: Source, fmt: Format = None, only: Only = None, as_json: Json = False) -> None:
    """What would happen to every parameter of a model, and why.

    lotion-fx report my_code.models:small --fmt nvfp4

    lotion-fx report checkpoint/ --fmt int4/bf16 --only lm --json

    With a batch, one step is made with a learning rate of 0: uses, estimators and the term are known from then on.
    """
    with errors_in_a_line(source):
        found = transformed(source, fmt, only)
        if found.batch is not None:
            loss = found.loss()
            if not loss.isfinite():
                raise ValueError(f"source={source!r}: the loss of its batch is {loss.item()}; expected a finite one")
            if loss.requires_grad:
                loss.backward()
                torch.optim.SGD(found.model.parameters(), lr=0.0).step()
        told = reported(found.model)
    print(json.dumps(told.to_dict()) if as_json else told)


def expected_loss(
    source: Source,
    fmt: Format = None,
    only: Only = None,
    samples: Annotated[int, typer.Option(min=0, help="Roundings to sample beside the prediction.")] = 0,
    as_json: Json = False,
) -> None:
    """The loss that a model is expected to have after randomized rounding, each weight's part with a certificate.

    lotion-fx expected-loss my_code.models:small --fmt nvfp4 --samples 8

    lotion-fx expected-loss checkpoint/ --fmt int4 --json
    """
    with errors_in_a_line(source):
        found = transformed(source, fmt, only)
        found.needs_batch()
        told = expected(found.model, found.batch, found.loss_fn, samples)
    print(json.dumps(_numbers(told)) if as_json else told)


def bench(
    source: Source,
    fmt: Annotated[str, typer.Option(help="Format to transform the model to.")] = "nvfp4",
    methods: Annotated[str, typer.Option(help=f"Some of {','.join(METHODS)}.")] = "lotion",
    rounds: Annotated[int, typer.Option(min=2, help="Interleaved rounds.")] = 20,
    inner: Annotated[str, typer.Option(help=f"One of {', '.join(INNER)}; of the plain model too.")] = "inductor",
    as_json: Json = False,
) -> None:
    """What a training step costs beside the plain compiled step, in interleaved rounds; "plain again" is the noise.

    lotion-fx bench my_code.models:small --fmt nvfp4

    lotion-fx bench my_code.models:small --methods lotion,ste --rounds 40 --json
    """
    with errors_in_a_line(source):
        chosen = methods.split(",")
        if unknown := [name for name in chosen if name not in METHODS]:
            raise ValueError(f"--methods: {unknown[0]!r} is none; expected some of {', '.join(METHODS)}")
        if inner not in INNER:
            raise ValueError(f"--inner: {inner!r} is none; expected one of {', '.join(INNER)}")
        times = step_ratio.step_times(lambda: subject(source), fmt, chosen, rounds, inner)
    print(json.dumps([asdict(time) for time in times]) if as_json else step_ratio.table(times))


def doctor(as_json: Json = False) -> None:
    """What this machine can run, what is missing, and how to get it; ends with 1 where training does not run.

    lotion-fx doctor

    lotion-fx doctor --json
    """
    told = looked.examine()
    checks = [asdict(check) for check in told.checks]
    print(json.dumps({"is_fit": told.is_fit, "checks": checks}) if as_json else told)
    if not told.is_fit:
        raise typer.Exit(1)


def _numbers(told: ExpectedLoss) -> dict[str, Any]:
    return {
        "loss": float(told.loss.detach()),
        "expected": float(told.total.detach()),
        "samples": told.samples,
        "sampled": told.sampled,
        "error": told.error,
        "rtn": told.rtn,
        "parameters": [
            {
                "name": name,
                "increase": float(term.detach()),
                "measured_alone": told.alone[name][1] if name in told.alone else None,
                "error_alone": told.alone[name][2] if name in told.alone else None,
                "certificate": str(told.certificates[name]),
            }
            for name, term in told.terms.items()
        ],
    }
