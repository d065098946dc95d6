"""How near an imitator comes to its teacher: along the teacher's way, and alone.

S tasks, T inner steps, G parameter groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from l2l_scale.diagnosis.subject import Subject
from l2l_scale.estimators import Imitation
from l2l_scale.evaluation.report import median
from l2l_scale.unroll import Carry, begin

PHASES = 10
"""Parts of a trajectory, if it is long enough."""


class Imitated(NamedTuple):
    """The errors of a rule's updates where its teacher went, and the teacher's losses."""

    groups: tuple[str, ...]
    """Of the family's coordinates: weights, biases, …"""
    errors: Tensor
    """‖update − teacher's‖² / ‖teacher's‖² in every inner step, (T, G, S); NaN where the teacher diverged."""
    losses: Tensor
    """The teacher's f(θ_1) … f(θ_T), (T, S)."""
    spread: int | None
    """The ``data.staggered`` that spreads the run's slots over a trajectory; None if they are spread so."""

    @property
    def medians(self) -> Tensor:
        """Over tasks, (T, G); what is not known counts as infinite."""
        return median(self.errors.nan_to_num(nan=torch.inf))

    @property
    def by_phase(self) -> Tensor:
        """Means of the medians over tenths of the trajectory, (P, G)."""
        return torch.stack(
            [part.mean(0) for part in self.medians.tensor_split(min(PHASES, len(self.errors)))]
        )


def imitation(subject: Subject) -> Imitated | None:
    """Compare with the teacher on all tasks; None if the run imitates nothing, or keeps no points."""
    estimator, plain = subject.estimator, subject.schedule.plain()
    if not isinstance(estimator, Imitation) or subject.teacher is None or not subject.teacher.iterates:
        return None
    rule, family = subject.fast_rule, subject.split_family
    carry: Carry | None = None
    errors, losses = [], []
    for batch in subject.windows(taught=True):
        carry = begin(rule, batch, carry)
        with torch.no_grad():
            found, rollout = estimator.relative_errors(rule, family, carry, batch)
        carry = rollout.carry
        errors.append(found.double().masked_fill(carry.diverged, torch.nan))
        losses.append(rollout.losses.double())
    spread = max(plain.windows_per_trajectory // subject.slots_per_meta_step, 1)
    known = int(subject.schedule.staggered) == spread or subject.slots_per_meta_step == 1
    return Imitated(
        tuple(family.spec.groups), torch.cat(errors), torch.cat(losses), None if known else spread
    )
