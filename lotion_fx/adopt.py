"""The backend behind ``torch.compile(model, backend="lotion_fx")``: it finds a model's weights as graphs use them."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import fx, nn

from lotion_fx import optimizer_hooks, private, riding
from lotion_fx.arguments import check_compile_options, checked, scheduled
from lotion_fx.choosing import known_format
from lotion_fx.numerics.formats import resolve
from lotion_fx.numerics.noise import RANDOMIZED, resolve_noise
from lotion_fx.settings import Settings
from lotion_fx.state import Smoothing, Weight, registry
from lotion_fx.variants import Backend

_OURS = ("fmt", "method", "strength", "curvature", "inner", "decay", "noise")
_adopting: weakref.WeakKeyDictionary[nn.Module, dict[Any, Smoothing]] = weakref.WeakKeyDictionary()


def dynamo_backend(gm: Any, example_inputs: Any, *, mode: str | None = None, options: Any = None) -> Any:
    """Compiles one graph.

    The parameters that a graph uses come under smoothing as the graph is compiled. ``options`` may hold `transform`'s
    own ``fmt``, ``method``, ``strength``, ``curvature``, ``inner``, ``decay`` and ``noise``; the rest are Inductor's.
    """
    options = dict(options or {})
    ours = {name: options.pop(name) for name in _OURS if name in options}
    key = (mode, tuple(sorted(ours.items())))
    fmt = resolve(ours.pop("fmt", "nvfp4"))
    if ours.get("curvature") == "ggn":
        raise ValueError("curvature='ggn' needs the model's call, which no backend sees; use transform(model)")
    ours["noise"] = resolve_noise(ours.get("noise", RANDOMIZED))
    settings = checked(Settings(**ours, schedule=scheduled(ours.get("method", "lotion")), adopted=True))
    check_compile_options(mode, options, settings.inner)
    optimizer_hooks.install()

    def adopt(node: fx.Node, value: Any) -> None:
        found = _found(node, value)
        if found is None:
            return
        smoothing = _adopting.setdefault(found.root, {}).setdefault(key, Smoothing(settings))
        small = value.dim() < 2
        weight = Weight.owned_by(
            [(found.owner, found.attribute)],
            value,
            name=found.name,
            smoothing=smoothing,
            format=None if small else known_format(fmt),
            excluded="fewer than two dimensions" if small else "",
            forced=False,
        )
        smoothing.weights.append(weight)
        registry.add(weight)
        riding.take_in_waiting()

    return Backend(settings.inner, mode, tuple(sorted(options.items())), adopt)(gm, example_inputs)


class _Found(NamedTuple):
    """A parameter as Dynamo sees it: the module that is compiled, its name in there, and who owns it."""

    root: nn.Module
    name: str
    owner: nn.Module
    attribute: str


def _found(node: fx.Node, value: Any) -> _Found | None:
    """Where a placeholder's tensor comes from; None for all but parameters that nothing registered yet."""
    source, scope = private.source_of(node), private.frame_names()
    if not isinstance(value, nn.Parameter) or source is None or scope is None:
        return None
    known = registry[value]
    if known is not None and not known.smoothing.settings.adopted:
        return None
    owner, _, attribute = source.name.rpartition("._parameters[")
    if not owner:
        return None
    # Another model of the same class must not run this one's code unseen: it would never come here.
    private.guard_identity(source)
    if known is not None:
        return None
    path, attribute = owner.replace("._modules['", ".").replace("']", ""), attribute.strip("'\"]")
    prefix, names = path.partition(".")[2], {"L": scope[0], "G": scope[1]}
    root, module = eval(owner.partition("._modules")[0], names), eval(owner, names)
    return _Found(root, f"{prefix}.{attribute}" if prefix else attribute, module, attribute)
