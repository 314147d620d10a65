"""What a layout of exported models is."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from lotion_fx.deploy.content import Content
from lotion_fx.numerics.formats import Format


class Layout(ABC):
    """One way to write a model, for one kind of client.

    Codes and scales are laid out anew, never computed anew. A weight whose module has no place in the layout is written
    dense, at its rounded values, and said so; a format that has none is refused, with the option that would have one.

    Attributes:
        name: what `export` calls it.
        suffix: of the file that it writes; empty where it writes a folder.
        packages: the libraries that it stands on, as they are imported.
    """

    name: ClassVar[str]
    suffix: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def refusal(self, fmt: Format) -> str:
        """Why weights of a format cannot be written, and the format that could have been trained; empty if they can."""

    @abstractmethod
    def write(self, content: Content, place: Path) -> dict[str, str]:
        """Writes a model. A layout may have further arguments, by keyword: they are options of `export`.

        Args:
            place: an empty folder, or the file to make.

        Returns:
            Of each weight that is written dense, the reason.

        Raises:
            ValueError: the model, or a weight, cannot be written.
        """

    @abstractmethod
    def read(self, place: Path, content: Content) -> Iterator[tuple[str, Tensor]]:
        """The weights that were written packed, by name, as the client's own library decompresses them.

        Each in the model's shape, and in a dtype in which it can be compared with what was trained, bit for bit.
        """

    def outputs(self, place: Path, model: nn.Module, inputs: Any) -> Tensor:
        """What the client computes on inputs: its logits, or the first tensor that it returns.

        Args:
            place: an export.
            model: that was exported; for a client which needs a module of its kind, that it does not alter.
            inputs: a dictionary of keyword arguments, a tuple of arguments, or one argument.

        Raises:
            NotImplementedError: the client runs no model.
        """
        raise NotImplementedError(f"layout={self.name!r}: no client at hand runs it; compare its weights alone")

    def check_packages(self) -> None:
        """
        Raises:
            ModuleNotFoundError: a library is missing.
        """
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(
                f"layout={self.name!r} stands on {', '.join(self.packages)}, of which {', '.join(missing)} is missing; "
                "pip install 'lotion_fx[export]'",
                name=missing[0],
            )

    def check_options(self, options: Mapping[str, Any]) -> None:
        """
        Raises:
            TypeError: an option is not one of `write`'s.
        """
        known = [name for name, p in inspect.signature(self.write).parameters.items() if p.kind is p.KEYWORD_ONLY]
        for name in options:
            if name not in known:
                has = f"its options are {', '.join(known)}" if known else "it has no options"
                raise TypeError(f"{name}={options[name]!r}: no option of layout={self.name!r}; {has}")
