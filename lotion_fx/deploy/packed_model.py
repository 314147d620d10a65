"""`quantize`: a plain model whose weights lie packed in memory, and are unpacked where they are used.

What holds packed weights is an ordinary module with buffers of integers, since ``model.to(torch.bfloat16)`` rounds all
buffers of floats that it finds. A module keeps its class, under a subclass in which the weight is a property:

    Linear           the product decodes the weight (`cpu_linear`, `packed_linear`)
    Embedding        the rows that are looked up are decoded
    anything else    the weight is dequantized whenever it is read
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import ParametrizationList

from lotion_fx import private
from lotion_fx.deploy.weights import DTYPES, QuantizedWeight, quantized
from lotion_fx.holders import held_apart
from lotion_fx.kernels.cpu_linear import cpu_linear, cpu_values
from lotion_fx.kernels.packed import in_pairs
from lotion_fx.names import plain_name
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.state import names_of

_HELD = "_packed"  # what a weight's packed form is called, after the weight
_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def quantize(model: nn.Module) -> nn.Module:
    """A plain copy of a transformed model, in ``eval()``, with its rounded weights packed: what it computes is what
    ``model.eval()`` does.

    Bit for bit where weights are dequantized, else to the error of a float32 sum. Each weight has the dtype that it was
    trained in, until ``.to(dtype)`` or ``.half()`` asks for another one: then it is rounded once, from its exact value.
    Modules keep their classes. The copy has no hooks of ours, nothing in it requires a gradient, and it can be copied,
    pickled, compiled and exported; its ``state_dict`` loads into another packed copy of the model. The model itself
    stays as it is.

    Args:
        model: transformed.

    Raises:
        ValueError: the model is sharded, or as `quantized` does: it is not transformed, has no rounded weight, has not
            run yet so that blocks are not known.
        TypeError: it is no module.
    """
    refuse_packed(model)
    names = names_of(model)
    for name, each in model.named_parameters():
        if isinstance(each, DTensor):
            raise ValueError(
                f"model: {name!r} is sharded, and packed weights are not; load its full state_dict into an unsharded "
                "model that was transformed alike"
            )
    packed = quantized(model)
    memo = _Memo((id(hook), "removed") for m in model.modules() if (hook := private.before_of(m)) is not None)
    held: list[tuple[nn.Module, str, PackedWeight]] = []
    given: dict[str, _Given] = {}
    for weight, name in names.items():
        if name in packed:
            parameter = weight.parameter()
            assert parameter is not None  # `quantized` has read it
            made = PackedWeight(packed[name], parameter.stride())
            owners = [(module, key) for ref, key in weight.owners if (module := ref()) is not None]
            held += [(*owner, made) for owner in owners]
            nothing = torch.full((), math.nan, dtype=parameter.dtype).expand(parameter.shape)  # no memory yet
            memo[id(parameter)] = nn.Parameter(nothing, requires_grad=False)
            given[name] = _Given(parameter, memo[id(parameter)], made, [module for module, _ in owners])
    copied = without_hooks(model, memo)
    for module, attribute, made in held:
        if id(module) in memo:  # an owner may be outside of the model
            _hold(memo[id(module)], attribute, made)
    _fill_elsewhere(given, memo)
    _tell_of_shared(model, copied, given)
    return copied.eval().requires_grad_(False)


def without_hooks(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy that carries none of our hooks and calls nothing compiled, at its own weights.

    Args:
        memo: as `copy.deepcopy` takes it.
    """
    memo = {} if memo is None else memo
    computed = (x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor) and x.grad_fn)
    memo.update({id(x): x.detach().clone() for x in computed})  # by a hook, as of `weight_norm`, in each call anew
    with torch.no_grad():  # of which a ScriptModule would make part of its copy's parameters
        made: nn.Module = copy.deepcopy(model, memo)
    for module in made.modules():
        private.unhook(module)
        private.replace_call(module, None)  # recurrent modules keep theirs in a copy
    return made


class _Memo(dict[int, Any]):
    """`copy.deepcopy`'s, that counts how often each entry was asked for."""

    def __init__(self, entries: Iterable[tuple[int, Any]]) -> None:
        super().__init__(entries)
        self.asked: Counter[int] = Counter()

    def get(self, key: int, default: Any = None) -> Any:
        self.asked[key] += 1
        return super().get(key, default)


class _Given(NamedTuple):
    """What a copy has for a parameter: its place, until `_hold` takes that, the packed weight, and who owned it."""

    parameter: Tensor
    place: nn.Parameter
    packed: PackedWeight
    owners: list[nn.Module]


def _fill_elsewhere(given: Mapping[str, _Given], memo: _Memo) -> None:
    """What else of a copied model holds a weight, a list for one, has it dense."""
    for name, each in given.items():
        # Recurrent modules hold theirs in a list, too.
        own = sum(1 + isinstance(module, nn.RNNBase) for module in each.owners if id(module) in memo)
        if memo.asked[id(each.parameter)] > own:
            torch.utils.swap_tensors(each.place, nn.Parameter(each.packed(), requires_grad=False))
            warnings.warn(
                f"lotion_fx.quantize: something besides its module holds {name!r} too, and has it dense, at its "
                "rounded values; read it as its module's attribute to have it packed",
                stacklevel=3,
            )


