"""What is looked at: a rule on a few tasks of one family, with the settings of its run.

S tasks, T inner steps, N coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_scale.checks import check_count
from l2l_scale.estimators import GradientEstimator
from l2l_scale.evaluation.curves import stay_astray
from l2l_scale.optimizers.backend import Backend, accelerate
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.rng import Split
from l2l_scale.sampling import Schedule, Teacher, WindowSampler
from l2l_scale.tasks.base import TaskFamily
from l2l_scale.tree import Tree
from l2l_scale.unroll import Carry, InnerGradient, WindowBatch, begin, unroll


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A rule, and what it is looked at on.

    Args:
        rule: the rule.
        family: whose tasks it works on.
        schedule: horizon and window; trajectories are in lockstep and without a curriculum.
        estimator: of the meta-gradient, as in training.
        seed: of the tasks' streams.
        split: whose tasks: TRAIN, or VALID for held-out ones.
        num_tasks: S; tasks 0 … S − 1 of the split.
        slots_per_meta_step: how many windows one meta-step of the run averages over, in all slots.
        backend: how the rule is computed where its insides are not watched.
        teacher: the teacher of the run, if it has one.

    Raises:
        ValueError: if ``num_tasks`` is below 1.
    """

    rule: UpdateRule
    family: TaskFamily
    schedule: Schedule
    estimator: GradientEstimator
    seed: int = 0
    split: Split = Split.VALID
    num_tasks: int = 8
    slots_per_meta_step: int = 128
    backend: Backend = "auto"
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        check_count("num_tasks", self.num_tasks)

    @property
    def split_family(self) -> TaskFamily:
        """The family on the data of the split, ready for the CPU."""
        family = self.family.for_split(self.split)
        family.prepare(torch.device("cpu"))
        return family

    @property
    def own_rule(self) -> UpdateRule:
        """The rule for tasks of this family, op by op, so that its insides can be watched."""
        return self.rule.for_spec(self.family.spec)

    @property
    def fast_rule(self) -> UpdateRule:
        """The same as the backend computes it; it has the very same φ."""
        if not list(self.rule.parameters()):
            return self.own_rule
        return accelerate(self.own_rule, self.backend, torch.device("cpu"), self.dtype).rule

    @property
    def dtype(self) -> torch.dtype:
        """That of φ."""
        return next((parameter.dtype for parameter in self.rule.parameters()), torch.float32)

    @property
    def work(self) -> int:
        """N · S · T: how often a coordinate is updated."""
        return self.family.spec.size * self.num_tasks * self.schedule.horizon

    def windows(
        self, tasks: range | None = None, dtype: torch.dtype | None = None, taught: bool = False
    ) -> list[WindowBatch]:
        """The windows of one trajectory on each task.

        Args:
            tasks: only these; all S if not given.
            dtype: of floats; that of φ if not given.
            taught: with what the teacher does on them, which costs as much as a trajectory.
        """
        plain, teacher = self.schedule.plain(), self.teacher if taught else None
        family = self.family.for_split(self.split)
        sampler = WindowSampler(family, plain, self.seed, self.split, teacher)
        tasks = range(self.num_tasks) if tasks is None else tasks
        return [
            sampler(index, tasks).to_batch(dtype or self.dtype)
            for index in range(plain.windows_per_trajectory)
        ]


def follow(rule: UpdateRule, family: TaskFamily, windows: Sequence[WindowBatch]) -> Tensor:
    """Unroll the trajectories of some windows, as validation does; losses f(θ_0) … f(θ_T), (T + 1, S).

    What diverges stays so: from its first non-finite loss on, a curve is +inf.
    """
    carry: Carry | None = None
    losses: list[Tensor] = []
    for batch in windows:
        carry = begin(rule, batch, carry, restart_diverged=False)
        rollout = unroll(rule, family, carry, batch, InnerGradient.NONE)
        losses += [rollout.losses] if losses else [rollout.carry.start_loss[None], rollout.losses]
        carry = rollout.carry
    return stay_astray(torch.cat(losses))


class Wrapped(UpdateRule):
    """A rule with something around its steps. Holds the very rule."""

    def __init__(self, rule: UpdateRule) -> None:
        super().__init__()
        self.rule = rule

    def init_state(self, theta: Tensor) -> Tree:
        """The rule's own state."""
        return self.rule.init_state(theta)

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """The rule's own step."""
        update, state = self.rule(grad, theta, state)
        return update, state

    def open_window(self, theta: Tensor, state: Tree) -> Tree:
        """As the rule does."""
        return self.rule.open_window(theta, state)

    def close_window(self, theta: Tensor, state: Tree) -> Tree:
        """As the rule does."""
        return self.rule.close_window(theta, state)
