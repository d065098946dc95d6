"""The meta-gradient by phase of the trajectory, task by task: how large it is, and how noisy.

S tasks, W windows of a trajectory, P numbers in φ.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_scale.diagnosis.subject import Subject
from l2l_scale.tree import tree_detach
from l2l_scale.unroll import Carry, begin


class MetaGradient(NamedTuple):
    """The meta-gradient of every window and task."""

    inner_steps: tuple[int, ...]
    """Where each window starts, (W,)."""
    gradients: Tensor
    """(W, S, P) in float64; NaN from the window on in which a task diverged."""
    slots_per_meta_step: int
    """How many windows a meta-step of the run averages over."""

    @property
    def norms(self) -> Tensor:
        """Norm of every task's gradient, (W, S)."""
        return self.gradients.square().sum(-1).sqrt()

    @property
    def mean_norms(self) -> Tensor:
        """Norm of the mean over the tasks that have not diverged, (W,): what a meta-step sees."""
        return self.gradients.nanmean(1).square().sum(-1).sqrt()

    @property
    def noise(self) -> Tensor:
        """Standard deviation over tasks, (W,): root of the summed variances. NaN for a single task."""
        count = (~self.gradients[..., 0].isnan()).sum(1)
        squares = (self.gradients - self.gradients.nanmean(1, keepdim=True)).square().sum(-1).nansum(1)
        return torch.where(count > 1, (squares / (count - 1)).sqrt(), torch.nan)

    @property
    def signal_to_noise(self) -> float:
        """Of a meta-step whose slots are spread over all windows; NaN for a single task.

        The signal is the mean over tasks and windows, without the part of its square that noise alone would
        give; the noise is that within windows, over √(slots of a meta-step).
        """
        square, by_chance, spread = self._powers()
        signal = max(square - by_chance, 0.0)
        return math.sqrt(signal / spread) if spread > 0 else (math.inf if signal > 0 else math.nan)

    @property
    def resolution(self) -> float:
        """The signal-to-noise that noise alone would seem to have, with so few tasks."""
        _, by_chance, spread = self._powers()
        return math.sqrt(by_chance / spread) if spread > 0 else math.nan

    def _powers(self) -> tuple[float, float, float]:
        """Squares: of the mean gradient, of what it would be by chance, and of the noise of a meta-step."""
        noise, means = self.noise.square(), self.gradients.nanmean(1)
        seen = ~noise.isnan()
        if not bool(seen.any()):
            return math.nan, math.nan, math.nan
        counts, windows = (~self.gradients[..., 0].isnan()).sum(1)[seen], int(seen.sum())
        by_chance = float((noise[seen] / counts).sum()) / windows**2
        spread = float(noise[seen].mean()) / self.slots_per_meta_step
        return float(means[seen].mean(0).square().sum()), by_chance, spread


def meta_gradient(subject: Subject) -> MetaGradient:
    """Estimate it for every window and task alone, with the estimator of the run.

    Raises:
        ValueError: if the rule has no φ, or the estimator does not fit the rule or the horizon.
    """
    rule, family, plain = subject.fast_rule, subject.split_family, subject.schedule.plain()
    params = [param for param in subject.rule.parameters() if param.requires_grad]
    if not params:
        raise ValueError("the rule has no φ")
    subject.estimator.check_rule(rule)
    subject.estimator.check_horizons((plain.horizon,))
    subject.estimator.check_teacher(frozenset() if subject.teacher is None else subject.teacher.gives)
    size = sum(param.numel() for param in params)
    shape = plain.windows_per_trajectory, subject.num_tasks, size
    gradients = torch.full(shape, torch.nan, dtype=torch.float64)
    for task in range(subject.num_tasks):
        carry: Carry | None = None
        for place, batch in enumerate(subject.windows(range(task, task + 1), taught=True)):
            carry = begin(rule, batch, carry)
            estimate = subject.estimator(rule, family, carry, batch)
            carry = tree_detach(estimate.rollout.carry)
            assert carry is not None
            flat = _flat_gradient(estimate.surrogate, params)
            if bool(carry.diverged.any()) or not bool(flat.isfinite().all()):
                break
            gradients[place, task] = flat
    starts = range(0, plain.horizon, plain.window)
    return MetaGradient(tuple(starts), gradients, subject.slots_per_meta_step)


def _flat_gradient(surrogate: Tensor, params: list[torch.nn.Parameter]) -> Tensor:
    """∂surrogate/∂φ as one vector; zero where it does not depend on φ."""
    if not surrogate.requires_grad:
        return torch.zeros(sum(param.numel() for param in params), dtype=torch.float64)
    grads = torch.autograd.grad(surrogate, params, allow_unused=True)
    parts = [
        torch.zeros_like(param) if grad is None else grad for param, grad in zip(params, grads, strict=True)
    ]
    return torch.cat([part.flatten().double() for part in parts])
