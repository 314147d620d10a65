"""`lotion-fx export` and `lotion-fx verify`."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from lotion_fx.deploy import exporting, verifying
from lotion_fx.deploy.layouts import LAYOUTS, layout_of, lotion
from lotion_fx.deploy.loading import content_of
from lotion_fx.deploy.writing import MARK
from lotion_fx.subject import tokens_for, transformed, why_it_fails

Source = Annotated[
    Path,
    typer.Argument(
        help="An export of layout lotion; or with --fmt a Hugging Face checkpoint; or package.module:callable or "
        "file.py:callable, of what returns a model, transformed or with --fmt plain."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def export(
    source: Source,
    path: Annotated[Path, typer.Argument(help="The folder or file to write.")],
    layout: Annotated[str, typer.Option(help=", ".join(LAYOUTS))] = "lotion",
    fmt: Annotated[
        str | None, typer.Option(help="Of a checkpoint's weights, rounded to nearest: nvfp4, int4/bf16, ...")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Which weights of a checkpoint: lm, linear or all.")] = None,
    as_json: Json = False,
) -> None:
    """Write a trained model for a client, and read it back with the client's own library.

    lotion-fx export trained/ model.gguf --layout gguf

    lotion-fx export checkpoint/ packed/ --layout compressed-tensors --fmt nvfp4/pow2

    lotion-fx export my_code.models:trained out/ --json
    """
    with errors_in_a_line(str(source)):
        model, inputs = _model(source, fmt, only)
        options = {}
        if "example_inputs" in inspect.signature(layout_of(layout).write).parameters:
            options["example_inputs"] = _example_inputs(model, inputs, layout)
        told = exporting.export(model, path, layout, tokenizer=_tokenizer(source), **options)
    if as_json:
        print(json.dumps({**asdict(told), "path": str(told.path)}))
    else:
        print(told)


def verify(
    path: Annotated[Path, typer.Argument(help="What was exported.")],
    source: Annotated[Path | None, typer.Option(help="What it was exported from: an export of layout lotion.")] = None,
    as_json: Json = False,
) -> None:
    """Load an export with its real client, and compare weights and logits with the model that was trained.

    lotion-fx verify model.gguf --source trained/

    Without --source, the checksums of an export of layout lotion are all that can be looked at.
    """
    with errors_in_a_line():
        if source is None and path.exists() and not (path / MARK).is_file():
            raise ValueError(
                f"path={str(path)!r}: only layout lotion has checksums; name one of the same model by --source"
            )
        if source is None:
            count = len(lotion.read(path)[0])
            told = f"{path}: {count} weights, every checksum holds; --source compares it with what it was made from"
            print(json.dumps({"weights": count, "checksums_hold": True}) if as_json else told)
            return
        if not source.is_dir():
            raise ValueError(f"--source={str(source)!r}: expected the folder of an export of layout lotion")
        if not (source / MARK).is_file():
            raise ValueError(
                f"--source={str(source)!r}: no export of layout lotion is there; make one of what was exported"
            )
        found = verifying.verify(path, source, tokens_for(content_of(source).model))
    if as_json:
        print(json.dumps({**asdict(found), "is_exact": found.is_exact}))
    else:
        print(found)
    if not found.is_exact:
        raise typer.Exit(1)


@contextlib.contextmanager
def errors_in_a_line(source: str | None = None) -> Iterator[None]:
    """What is wrong with what was asked for, without a traceback; and with a source whose own model fails.

    Args:
        source: as `subject` takes it; None for what is none.
    """
    try:
        yield
    except (ValueError, TypeError, ModuleNotFoundError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    except Exception as error:
        why = why_it_fails(source) if source is not None else ""
        if not why:
            raise
        raise typer.BadParameter(why) from error


def _model(source: Path, fmt: str | None, only: str | None) -> tuple[nn.Module | Path, Any]:
    """A transformed model, or the folder of an export, and inputs of the source's own; None of none."""
    if (source / MARK).is_file():
        if fmt is not None or only is not None:
            raise ValueError(f"--fmt, --only: {source} is an export, whose weights have their formats; leave them out")
        return source, None
    found = transformed(str(source), fmt, only, inner="eager")
    found.model.eval()
    if found.batch is not None:
        with torch.no_grad():
            found.run()  # which tells the dimensions that no module does
    return found.model, None if found.batch is None else found.inputs


def _example_inputs(model: nn.Module | Path, inputs: Any, layout: str) -> Any:
    """What a layout that traces runs: tokens of a language model, else the source's own inputs."""
    tokens = tokens_for(content_of(model).model if isinstance(model, Path) else model)
    if tokens is not None:
        return tokens
    if inputs is None:
        raise ValueError(f"source: --layout {layout} traces the model; let SOURCE return (model, batch), not it alone")
    return inputs if isinstance(inputs, (Mapping, tuple, list)) else (inputs,)


def _tokenizer(source: Path) -> Any:
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    import transformers

    return transformers.AutoTokenizer.from_pretrained(source)
