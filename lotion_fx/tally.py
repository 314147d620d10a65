"""Where a training stands: the loss terms T of the step under way, bindings of probes, phases and steps.

Whatever of this changes, changes here, by a method named for what happened; every other file only reads it. What
happens in one step, in this order:

    forward_comes      parameters hold what is to be read  forward_began     the model is called
    probe_for          a weight enters a graph with a probe
    backward_comes     gradients may have been dropped     curvature_arrived the first probe tells T
    rows_counted       ... or the model's output does      backward_ended    gradients are sampled, before clipping
    step_begins        the optimizer's hook runs           counted           it knows T
    clipped, took_in   an optimizer's step has its term    stepped           the step is over
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lotion_fx import by_hand, private_backward, private_ranks
from lotion_fx.clipping import Clipping
from lotion_fx.loss_count import LossCount
from lotion_fx.measuring import Measuring
from lotion_fx.passes.attach.attach import STE
from lotion_fx.schedule import PHASES, Phase
from lotion_fx.settings import Settings
from lotion_fx.shards import local_of, sample

if TYPE_CHECKING:
    from lotion_fx.state import Weight


@dataclass(eq=False)
class Tally:
    """Of one model.

    Args:
        settings, weights: the model's.
        steps: optimizer steps so far.
        reached: steps as the forward under way found them, which tell the phase.
        chosen: the phase that `finish` or `hold_codes` began, which stays.
        override: the forward inside `full_precision` or `randomized`.
        plain: whether terms are taken without strength and gains.
        calibrated: at which step.
        forwards: calls of the model so far.
        backwards: backward passes since the last step.
        dropped: how often gradients were dropped since then, no step having taken them.
        graphs: that rounded weights in the forward under way.
        has_breaks: whether a forward ran several of them, or Python ran it.
        counted_in_graph: whether a joint graph of the forward under way counts T.
        terms: T of the step under way, over all its backward passes.
        last_backward: the backward pass in which curvature last arrived.
        last_checked: the backward pass before which dropped gradients were looked for.
        steps_inside: the forward in whose backward pass an optimizer was first seen to step; None if none was.
        gradients: a few elements of each gradient as backward left it.
        group: DistributedDataParallel's process group, or the one that `transform` was given.
        mesh: that tensor parallelism divides weights over, as graphs see them.
        watched: a weight with a few elements of its first gradient as backward left it, see `by_hand`.
        last_loss_count: T of the last step, over all ranks.
        clipping: what optimizers' second moments hold of it.
        step_of_forwards: the step that forwards are part of, which begins with the first after an optimizer's step.
        is_closed: whether an optimizer stepped since the last forward.
        last_pass: the step, so counted, of the last curvature pass of ``"ggn"``.
        sampling: whether that pass is under way.
        draws: labels that the passes of its step drew.
        measuring: the size of the term.
    """

    settings: Settings
    weights: list[Weight]
    steps: int = 0
    reached: int = 0
    chosen: str | None = None
    override: str | None = None
    plain: bool = False
    calibrated: int | None = None
    forwards: int = 0
    backwards: int = 0
    dropped: int = 0
    graphs: int = 0
    has_breaks: bool = False
    counted_in_graph: bool = False
    terms: LossCount = field(init=False)
    last_backward: int = -1
    last_checked: int = -1
    steps_inside: int | None = None
    gradients: dict[Weight, Tensor] = field(default_factory=dict)
    group: Any = None
    mesh: Any = None
    watched: tuple[Weight, Tensor] | None = None
    last_loss_count: Tensor | None = None
    clipping: Clipping = field(default_factory=Clipping)
    step_of_forwards: int = 0
    is_closed: bool = False
    last_pass: int | None = None
    sampling: bool = False
    draws: int = 1
    measuring: Measuring = field(init=False)

    def __post_init__(self) -> None:
        self.measuring = Measuring(self.weights, is_on=self.settings.measures, counts=not self.settings.samples_labels)
        self.terms = LossCount(residuals=self.measuring.residuals)

    # ------------------------------------------------------------------------------------------------------- questions

    @property
    def phase(self) -> Phase:
        """The phase of the step under way."""
        return PHASES[self.chosen] if self.chosen is not None else self.settings.schedule.phase(self.reached)

    @property
    def is_later_phase(self) -> bool:
        """Whether it is not the training's first."""
        return self.phase is not self.settings.schedule.phase(0)

    @property
    def next_phase(self) -> tuple[str, int] | None:
        """The phase to come and the step that it begins with, if any is."""
        return None if self.chosen is not None else self.settings.schedule.after(self.reached)

    @property
    def term_steps(self) -> int:
        """Steps since the expected-loss term first came."""
        return max(self.steps - self.settings.schedule.term_begins, 0)

    @property
    def forward_mode(self) -> str:
        """The training forward."""
        return self.settings.forward_in(self.phase)

    def is_frozen(self, weight: Weight) -> bool:
        """Whether a weight stays as it is, and so is trained against at the values that are deployed.

        Not what merely waits for its turn, as one half of a GAN does: it had a gradient in the last step that was its.
        """
        parameter = weight.master
        stays = parameter is not None and not parameter.requires_grad and weight.gathered.last_step != self.steps
        return stays and self.phase.name != "plain"

    def mode_of(self, weight: Weight) -> str:
        """The training forward of one weight."""
        return STE if self.is_frozen(weight) else self.forward_mode

    @property
    def has_term(self) -> bool:
        return self.phase.has_term

    @property
    def probes(self) -> bool:
        """Whether curvature is asked of the forward that comes next."""
        is_asked = self.sampling if self.settings.samples_labels else self.pass_is_due
        return is_asked and self.has_term and not self.override

    @property
    def resting(self) -> bool:
        """Whether the step under way gathers no curvature, or has had no pass for it yet."""
        return self.last_pass != self.step_of_forwards if self.settings.samples_labels else not self.pass_is_due

    @property
    def pass_is_due(self) -> bool:
        """Whether the step under way is to gather curvature."""
        turn, interval = self._turn
        return turn % interval == 0

    @property
    def loss_count(self) -> Tensor | None:
        """T of the step under way."""
        return self.terms.value

    @property
    def decay(self) -> float:
        """Of curvature's moving average, from the last step that gathered any to the step under way."""
        return self.settings.decay ** self._turn[1]

    @property
    def _turn(self) -> tuple[int, int]:
        """The step under way, from the first with a term (a forward, under ``"ggn"``), and of how many one gathers."""
        begun = max(self.reached - self.settings.schedule.term_begins, 0)
        turn = self.step_of_forwards if self.settings.samples_labels else begun
        return turn, self.settings.interval(turn)

    def was_called(self, weight: Weight) -> bool:
        """Whether the model was called since an optimizer stepped the weight; nothing tells it of an adopted model."""
        return self.settings.adopted or self.forwards > weight.gathered.last_forward

    @property
    def needs_loss_count(self) -> bool:
        """Whether some weight's curvature takes T from the user's own loss."""
        if not self.settings.samples_labels:
            return not self.resting
        return any(w.selected and not w.is_analytic for w in self.weights)

    def strength_of(self, weight: Weight) -> float:
        """Of a weight's term in the steps: the user's, times its measured size."""
        return weight.joint_strength * (1.0 if self.plain else self.measuring.factor(weight, self.term_steps))

    # --------------------------------------------------------------------------------------------------------- phases

    def enter(self, phase: str) -> None:
        """A phase begins by hand, and stays."""
        self.chosen = phase

    def calibrated_now(self) -> None:
        self.calibrated = self.steps

    @contextlib.contextmanager
    def switched(self, **fields: Any) -> Iterator[None]:
        """Inside, some fields have other values."""
        before = {name: getattr(self, name) for name in fields}
        vars(self).update(fields)
        try:
            yield
        finally:
            vars(self).update(before)

    # -------------------------------------------------------------------------------------------------- forward passes

    def step_of_forwards_began(self) -> None:
        """A forward comes, the first of a step where an optimizer stepped since the last."""
        self.step_of_forwards, self.is_closed = self.step_of_forwards + self.is_closed, False
        self.reached = self.steps

    def forward_comes(self, *, trains: bool, of_part: bool = False) -> None:
        """Code that reads weights is about to run, the model or a part of it; parameters hold what it is to read.

        Args:
            trains: it is a training forward, whose gradient an optimizer is to step with.
        """
        self.reached = self.steps
        if trains and not self.override and self.phase.measures:
            self.measuring.hold(self.term_steps, of_part=of_part, gathers=self.pass_is_due)
        else:
            self.measuring.looks_away()

    def forward_began(self) -> None:
        self.counted_in_graph = False
        self.forwards += 1
        self.graphs = 0

    def graph_ran(self, *, in_python: bool = False) -> None:
        """One of the graphs that round weights ran, a second one with Python before it; or all are run by Python."""
        self.graphs += 1
        self.has_breaks |= in_python or self.graphs > 1

    def runs_in(self, group: Any) -> None:
        """The forward under way is that of a DistributedDataParallel over this group; None of no such module."""
        self.group = self.settings.process_group if group is None else group

    def is_divided_over(self, mesh: Any) -> None:
        """A graph takes a weight as a `DTensor` over this mesh."""
        self.mesh = mesh

    def graph_runs(self, weights: Sequence[Weight], *, counts: bool) -> None:
        """A graph with these weights' probes runs; ``counts`` where its joint graph tells T."""
        self.counted_in_graph |= counts
        self.runs_in(private_ranks.active_data_parallel_group())
        if private_backward.current_backward() == -1:  # what checkpointing recomputes is no second use
            for weight in weights:
                gathered = weight.gathered
                if gathered.bound_in != self.forwards or self.settings.adopted:
                    gathered.bound_in, gathered.bindings = self.forwards, 0
                gathered.bindings += 1

    def probe_for(self, weight: Weight, tensor: Tensor) -> Tensor:
        """A weight's probe for one more graph; what it gathered is dropped where the step it was for never came.

        Args:
            tensor: the weight as the graph takes it.
        """
        gathered, size, master = weight.gathered, weight.layout.size, weight.master
        if gathered.probe is None or gathered.probe.numel() != size or gathered.probe.device != tensor.device:
            # One zero, however long the vector: only its gradient is ever stored.
            gathered.probe = torch.zeros((), dtype=torch.float32, device=tensor.device).expand(size).requires_grad_()
            known = weakref.ref(weight)  # a hook is kept alive from C++, where no garbage collector looks
            gathered.probe.register_post_accumulate_grad_hook(lambda _: _arrived(known()))
        # Between micro-batches FSDP2 may hold the gradient at the unsharded parameter.
        dropped = master is not None and master.grad is None and tensor.grad is None
        if dropped and gathered.probe.grad is not None and not self.sampling:
            gathered.drop_probe()
            self._dropped()
        return gathered.probe

    def _dropped(self) -> None:
        """The gradients of a backward pass were dropped, and no step had taken them."""
        self.dropped += self.loss_count is not None  # once a forward, however many weights
        self.terms.forget()

    def forget_skipped_step(self) -> None:
        """T begins anew where the gradients of a step that never came were dropped."""
        if all((master := weight.master) is None or master.grad is None for weight in self.weights):
            self.terms.forget()

    @contextlib.contextmanager
    def curvature_pass(self) -> Iterator[None]:
        """Inside, forwards carry probes; at the end this step has had its pass."""
        with self.switched(sampling=True):
            yield
        self.last_pass = self.step_of_forwards

    def drew(self, labels: int) -> None:
        """A curvature pass drew so many labels, more of them after the first pass of a step."""
        self.draws = labels if self.resting else self.draws + labels

    # ------------------------------------------------------------------------------------------------- backward passes

    def backward_comes(self) -> None:
        """A backward pass is about to fill gradients: what probes gathered with dropped ones is dropped too."""
        backward = private_backward.current_backward()
        if self.last_checked == backward or self.sampling:
            return
        self.last_checked, kept = backward, []
        for weight in self.weights:
            gathered, master = weight.gathered, weight.master
            gathered.forget_objective(master)
            if not gathered.has_gradient or master is None or gathered.probe is None or gathered.probe.grad is None:
                continue
            if master.grad is None:
                gathered.drop_probe()
                self._dropped()
            else:  # zeroed in place perhaps, which counts as no change through `.data`
                kept.append(local_of(master.grad).any())
                gathered.probe.grad *= kept[-1]
                gathered.told = None if gathered.told is None else gathered.told * kept[-1]
        if kept:
            self.terms.keep(torch.stack(kept).any())

    def curvature_arrived(self, weight: Weight, *, taken: Tensor | None = None) -> None:
        """A weight's curvature arrived, or was taken by the loop. A pass's first is nearest the loss, and tells T."""
        gathered, backward = weight.gathered, private_backward.current_backward()
        arrived = gathered.probe.grad if taken is None and gathered.probe is not None else taken
        if arrived is None or self.last_backward == backward:
            return
        self.last_backward, told = backward, gathered.tells(arrived, grows=taken is None).unbind()
        if self.measuring.watches:
            self.terms.residuals.arrived_inside(*told[:-1])
        self.rows_counted(told[-1], to_gradients=taken is None)

    def rows_counted(self, count: Tensor, *, to_gradients: bool = True) -> None:
        """One backward pass counted so many loss terms; of weights' gradients, for a step to come, or of others."""
        self.terms.add(count, to_gradients=to_gradients)
        if to_gradients:
            self.backwards += 1
            by_hand.warn_of_no_step(self)
            private_backward.after_backward(self.backward_ended)

    def backward_ended(self) -> None:
        """Samples the gradients that Fisher curvature will read, so that later clipping can be divided out."""
        for weight in self.weights:
            master = weight.master
            grad = None if master is None or not weight.selected else master.grad
            weight.gathered.has_gradient = grad is not None
            if grad is not None and not weight.is_analytic:
                self.gradients[weight] = sample(grad).clone()
        if not self.term_steps and by_hand.is_alone(self):
            held = ((weight, weight.master) for weight in self.weights if weight.selected)
            grads = ((weight, master.grad) for weight, master in held if master is not None)
            self.watched = next(((weight, sample(grad).clone()) for weight, grad in grads if grad is not None), None)

    def watched_is_seen(self) -> None:
        """The first step compared the gradient that was watched."""
        self.watched = None

    # ----------------------------------------------------------------------------------------------------------- steps

    def step_begins(self) -> None:
        """An optimizer's hook runs."""
        if self.steps_inside is None and private_backward.current_backward() != -1:
            self.steps_inside = self.forwards

    def counted(self, loss_count: Tensor) -> None:
        """T of the step, over all ranks."""
        self.last_loss_count = loss_count

    def clipped(self, clip: Tensor | float, decay: float, before: Tensor | float) -> None:
        """Clipping shrank the gradients that the optimizer's second moment averages in this step.

        Args:
            clip: the factor by which.
            decay: of that average.
            before: how many steps it had before this one.
        """
        if not self.terms.is_used and self.last_loss_count is not None:  # else another optimizer's step told it
            self.clipping.told(torch.as_tensor(clip, device=self.last_loss_count.device), decay, before)

    def took_in(self) -> None:
        """An optimizer's step has its term."""
        self.terms.was_used()

    def stepped(self, weights: Sequence[Weight], *, counts: bool) -> None:
        """A step is over: probes are emptied, and it is counted.

        Args:
            weights: those that the optimizer steps.
            counts: whether this is one more step of the training.
        """
        for weight in weights:
            gathered = weight.gathered
            gathered.drop_probe()
            gathered.steps += counts
            gathered.has_gradient = gathered.in_objective = gathered.in_loss = False
            self.gradients.pop(weight, None)
        self.is_closed, self.backwards, self.dropped = True, 0, 0
        self.steps = max(self.steps, *(weight.gathered.steps for weight in weights))
        # Two optimizers of one iteration are in one phase. Where nobody calls the model, steps alone tell.
        if not any(self.was_called(weight) for weight in weights) or self.settings.adopted:
            self.reached = self.steps
        for weight in weights:
            weight.gathered.last_step, weight.gathered.last_forward = self.steps, self.forwards

    # ----------------------------------------------------------------------------------------------------- saved state

    def saved(self) -> dict[str, Any]:
        """What resuming needs, at a step boundary."""
        return {
            "steps": self.steps,
            "phase": self.phase.name,
            "chosen": self.chosen,
            "curvature": self.settings.curvature,
            "terms": self.last_loss_count,
            "clipping": self.clipping.saved(),
            "calibrated": self.calibrated,
            "turn": self.step_of_forwards + self.is_closed,
            "forwards": self.forwards,
            "has_breaks": self.has_breaks,
            "noise": self.settings.noise.name,
            "size": self.measuring.saved() if self.settings.measures else None,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Stands where `saved` was called."""
        self.steps = self.reached = saved["steps"]
        before = "finish" if saved.get("finish_term") else "ste_scale"  # states of before knew two phases
        self.chosen = saved.get("chosen", before if saved.get("finishing") else None)
        self.last_loss_count, self.calibrated = saved["terms"], saved["calibrated"]
        self.clipping = Clipping.restored(saved.get("clipping"))
        self.step_of_forwards, self.is_closed, self.last_pass = saved["turn"], False, None
        if saved.get("size") is not None:  # states of before had none
            self.measuring.restore(saved["size"])
        self.forwards, self.has_breaks = saved.get("forwards", self.forwards), saved.get("has_breaks", self.has_breaks)
        self.terms.forget()  # of a step under way, as the probes that are dropped with it


def _arrived(weight: Weight | None) -> None:
    if weight is not None:
        weight.smoothing.tally.curvature_arrived(weight)
