"""How a tensor seen anywhere is recognized as a weight: by the module that holds it now."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from lotion_fx.state import Smoothing, Weight


class Registry:
    """Every weight under smoothing, by owner, with a cache by tensor identity.

    A cached id says which weight to ask, never that the tensor is that weight: ids are used again.
    """

    def __init__(self) -> None:
        self.owned: weakref.WeakKeyDictionary[nn.Module, dict[str, Weight]] = weakref.WeakKeyDictionary()
        self._seen: dict[int, weakref.ref[Weight]] = {}
        self.changes = 0  # how often a module was given a parameter or a module, anywhere

    def add(self, weight: Weight) -> None:
        for ref, attribute in weight.owners:
            if (module := ref()) is not None:
                self.owned.setdefault(module, {})[attribute] = weight

    def drop(self, weight: Weight) -> None:
        """Whatever a weight's owners hold, it is this weight no more."""
        self._seen.clear()
        for ref, attribute in weight.owners:
            if (module := ref()) is not None and self.owned.get(module, {}).get(attribute) is weight:
                del self.owned[module][attribute]

    def of(self, smoothing: Smoothing) -> set[Weight]:
        """The weights of one model, those included whose module is no part of it now."""
        known = (weight for attributes in self.owned.values() for weight in attributes.values())
        return {weight for weight in known if weight.smoothing is smoothing}

    def __getitem__(self, tensor: Any) -> Weight | None:
        """The weight that this tensor is right now, None if it is none."""
        return self._cached(tensor) or self.find([tensor])[0]

    def find(self, tensors: Iterable[Any]) -> list[Weight | None]:
        """The weight that each of these is right now, None where it is none; all owners are asked once at most."""
        tensors = list(tensors)
        found = [self._cached(tensor) for tensor in tensors]
        if not all(weight is not None or not isinstance(t, Tensor) for t, weight in zip(tensors, found, strict=True)):
            held = self._ask_owners()
            found = [weight or held.get(id(tensor)) for tensor, weight in zip(tensors, found, strict=True)]
        return found

    def _cached(self, tensor: Any) -> Weight | None:
        reference = self._seen.get(id(tensor))
        weight = reference() if reference is not None else None
        return weight if weight is not None and weight.is_now(tensor) else None

    def _ask_owners(self) -> dict[int, Weight]:
        """Every weight by the ids that it has now, which are cached."""
        weights = dict.fromkeys(weight for attributes in self.owned.values() for weight in attributes.values())
        now = {id(tensor): weight for weight in weights for tensor in weight.tensors()}
        if len(self._seen.keys() | now) > 2 * len(weights):  # FSDP2's weights have two ids; more are of the past
            self._seen.clear()
        self._seen.update((key, weakref.ref(weight)) for key, weight in now.items())
        return now
