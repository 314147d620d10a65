"""What one weight gathers between two steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lotion_fx import private_backward
from lotion_fx.passes.attach.probe import LOSS
from lotion_fx.passes.moments.certificate import Certificate


@dataclass(eq=False)
class Gathered:
    """What one weight gathered since the last step.

    Args:
        probe: its gradient is the curvature; None before the first forward with one.
        taken: the same, of passes whose gradients the loop took by `torch.autograd.grad`.
        told: what the probe's header said of the loss when it was last looked at.
        bindings: how often the probe entered a graph in the forward ``bound_in``.
        in_objective: the term came in through `penalty`, whose backward ran in the pass ``objective_in``.
        in_loss: the loss of the step under way holds the term, with this certificate.
        steps: optimizer steps with a gradient so far.
        moment_steps: that its optimizer's second moment averages: the optimizer's own count, if that is a tensor.
        moment_decay: of that average.
        last_step: of the model, that was the last with a gradient; None if there was none.
        last_forward: of the model, before that step.
        has_optimizer: whether an optimizer that stepped holds it.
        has_gradient: whether the weight had a ``.grad`` when the last backward pass of the step under way ended.
    """

    probe: Tensor | None = None
    taken: Tensor | None = None
    told: Tensor | None = None
    bindings: int = 0
    bound_in: int = -1
    in_objective: bool = False
    objective_in: int = -1
    in_loss: bool = False
    certificate: Certificate | None = None
    steps: int = 0
    moment_steps: Tensor | float = 0.0
    moment_decay: float = 0.999
    last_step: int | None = None
    last_forward: int = 0
    has_optimizer: bool = False
    has_gradient: bool = False

    def drop_probe(self) -> None:
        """Forgets what the probe gathered."""
        self.told = self.taken = None
        if self.probe is not None:
            self.probe.grad = None

    def tells(self, vector: Tensor, *, grows: bool) -> Tensor:
        """What a vector's header says of the loss, [norms, energies, T]; of one that grows, what is new in it."""
        new = vector[-LOSS:].clone()
        if grows:
            new, self.told = new if self.told is None else new - self.told, new
        return new / max(1, self.bindings)

    def arrived(self, gradient: Tensor) -> None:
        """A gradient of the probe, in a backward pass that did not name it."""
        assert self.probe is not None
        self.probe.grad = gradient if self.probe.grad is None else self.probe.grad + gradient

    def was_taken(self, gradient: Tensor) -> None:
        """A gradient of the probe, in a pass whose gradients the loop takes by itself."""
        self.taken = gradient if self.taken is None else self.taken + gradient

    def is_handed_over(self) -> None:
        """An optimizer steps with a gradient: if no backward pass made it, the loop did, of what it took."""
        if self.taken is not None and self.probe is not None and self.probe.grad is None:
            self.probe.grad = self.taken

    def restore(self, steps: int, last_step: int | None) -> None:
        """Stands at a step boundary, after so many steps, the last of which was that one of the model's."""
        self.drop_probe()
        self.steps, self.last_step, self.bound_in, self.last_forward = steps, last_step, -1, 0

    def moment_has(self, steps: Tensor | float, decay: float) -> None:
        """The optimizer's second moment averages so many steps, and forgets by so much at each."""
        self.moment_steps, self.moment_decay = steps, decay

    def entered_loss(self, certificate: Certificate) -> None:
        """A graph whose loss holds the term runs."""
        self.certificate, self.in_loss = certificate, True

    def entered_objective(self) -> None:
        """The backward pass of `penalty` ran."""
        self.in_objective, self.objective_in = True, private_backward.current_backward()

    def forget_objective(self, master: Tensor | None) -> None:
        """A backward pass comes: what `penalty` brought in before went with the gradient that held it."""
        if self.in_objective and master is not None and self.objective_in != private_backward.current_backward():
            is_dropped = master.grad is None or not master.grad.any()
            self.in_objective = not (is_dropped and private_backward.adds_to_grad_of(master))

    def is_in_optimizer(self) -> None:
        """An optimizer that holds it is about to step."""
        self.has_optimizer = True

    def forget_certificate(self) -> None:
        """Keeps no certificate of a step whose loss held no term."""
        self.certificate = self.certificate if self.in_loss else None
