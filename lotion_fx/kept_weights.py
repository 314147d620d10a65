"""Weights that `round_` has finished, kept in a folder so that an interrupted call goes on from there."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lotion_fx.numerics.adaptive import Rounded
from lotion_fx.private import tree_leaves
from lotion_fx.scalars import shown
from lotion_fx.state import Weight


class KeptWeights:
    """One file a weight and kind of scales, which holds it as long as weight, format, method and batches are the same.

    Args:
        folder: made where there is none; None keeps nothing.
        method: of rounding.
        batches: of which curvatures are made.
    """

    def __init__(self, folder: str | Path | None, method: str, batches: Sequence[Any]) -> None:
        if folder is not None and not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"folder={shown(folder)}: expected the path of a folder, or None to keep nothing")
        self.folder = None if folder is None else Path(folder)
        self._common = hashlib.sha256(method.encode())
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leaf in tree_leaves(batches):
                self._common.update(_bytes(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())

    def load(self, name: str, scales: str, weight: Weight, latent: Tensor) -> Rounded | None:
        """What was kept of a weight; None where there is nothing, or something else.

        Raises:
            ValueError: a file is damaged.
        """
        if self.folder is None or not (path := self._path(self.folder, name, scales)).exists():
            return None
        try:
            found = torch.load(path, map_location=latent.device, weights_only=True)
            if found["key"] != self._key(weight, latent):
                return None
            return Rounded(found["values"], found["method"], found["cost"], found["nearest"])
        except Exception as error:
            raise ValueError(f"folder: {path} cannot be read ({error}); delete it to round {name!r} anew") from error

    def save(self, name: str, scales: str, weight: Weight, latent: Tensor, rounded: Rounded) -> None:
        if self.folder is None:
            return
        path = self._path(self.folder, name, scales)
        beside = path.with_suffix(f".{os.getpid()}")
        values, method, cost, nearest = rounded
        key = self._key(weight, latent)
        torch.save({"key": key, "values": values, "method": method, "cost": cost, "nearest": nearest}, beside)
        beside.replace(path)

    def clear(self, names: Sequence[str]) -> None:
        """Deletes what was kept, and the folder if nothing else is in it."""
        if self.folder is None:
            return
        for name in names:
            for path in self.folder.glob(self._path(self.folder, name, "*").name):
                path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, folder: Path, name: str, scales: str) -> Path:
        # Names differ in more than file systems tell apart.
        return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}-{scales}.pt"

    def _key(self, weight: Weight, latent: Tensor) -> str:
        key = self._common.copy()
        key.update(repr((weight.quantizer.constants, latent.dtype, tuple(latent.shape))).encode())
        key.update(_bytes(latent))
        return key.hexdigest()


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
