"""What a rule does along its trajectories: losses, sizes and directions of its updates, divergence.

S tasks, T inner steps, N coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from l2l_scale.diagnosis.saturation import Insides, watching
from l2l_scale.diagnosis.subject import Subject, Wrapped, follow
from l2l_scale.evaluation.report import is_above
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.tree import Tree

WATCHED = 5_000_000
"""Updates of coordinates that are watched from inside, which costs more than they do; where there are more,
only every second, third, … inner step is."""

Look: TypeAlias = Callable[[Tensor, Tensor, Tensor], None]
"""Sees gradient, θ and update of an inner step, (S, N) each."""


class Trajectory(NamedTuple):
    """One trajectory on each task. What is not finite belongs to a task that diverged."""

    losses: Tensor
    """f(θ_0) … f(θ_T), (T + 1, S)."""
    update: Tensor
    """(T, S) root mean square of the updates."""
    gradient: Tensor
    """(T, S) that of the gradients which the rule saw."""
    theta: Tensor
    """(T, S) that of θ before the step."""
    cosine: Tensor
    """(T, S) between −update and gradient; 1 is steepest descent. NaN where one of them is zero."""
    diverged_at: Tensor
    """(S,) the first inner step at which a task that diverged was far above its start; 0 if it did not."""
    spiked: Tensor
    """(S,) whether the loss was far above its start at any inner step."""


class Watched(Wrapped):
    """Shows every inner step to somebody who looks on."""

    def __init__(self, rule: UpdateRule, look: Look) -> None:
        super().__init__(rule)
        self.look = look

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """The rule's own step."""
        update, after = self.rule(grad, theta, state)
        self.look(grad, theta, update)
        return update, after


def observe(subject: Subject) -> tuple[Trajectory, Insides]:
    """Follow the rule, and watch its cells and its head meanwhile."""
    steps: list[tuple[Tensor, ...]] = []
    every = -(-subject.work // WATCHED)

    def look(grad: Tensor, theta: Tensor, update: Tensor) -> None:
        grad, theta, update = grad.double(), theta.double(), update.double()
        dot = -(grad * update).mean(-1)
        sizes = [value.square().mean(-1).sqrt() for value in (update, grad, theta)]
        steps.append((*sizes, dot / (sizes[0] * sizes[1])))
        watch.step = len(steps)

    rule = subject.own_rule
    with watching(rule, every) as watch:
        losses = follow(Watched(rule, look), subject.split_family, subject.windows())
    update, gradient, theta, cosine = (torch.stack(column) for column in zip(*steps, strict=True))
    high = is_high(losses)
    first = high.int().argmax(0) + 1
    return Trajectory(
        losses,
        update,
        gradient,
        theta,
        cosine,
        diverged_at=torch.where(high[-1], first, 0),
        spiked=high.any(0),
    ), watch.insides()


def is_high(losses: Tensor) -> Tensor:
    """Where f(θ_1) … f(θ_T) are far above their start, as evaluation counts it, (T, S)."""
    return torch.stack([is_above(loss, losses[0]) for loss in losses[1:]])
