"""Weights that `round_` has finished, kept in a folder so that an interrupted call goes on from there."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from lotion_fx.loss_graph import LossGraph
from lotion_fx.numerics.adaptive import Rounded
from lotion_fx.scalars import shown
from lotion_fx.state import Weight


class KeptWeights:
    """One file a weight and kind of scales, which holds it as long as its format, the method and all that its curvature
    is made of are the same: the model's values, the loss and the batches.

    Args:
        folder: made where there is none; None keeps nothing.
        method: of rounding.
        graphs: of the loss, a batch each.
    """

    def __init__(self, folder: str | Path | None, method: str, graphs: Sequence[LossGraph]) -> None:
        if folder is not None and not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"folder={shown(folder)}: expected the path of a folder, or None to keep nothing")
        self.folder = None if folder is None else Path(folder)
        self._common = hashlib.sha256(method.encode())
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = f"folder={str(folder)!r}: no folder can be made there ({error.strerror}); name a writable place"
                raise OSError(error.errno, why) from error
            for parameter in graphs[0].parameters.values():
                self._common.update(_bytes(parameter))
            known: dict[fx.GraphModule, int] = {}
            for graph in graphs:
                if graph.gm not in known:
                    known[graph.gm] = len(known)
                    self._common.update(graph.gm.code.encode())
                    for value in graph.constants:
                        self._common.update(_bytes(value) if isinstance(value, Tensor) else _text(value).encode())
                self._common.update(str(known[graph.gm]).encode())
                for value in graph.data:
                    self._common.update(_bytes(value))

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
        return key.hexdigest()


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _text(x: object) -> str:
    return x.code if isinstance(x, fx.GraphModule) else repr(x)
