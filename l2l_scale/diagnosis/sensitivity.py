"""What becomes of trajectories if the rule's steps, its gradients or its start are a little different.

S tasks, T inner steps, N coordinates.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2l_scale.diagnosis.subject import Subject, Wrapped, follow
from l2l_scale.diagnosis.trajectory import Watched, is_high
from l2l_scale.evaluation.report import median
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.rng import Channel, stream
from l2l_scale.tree import Tree, tree_map
from l2l_scale.unroll import WindowBatch

UPDATE_SCALES = (0.5, 0.9, 1.1, 2.0)
GRADIENT_SCALES = (0.1, 10.0)
NUDGE = 1e-7
"""Size of the perturbation of θ_0, relative to its root mean square (or to 1, if that is smaller)."""
FOLLOWED = 5_000_000
"""Updates of coordinates that are followed in float64, which is slow; of longer trajectories the start is."""
_FLOOR = 1e-6
"""A final loss counts as at least this part of the first one: below is rounding in float32."""


class Change(NamedTuple):
    """What a factor on all updates, or on all gradients that the rule sees, does to the final losses."""

    what: str
    """"update" or "gradient"."""
    factor: float
    ratio: float
    """Median over tasks of the final loss relative to the unperturbed one: 1 + (f' − f) / |f|."""
    diverged: float
    """Share of the tasks that diverge with the factor and do not without."""


class Chaos(NamedTuple):
    """How a tiny perturbation of θ_0 grows, in float64."""

    growth: Tensor
    """‖θ'_t − θ_t‖ / ‖θ'_0 − θ_0‖, (T, S), t = 0 … T − 1; NaN or inf for what diverged."""

    @property
    def medians(self) -> Tensor:
        """Over tasks, (T,); what is not finite counts as infinite."""
        return median(self.growth.nan_to_num(nan=math.inf))

    @property
    def exponent(self) -> float:
        """Mean growth of the logarithm per inner step: above 0 for long, a trajectory is chaotic."""
        steps = len(self.growth) - 1
        return math.log(max(float(self.medians[-1]), 1e-300)) / steps if steps else math.nan


class Scaled(Wrapped):
    """A rule that sees gradients times one factor, and whose updates are multiplied by another."""

    def __init__(self, rule: UpdateRule, update: float = 1.0, gradient: float = 1.0) -> None:
        super().__init__(rule)
        self.update, self.gradient = update, gradient

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step."""
        update, after = self.rule(self.gradient * grad, theta, state)
        return self.update * update, after


def sensitivity(subject: Subject) -> list[Change]:
    """Final losses with several factors, on the same tasks."""
    changes = [("update", factor) for factor in UPDATE_SCALES]
    changes += [("gradient", factor) for factor in GRADIENT_SCALES]
    rule, family, windows = subject.fast_rule, subject.split_family, subject.windows()
    before = follow(rule, family, windows)
    return [
        compare(what, factor, before, follow(Scaled(rule, **{what: factor}), family, windows))
        for what, factor in changes
    ]


def compare(what: str, factor: float, before: Tensor, after: Tensor) -> Change:
    """Compare final losses of curves (T + 1, S) without and with a factor."""
    size = torch.maximum(before[-1].abs(), _FLOOR * before[0].abs()).double()
    change = (after[-1].double() - before[-1].double()) / size
    astray, lost = is_high(after)[-1], is_high(before)[-1]
    known = change[~lost].masked_fill(astray[~lost], torch.inf)
    ratio = 1 + float(median(known)) if len(known) else math.nan
    return Change(what, factor, ratio, float((astray & ~lost).double().mean()))


def chaos(subject: Subject) -> Chaos:
    """Follow every task twice, from θ_0 and from beside it, in float64."""
    rule, growth = copy.deepcopy(subject.own_rule).double(), []
    few = max(subject.schedule.plain().windows_per_trajectory * FOLLOWED // max(subject.work, FOLLOWED), 1)
    windows = [_twice(batch) for batch in subject.windows(dtype=torch.float64)[:few]]
    size, count = windows[0].theta0.shape[1], subject.num_tasks
    directions = [
        stream(subject.seed, subject.split, Channel.NOISE, task).standard_normal(size)
        for task in range(count)
    ]
    start = windows[0].theta0[:count]
    scale = NUDGE * start.square().mean(-1, keepdim=True).sqrt().clamp(min=1.0)
    nudged = start + scale * torch.from_numpy(np.stack(directions))
    beside = torch.cat((start, nudged))
    windows = [batch._replace(theta0=beside) for batch in windows]
    first = (nudged - start).norm(dim=-1)

    def look(_: Tensor, theta: Tensor, __: Tensor) -> None:
        growth.append((theta[count:] - theta[:count]).norm(dim=-1) / first)

    follow(Watched(rule, look), subject.split_family, windows)
    return Chaos(torch.stack(growth))


def _twice(batch: WindowBatch) -> WindowBatch:
    """Every slot a second time, behind all others."""

    def along(axis: int, tree: Tree) -> Tree:
        return tree_map(lambda leaf: torch.cat((leaf, leaf), axis), tree)

    return batch._replace(
        inner_step=along(0, batch.inner_step),
        reset=along(0, batch.reset),
        task=along(0, batch.task),
        theta0=along(0, batch.theta0),
        data=along(1, batch.data),
        horizon=along(0, batch.horizon),
        teacher=along(1, batch.teacher),
    )
