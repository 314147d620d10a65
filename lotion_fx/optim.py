"""AdamW whose one pass over a weight makes the expected-loss term too.

`torch.optim.AdamW` with the step's hook reads and writes every smoothed weight's gradient twice, and its second moment
and weight once more. On a GPU, under ``curvature="fisher"``, this optimizer takes the term over from the hook
(`term.TakesTerms`) and moves what AdamW alone would (`kernels.adamw_smooth`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import compress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lotion_fx import private
from lotion_fx.numerics.quantizer import Quantizer
from lotion_fx.passes.lower import lower
from lotion_fx.state import Weight
from lotion_fx.term import Term

__all__ = ["AdamW"]

# Of a weight, its gradient and its two moments: what `torch.optim.AdamW(fused=True)` takes, but for float64.
_DTYPES = {(dtype,) * 4 for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_DTYPES |= {(torch.float32,) * 2 + (torch.bfloat16,) * 2}


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, its arguments, state and results, with the term made in the pass that updates the weight.

    The pass takes weights on a GPU that are smoothed under ``curvature="fisher"`` in a format with blocks of a power of
    two, up to 128, that run along the last dimension and divide it. They are contiguous, not sharded, and float32,
    bfloat16 or float16, like their gradients and moments; moments may be bfloat16 where weights are float32. Everything
    else is updated by torch, with the term from the hook as under any other optimizer: other parameters, and groups
    with ``amsgrad``, ``differentiable``, ``foreach=True``, ``fused=False`` or tensors as ``betas``.

    What differs from torch's with the hook: ``.grad`` never receives the term, nor is it unscaled where a GradScaler
    leaves that to ``fused=True``. After the first step, as after later ones, `report` and `penalty` read the curvature
    from the second moment, to which the term's gradient belongs. And NVFP4's tensor-wide scale is known from the pass
    before: a weight changed in place through ``.data``, which counts no changes, has it corrected one step later.
    """

    devices: ClassVar[tuple[str, ...]] = ("cuda",)  # where the pass runs

    @cached_property
    def terms(self) -> dict[Tensor, Term]:
        """What the hook handed over for the step under way."""
        return {}

    @cached_property
    def _amax(self) -> dict[Tensor, tuple[Tensor, tuple[int, int]]]:
        """The absmax of weights after the last pass, and of which contents."""
        return {}

    @cached_property
    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        """The group of each parameter, see `_group_of`."""
        return {}

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        group = self._groups.get(parameter)
        if not any(known is group for known in self.param_groups):  # one was added, or a state was loaded
            self._groups.update({p: group for group in self.param_groups for p in group["params"]})
        return self._groups[parameter]

    def can_take(self, parameter: Tensor, weight: Weight) -> bool:
        """Whether the pass makes this weight's term in the step under way."""
        group = self._group_of(parameter)
        if group["amsgrad"] or group["differentiable"] or group["foreach"] or group["fused"] is False:
            return False
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            return False
        if type(parameter) not in (Tensor, nn.Parameter) or parameter.device.type not in self.devices:
            return False
        if parameter.device.type != "cpu" and lower.arch_of(parameter.device) is None:
            return False
        assert parameter.grad is not None
        state = self.state.get(parameter, {})
        moments = [state.get(name, parameter) for name in ("exp_avg", "exp_avg_sq")]
        tensors = [parameter, parameter.grad, *moments]
        if not all(t.layout == torch.strided and t.is_contiguous() for t in tensors):
            return False
        return tuple(t.dtype for t in tensors) in _DTYPES and _fits(parameter, weight.quantizer)

    # The one private method of torch's that is touched: its step asks it for what to update, group by group.
    def _init_group(self, group: dict[str, Any], params: list[Tensor], *lists: list[Tensor]) -> bool:
        """Updates the weights whose term was handed over; the lists get the rest, for torch's own update."""
        has_complex = super()._init_group(group, params, *lists)
        taken = [p in self.terms for p in params]
        kinds: dict[Any, list[Tensor]] = {}
        for p in compress(params, taken):
            kinds.setdefault(self._kind(p), []).append(p)
        for alike in kinds.values():
            self._update(group, alike)
        for one in (params, *lists):
            one[:] = [x for x, mine in zip(one, taken, strict=False) if not mine]
        return has_complex

    def _kind(self, parameter: Tensor) -> Any:
        """What the weights of one launch have in common."""
        quantizer, state = self.terms[parameter].weight.quantizer, self.state[parameter]
        return quantizer.format.name, quantizer.noise.name, parameter.device, parameter.dtype, state["exp_avg"].dtype

    def _update(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        """One launch of the pass, over weights of one kind."""
        states, terms = [self.state[p] for p in params], [self.terms.pop(p) for p in params]
        from lotion_fx.kernels.adamw_smooth import adamw_smooth  # needs Triton, which not all systems have

        quantizer, found_inf = terms[0].weight.quantizer, getattr(self, "found_inf", None)
        steps = [state["step"] for state in states]
        private.foreach_add_(steps, 1)
        for term, state in zip(terms, states, strict=True):
            term.weight.curvature.moment = state["exp_avg_sq"]
        two_level = quantizer.format.law.two_level
        largest = torch.stack([self._amax_of(p) for p in params]) if two_level else params[0].new_zeros(0).float()
        largest = adamw_smooth(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            self._factors(group, terms, steps, params[0].device),
            largest,
            found_inf,
            quantizer.format.name,
            quantizer.noise.name,
            *group["betas"],
        )
        if found_inf is not None:
            private.foreach_sub_(steps, [found_inf.to(step.device) for step in steps])
        self._amax.update({p: (one, _contents(p)) for p, one in zip(params, largest, strict=False)})

    def _factors(
        self, group: dict[str, Any], terms: Sequence[Term], steps: Sequence[Tensor], device: torch.device
    ) -> Tensor:
        """The columns of `adamw_smooth.FACTORS`; in float64, as Python's numbers are, up to the last."""
        steps_taken = torch.stack(list(steps)).to(device, torch.float64)
        of_moment, of_square, gain, limit = (
            torch.stack([getattr(term, name) for term in terms]) for name in ("of_moment", "of_square", "gain", "limit")
        )
        strength = (0.5 * gain).abs().sqrt()  # which is in the root of the kernel's h
        beta1, beta2 = group["betas"]
        lr = torch.as_tensor(group["lr"], dtype=torch.float64).to(device)
        scale = getattr(self, "grad_scale", None)
        unscale = (-1 if group["maximize"] else 1) / (1.0 if scale is None else scale.to(device, torch.float64))
        root = (1 - beta2**steps_taken).sqrt()
        columns = [
            0.5 * gain * of_moment,
            0.5 * gain * of_square,
            torch.as_tensor(unscale, dtype=torch.float64).to(device).expand(len(terms)),
            (1 - lr * group["weight_decay"]).expand(len(terms)),
            lr * root / (1 - beta1**steps_taken),
            group["eps"] * root,
            torch.where(strength > 0, limit / strength, 0.0),
        ]
        return torch.stack([column.float() for column in columns], dim=1)

    def _amax_of(self, parameter: Tensor) -> Tensor:
        """The absmax of a weight, 0-d float32, from the last pass unless something else changed the weight since."""
        known = self._amax.get(parameter)
        if known is not None and known[1] == _contents(parameter):
            return known[0]
        return parameter.detach().abs().amax().float()


def _fits(weight: Tensor, quantizer: Quantizer) -> bool:
    """Whether the pass takes this weight in this format."""
    block = quantizer.format.block
    if not isinstance(block, int) or block > 128 or block & (block - 1):
        return False
    return quantizer.axis == weight.dim() - 1 and weight.shape[-1] % block == 0


def _contents(parameter: Tensor) -> tuple[int, int]:
    """Changes with what a parameter holds: in place, or by another tensor put in its place."""
    return parameter.data_ptr(), private.version_of(parameter)
