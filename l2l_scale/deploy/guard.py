"""A guard for rules in use: when gradient, update or loss run away, back to where all was well.

What a learned rule does on a problem unlike those of its meta-training is not known; it may diverge where
Adam would not. The guard watches numbers that are there anyway, keeps a point to return to, and touches
nothing while all is well: updates are then the rule's own, bit for bit.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2l_scale.checks import check_count, check_fraction, check_positive, check_range


@dataclass(frozen=True, kw_only=True)
class Guard:
    """When to go back, and how carefully to go on from there.

    An alarm is raised at a step if

    - the gradient, the update, or the loss is not finite;
    - the gradient's norm is above all norms so far, and above ``limit`` times their geometric mean (over all
      steps at first, then with a time constant of 10 · ``every`` steps: growth of 5 % per step is noticed);
    - the loss, which is known where ``step`` is given a closure, is more than ``limit / 10`` times (|loss at
      the first step| + 1) above that of the first step.

    Then θ returns to a point of 1 to 2 times ``every`` steps ago, after which all was well for so long (or to
    the start); the rule starts anew there, and its updates are scaled by ``backoff``.

    Updates may also be too long without growing: learned ones are bounded, and θ then swings to and fro. What
    tells it is the cosine between a step and the gradient at its end, which is positive where the step went
    past the lowest point of its line. If its mean over ``every`` steps is above ``overshoot`` the updates are
    halved; nothing else is touched. (Noisy gradients keep it below 0.3 in healthy training of networks.)

    In both cases the scale of the updates grows back to 1 by ``growth`` per step.

    Args:
        limit: how many times its recent mean a gradient's norm may be.
        every: steps between two points that are kept.
        backoff: factor on the updates after an alarm, between 0 and 1; one after the other multiply.
        overshoot: mean cosine at which updates are halved; 1 never does.
        growth: factor by which the scale of the updates grows per step; above 1.

    Raises:
        ValueError: if a number is out of range.
    """

    limit: float = 100.0
    every: int = 10
    backoff: float = 0.25
    overshoot: float = 0.5
    growth: float = 1.01

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_positive("backoff", self.backoff)
        check_fraction("backoff", self.backoff)
        check_range("overshoot", self.overshoot, 0, 1)
        for name in ("limit", "growth"):
            value = getattr(self, name)
            check_positive(name, value)
            if value <= 1:
                raise ValueError(f"{name} ({value}) must be above 1")


POINTS = ("anchor", "candidate", "step")
"""What a watch has of the size of θ."""


@dataclass
class Watch:
    """What a guard knows of one problem. Plain numbers and two points, (1, N) each."""

    guard: Guard
    anchor: Tensor
    """Where to return to."""
    candidate: Tensor
    """Becomes the anchor if all is well for so long."""
    step: Tensor
    """The last one."""
    age: int = 0
    """Steps since the candidate was taken."""
    steps: int = 0
    """At which all was well, and the gradient not zero."""
    log_norm: float = 0.0
    """Mean of log ‖∇‖ over them."""
    peak: float = 0.0
    """Largest ‖∇‖ so far."""
    first_loss: float = math.nan
    cosine: float = 0.0
    """Mean cosine between a step and the gradient at its end."""
    cosines: int = 0
    """Over so many steps."""
    scale: float = 1.0
    """Factor on the updates."""
    alarms: int = 0

    @classmethod
    def at(cls, guard: Guard, theta: Tensor) -> Watch:
        """A new watch that begins at θ (1, N)."""
        return cls(guard, theta.clone(), theta.clone(), torch.zeros_like(theta))

    def alarm(self, norm: float, update_norm: float, loss: float | None) -> str:
        """The reason for an alarm at this step, empty if all is well.

        Args:
            norm: ‖∇‖.
            update_norm: ‖update‖ of the rule's answer to it.
            loss: at this point, if it is known.
        """
        values = {"gradient": norm, "update": update_norm, "loss": loss}
        for name, value in values.items():
            if value is not None and not math.isfinite(value):
                return f"the {name} is not finite"
        mean = math.exp(self.log_norm) if self.steps else math.inf
        if norm > max(self.peak, self.guard.limit * mean):
            return f"the gradient's norm rose from about {mean:.3g} to {norm:.3g}"
        if loss is not None and math.isfinite(self.first_loss):
            rise = loss - self.first_loss
            if rise > self.guard.limit / 10 * (abs(self.first_loss) + 1):
                return f"the loss rose from {self.first_loss:.3g} to {loss:.3g}"
        return ""

    def note(self, theta: Tensor, norm: float, loss: float | None) -> None:
        """All is well at θ (1, N)."""
        guard = self.guard
        if loss is not None and not math.isfinite(self.first_loss):
            self.first_loss = loss
        if norm > 0:
            self.steps += 1
            share = 1 / min(self.steps, 10 * guard.every)
            self.log_norm += share * (math.log(norm) - self.log_norm)
            self.peak = max(self.peak, norm)
        self.scale = min(1.0, self.scale * guard.growth)
        if self.cosines >= guard.every and self.cosine > guard.overshoot:
            self.scale, self.cosine, self.cosines = self.scale / 2, 0.0, 0
        self.age += 1
        if self.age > guard.every:
            self.anchor, self.candidate, self.age = self.candidate, theta.clone(), 1

    def compare(self, along: float, norm: float, length: float) -> None:
        """Note how the gradient (of this norm) lies to the last step (of this length), from their product."""
        if norm > 0 and length > 0:
            self.cosines += 1
            share = 1 / min(self.cosines, self.guard.every)
            self.cosine += share * (along / (norm * length) - self.cosine)

    def return_to_anchor(self) -> Tensor:
        """Go on more carefully from the anchor, (1, N)."""
        self.alarms += 1
        self.scale *= self.guard.backoff
        self.candidate, self.age = self.anchor, 0
        self.step, self.cosine, self.cosines = torch.zeros_like(self.anchor), 0.0, 0
        return self.anchor

    def state(self) -> dict[str, Any]:
        """As plain numbers and tensors, for a state dict: the arguments of a new one, but for the guard."""
        return {name: value for name, value in vars(self).items() if name != "guard"}


def look(watch: Watch, theta: Tensor, grad: Tensor, update: Tensor, loss: float | None) -> Tensor | None:
    """Let the guard look at a step; where to return to if it raises an alarm, (1, N)."""
    products = [torch.linalg.vector_norm(vector) for vector in (grad, update, watch.step)]
    norm, update_norm, length, along = torch.stack([*products, (grad * watch.step).sum()]).tolist()
    known = None if loss is None else float(loss)
    reason = watch.alarm(norm, update_norm, known)
    if not reason:
        watch.compare(along, norm, length)
        watch.note(theta, norm, known)
        return None
    if watch.alarms == 0:
        warnings.warn(
            f"the learned optimizer went back to an earlier point, and goes on with smaller steps: {reason}. "
            "This is said once; optimizer.alarms counts, guard=False leaves it to itself",
            RuntimeWarning,
            stacklevel=5,
        )
    return watch.return_to_anchor()
