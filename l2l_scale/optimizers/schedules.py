"""Schedules: a factor of the inner step on the update of any rule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from l2l_scale.checks import check_count, check_fraction
from l2l_scale.flat import FlatSpec
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.optimizers.hyper import hyper, per_problem
from l2l_scale.tree import Tree


class RateSchedule(nn.Module, ABC):
    """A factor on updates as a function of the number of inner steps taken so far."""

    @abstractmethod
    def forward(self, inner_step: Tensor) -> Tensor:
        """The factor (*, 1) for the inner step with this number (*, 1), counted from 0."""


class CosineSchedule(RateSchedule):
    """From 1 down to ``final_fraction`` on half a cosine, then constant (Loshchilov, Hutter 2017).

    Equal to ``torch.optim.lr_scheduler.CosineAnnealingLR`` up to its end, where torch's goes up again.

    Args:
        inner_steps: length of the descent, at least 1.
        final_fraction: factor at its end, in [0, 1).
        hold: inner steps at 1 before the descent, which is then a cooldown (Hägele et al. 2024, "Scaling laws
            and compute-optimal training beyond fixed training durations").

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, inner_steps: int, final_fraction: float | Tensor = 0.0, hold: int = 0) -> None:
        super().__init__()
        check_count("inner_steps", inner_steps)
        check_count("hold", hold, least=0)
        self.inner_steps, self.hold = inner_steps, hold
        self.final_fraction = hyper("final_fraction", final_fraction, check_fraction)

    def forward(self, inner_step: Tensor) -> Tensor:
        """The factor, (*, 1)."""
        progress = ((inner_step - self.hold) / self.inner_steps).clamp(0, 1)
        final = per_problem(self.final_fraction, inner_step)
        return final + (1 - final) * (1 + torch.cos(math.pi * progress)) / 2


class ExponentialSchedule(RateSchedule):
    """decay^t after t inner steps, as ``torch.optim.lr_scheduler.ExponentialLR``.

    Args:
        decay: factor per inner step, in (0, 1].

    Raises:
        ValueError: if it is out of its range.
    """

    def __init__(self, decay: float | Tensor) -> None:
        super().__init__()
        self.decay = hyper("decay", decay, _check_decay)

    def forward(self, inner_step: Tensor) -> Tensor:
        """The factor, (*, 1)."""
        return torch.pow(per_problem(self.decay, inner_step), inner_step)


class Scheduled(UpdateRule):
    """Any rule, with its updates multiplied by a schedule's factor.

    Args:
        rule: the rule, learned or hand-designed; it does not see the factor.
        schedule: the factor.
    """

    def __init__(self, rule: UpdateRule, schedule: RateSchedule) -> None:
        super().__init__()
        self.rule, self.schedule = rule, schedule

    def for_spec(self, spec: FlatSpec) -> Scheduled:
        """The rule for these tasks, with the same schedule."""
        return Scheduled(self.rule.for_spec(spec), self.schedule)

    def storage_for(self, size: int) -> str:
        """The rule's own."""
        return self.rule.storage_for(size)

    def init_state(self, theta: Tensor) -> Tree:
        """The rule's state, and the number of inner steps taken (*, 1)."""
        return self.rule.init_state(theta), torch.zeros_like(theta[..., :1])

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step."""
        rule_state, inner_step = state
        update, rule_state = self.rule(grad, theta, rule_state)
        return self.schedule(inner_step) * update, (rule_state, inner_step + 1)


def _check_decay(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} ({value}) must be in (0, 1]")