def _tell_of_shared(model: nn.Module, copied: nn.Module, given: Mapping[str, _Given]) -> None:
    """Says which function that holds a weight, or what has one, a copied model has in common with the model."""
    parameters = {id(each.parameter) for each in given.values()}
    modules = {id(module) for module in model.modules()}
    for kind, originals in ((Tensor, parameters), (nn.Module, modules)):
        for where, found in held_apart(copied, kind):
            if id(found) in originals:
                warnings.warn(
                    f"lotion_fx.quantize: the function {where!r} of the model holds a weight or a module of it, and a "
                    "copy shares functions: there it computes with full-precision weights; make it a method",
                    stacklevel=3,
                )
                return


def refuse_packed(model: nn.Module) -> None:
    """Raises `ValueError` for a model that `quantize` or `load` has made."""
    if isinstance(model, nn.Module) and any(isinstance(module, PackedWeight) for module in model.modules()):
        raise ValueError(
            "model: its weights are packed already; give the transformed model, or the folder that it was loaded from"
        )


def hold(model: nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    """Packs weights of a plain model, in place; a parameter that has several names is packed once.

    Args:
        weights: by the names of the parameters whose places they take.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in private.parameters_of(module).items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, attribute))
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    for name, weight in weights.items():
        made = PackedWeight(weight, parameters[name].stride())
        for module, attribute in owners[id(parameters[name])]:
            _hold(module, attribute, made)
    model.requires_grad_(False)


class PackedWeight(nn.Module):
    """One weight's codes and scales, as buffers of integers; calling it gives the weight.

    Args:
        weight: packed.
        strides: that the weight is to have, by which some kernels choose their way.

    Attributes:
        codes, scales, tensor_scale: as in `QuantizedWeight`, floats seen as integers of their bits.
        format: the letters of the format's name, uint8: a `state_dict` says what it holds.
        is_known: whether the operators, which take a format's name, find this one by it.
        like: empty; its dtype is the weight's, which ``model.to(dtype)`` changes.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    format: Tensor
    like: Tensor

    def __init__(self, weight: QuantizedWeight, strides: Sequence[int]) -> None:
        super().__init__()
        self.fmt, self.axis, self.shape, self.strides = weight.format, weight.axis, weight.shape, tuple(strides)
        self.is_known, self.has_cpu_kernel = _found(self.fmt)
        device, name = weight.codes.device, list(weight.format.name.encode())
        scale = None if weight.tensor_scale is None else weight.tensor_scale.view(torch.int32)
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales.view(_INTEGERS.get(weight.scales.dtype, torch.uint8)))
        self.register_buffer("tensor_scale", scale)
        self.register_buffer("format", torch.tensor(name, dtype=torch.uint8, device=device))
        self.register_buffer("like", torch.empty(0, dtype=weight.dtype, device=device), persistent=False)
        self.register_load_state_dict_pre_hook(_check_format)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.is_known, self.has_cpu_kernel = _found(self.fmt)  # those of this process

    @property
    def quantized(self) -> QuantizedWeight:
        """The same, with its floats."""
        scale = None if self.tensor_scale is None else self.tensor_scale.view(torch.float32)
        scales = self.scales.view(self.fmt.law.stored)
        return QuantizedWeight(self.codes, scales, scale, self.fmt, self.axis, self.shape, self.like.dtype)

    def forward(self) -> Tensor:
        """The weight, bit for bit as the model's ``eval()`` has it."""
        w = self._values(self.quantized)
        if w.stride() == self.strides:
            return w
        return torch.empty_strided(self.shape, self.strides, dtype=w.dtype, device=w.device).copy_(w)

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of a weight [N, K] whose blocks run along K, [*ids, K]."""
        whole = self.quantized
        scales = whole.scales if self.fmt.block == "tensor" else F.embedding(ids, self.scales).view(self.fmt.law.stored)
        codes, shape = F.embedding(ids, self.codes), (*ids.shape, self.shape[1])
        return self._values(
            QuantizedWeight(codes, scales, whole.tensor_scale, self.fmt, ids.dim(), shape, self.like.dtype)
        )

    def _values(self, weight: QuantizedWeight) -> Tensor:
        if not self.has_cpu_kernel or weight.codes.device.type != "cpu" or weight.dtype not in DTYPES:
            return weight.dequantize()
        parts = (weight.codes, weight.scales, weight.tensor_scale)
        return cpu_values(*parts, self.fmt.name, weight.length, weight.dtype).movedim(-1, weight.axis)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b`` for a weight [N, K] whose blocks run along K."""
        held = private.buffers_of(self)  # attributes that are buffers cost a microsecond each, a small product ten
        codes, known, device = held["codes"], x.dtype in DTYPES, "cpu" if x.is_cpu else x.device.type
        assert codes is not None
        if known and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        elif x.dtype != held["like"].dtype:  # type: ignore[union-attr]  # a buffer is never None here
            return F.linear(x, self(), bias)  # where torch says what is wrong
        differentiates = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if device == "cpu" and known and self.has_cpu_kernel and not differentiates and codes.device == x.device:
            scales = held["scales"]
            assert scales is not None
            return cpu_linear(x, codes, scales, held["tensor_scale"], bias, self.fmt.name)
        if device == "cuda" and self.is_known and _has_kernel(self.fmt, x.dtype) and not differentiates:
            from lotion_fx.kernels.packed_linear import packed_linear  # Triton, which some systems lack

            return packed_linear(x, *self.quantized.packed, bias, self.fmt.name)
        return F.linear(x, self(), bias)

    def extra_repr(self) -> str:
        return f"{self.fmt.name}, {list(self.shape)}, {str(self.like.dtype).removeprefix('torch.')}"


