"""`export`: a trained model as files that its client reads bit for bit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lotion_fx.deploy import manifest
from lotion_fx.deploy.content import Content
from lotion_fx.deploy.layout import Layout
from lotion_fx.deploy.layouts import layout_of
from lotion_fx.deploy.loading import content_of
from lotion_fx.deploy.writing import replaced
from lotion_fx.progress import with_a_bar
from lotion_fx.scalars import shown


@dataclass(frozen=True)
class Exported:
    """What was written. ``str()`` tells it in a few lines.

    Args:
        path: of the file or folder.
        layout: its name.
        packed: the names of the weights that are stored as codes, each with its format's name.
        dense: of those that are stored at their rounded values, the reasons.
        nbytes: of all files.
    """

    path: Path
    layout: str
    packed: Mapping[str, str]
    dense: Mapping[str, str]
    nbytes: int

    def __str__(self) -> str:
        counts = ", ".join(f"{count} in {fmt}" for fmt, count in Counter(self.packed.values()).items())
        lines = [
            f"{self.path}: layout {self.layout}, {self.nbytes / 2**20:.2f} MiB, {len(self.packed)} weights packed "
            f"({counts}), read back by its client and equal bit for bit"
        ]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.dense.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"dense, at the rounded values: {names[0]}{more}: {reason}")
        return "\n".join(lines)


def export(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    layout: str = "lotion",
    *,
    tokenizer: Any = None,
    **options: Any,
) -> Exported:
    """Writes a trained model for a client, at exactly the weights that `eval()` computes with.

    Codes and scales are those of `quantized(model)`, laid out as the client wants them. What was written is read back
    by the client's own library and compared before it takes its place; an export that is interrupted leaves what was
    there.

    Args:
        model: transformed. A Hugging Face model brings its configuration and generation settings. Or the folder of an
            export of layout "lotion" of such a model, which is laid out anew.
        path: a folder, or for "gguf", "onnx" and "aoti" a file. A former export there is replaced, and any file of that
            name; a folder with anything else in it is not.
        layout: "lotion" for any model and format; the others are for the clients of their names, see docs/deploy.md.
        tokenizer: saved beside a Hugging Face model.
        options: of the layout.

    Raises:
        ValueError: the layout has no place for a format, or for this model; what the client reads back is not what was
            trained; or ``path`` holds something that is no export.
        TypeError: ``path`` is no path; or an option is none of the layout's.
        ModuleNotFoundError: a library that the layout stands on is missing.
    """
    chosen = layout_of(layout)
    chosen.check_options(options)
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise TypeError(f"path={shown(path)}: expected the name of a {'file' if chosen.suffix else 'folder'}")
    if chosen.suffix and Path(path).suffix != chosen.suffix:
        raise ValueError(f"path={str(path)!r}: expected a file that ends in {chosen.suffix}, for layout={layout!r}")
    if isinstance(model, (str, os.PathLike)):
        content = content_of(Path(model).expanduser(), tokenizer=tokenizer)
    else:
        content = Content.of(model, tokenizer)
    for name, weight in content.weights.items():
        if reason := chosen.refusal(weight.format):
            raise ValueError(f"layout={layout!r} has no place for {name!r} in {weight.format.name}: {reason}")
    with replaced(path, is_folder=not chosen.suffix) as place, torch.no_grad():
        dense = chosen.write(content, place, **options)
        packed = {name: w.format.name for name, w in content.weights.items() if name not in dense}
        if not packed:
            name, reason = next(iter(dense.items()))
            raise ValueError(f"layout={layout!r} has no place for any weight of this model: {name}: {reason}")
        _compare(chosen, place, content, set(packed))
        if not chosen.suffix:
            manifest.write(place, layout, content, dense)
        nbytes = sum(f.stat().st_size for f in ([place] if chosen.suffix else place.rglob("*")) if f.is_file())
    return Exported(Path(path).expanduser().resolve(), layout, packed, dense, nbytes)


def _compare(layout: Layout, place: Path, content: Content, packed: set[str]) -> None:
    """Raises `ValueError` where a client reads other weights than were trained."""
    seen = set()
    for name, read in with_a_bar("reading back", layout.read(place, content), len(packed)):
        seen.add(name)
        if name in packed and not same(read, content.weights[name].dequantize()):
            wanted = content.weights[name].dequantize()
            wrong = (
                f"{tuple(read.shape)}" if read.shape != wanted.shape else f"{_share(read, wanted):.1%} of its values"
            )
            raise ValueError(
                f"layout={layout.name!r}: its client reads another {name!r} than was trained ({wrong}); nothing was "
                "written. Please report this with the format and the versions of the libraries"
            )
    if missing := sorted(packed - seen):
        raise ValueError(f"layout={layout.name!r}: its client does not find {missing[0]!r}; nothing was written")


def same(read: Tensor, wanted: Tensor) -> bool:
    """Whether two weights are equal bit for bit, in the wider of their dtypes; 0 and -0 count as one."""
    wide = torch.promote_types(read.dtype, wanted.dtype)
    return read.shape == wanted.shape and torch.equal(read.to(wide).cpu(), wanted.to(wide).cpu())


def _share(read: Tensor, wanted: Tensor) -> float:
    wide = torch.promote_types(read.dtype, wanted.dtype)
    return float((read.to(wide).cpu() != wanted.to(wide).cpu()).float().mean())