def _found(fmt: Format) -> tuple[bool, bool]:
    """Whether a format has its name in this process (levels from a file need not); whether `cpu_linear` takes it."""
    try:
        is_known = resolve(fmt.name) == fmt
    except ValueError:
        is_known = False
    even = not isinstance(fmt.block, int) or fmt.block % 2 == 0
    return is_known, is_known and in_pairs(fmt) and even


@lru_cache(maxsize=256)
def _has_kernel(fmt: Format, dtype: torch.dtype) -> bool:
    """Whether `packed_linear` runs on a device."""
    if find_spec("triton") is None:
        return False
    from lotion_fx.kernels.packed_linear import constants

    try:
        return dtype in DTYPES and bool(constants(fmt, dtype))
    except NotImplementedError:
        return False


def _check_format(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Codes of one format mean nothing in another, and may have its sizes."""
    assert isinstance(module, PackedWeight)
    saved = state.get(f"{prefix}format")
    name = None if saved is None or saved.is_meta else bytes(saved.tolist()).decode(errors="replace")
    if name is not None and name != module.fmt.name:
        rest[-1].append(
            f"{prefix.removesuffix('.').removesuffix(_HELD)!r} was saved in {name}, and here is {module.fmt.name}; "
            "transform the model to that format before lotion_fx.quantize"
        )


# ---------------------------------------------------------------------------------------------- the modules around them


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, ParametrizationList)
"""What is in their place is one of their items."""


def _hold(module: nn.Module, attribute: str, packed: PackedWeight) -> None:
    """Puts a packed weight in a parameter's place."""
    if isinstance(module, _CONTAINERS):
        warnings.warn(
            f"lotion_fx.quantize: {attribute!r} of a {type(module).__name__} of its own stays dense, at its rounded "
            "values; put it into a module to have it packed",
            stacklevel=3,
        )
        private.parameters_of(module)[attribute] = nn.Parameter(packed(), requires_grad=False)
        return
    delattr(module, attribute)
    module.add_module(f"{attribute}{_HELD}", packed)
    kind: Any = type(module)
    base, attributes = getattr(kind, "unpacked", (kind, ()))
    module.__class__ = _class(base, (*attributes, attribute))


@cache
def _class(base: Any, attributes: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of a class of modules in which some weights are packed."""
    body: dict[str, Any] = {attribute: property(_reader(attribute)) for attribute in attributes}
    body["unpacked"] = (base, attributes)
    body["__reduce_ex__"] = _reduced
    body["__module__"] = __name__
    if attributes == ("weight",) and base.forward is nn.Linear.forward:
        body["forward"] = _linear
    elif attributes == ("weight",) and base.forward is nn.Embedding.forward:
        body["forward"] = _embedding
    elif issubclass(base, nn.RNNBase):
        body["forward"] = _recurrent(base)
    return type(f"Packed{base.__name__}", (base,), body)


def _reader(attribute: str) -> Callable[[nn.Module], Tensor]:
    def weight(self: nn.Module) -> Tensor:
        value: Tensor = getattr(self, f"{attribute}{_HELD}")()
        return value

    return weight


def _reduced(self: nn.Module, protocol: Any) -> Any:
    """A class that is made here is found again by what it was made of."""
    return _remade, type(self).unpacked, self.__getstate__()  # type: ignore[attr-defined]  # see `_class`


def _remade(base: Any, attributes: tuple[str, ...]) -> nn.Module:
    made = _class(base, attributes)
    return made.__new__(made)


def _linear(self: Any, input: Tensor) -> Tensor:
    packed: PackedWeight = self.weight_packed
    return packed.linear(input, self.bias) if packed.axis == 1 else F.linear(input, self.weight, self.bias)


def _embedding(self: Any, input: Tensor) -> Tensor:
    packed: PackedWeight = self.weight_packed
    if self.max_norm is None and packed.axis == 1:
        return packed.rows(input)
    return nn.Embedding.forward(self, input)


def _recurrent(base: type[nn.Module]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        private.refresh_flat_weights(self)
        return base.forward(self, *args, **kwargs)

    return forward
