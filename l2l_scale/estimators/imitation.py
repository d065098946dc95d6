"""Imitation of a teacher: supervised learning of its updates, as a start for meta-training.

K inner steps of a window, S slots, N coordinates, G parameter groups.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from l2l_scale.checks import check_positive
from l2l_scale.estimators.base import Estimate, GradientEstimator
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.tasks.base import TaskFamily
from l2l_scale.unroll import Carry, Rollout, WindowBatch


class Imitation(GradientEstimator):
    """Σ_k mean_g log(1 + r_kg) along the teacher's way, r_kg = ‖update − teacher's‖² / (‖teacher's‖² + ε).

    The rule sees the gradients at the points that the teacher passed and is to do what the teacher did there:
    behaviour cloning, which gives a rule from which meta-training starts well (Chen et al. 2020, "Training
    stronger baselines for learning to optimize", section 4.2). Losses in metrics are the teacher's. Needs
    ``data.teacher`` and ``data.teacher_iterates``.

    r_kg is the relative error in inner step k of parameter group g (conv, norm, linear, …): 0 is perfect, 1
    is what a rule without updates has. Over all groups at once, those with the longest updates would hide
    the others, which may matter as much. Without the logarithm, steps in which the teacher hardly moves a
    group would count for more than all others: the first gradients of batch norm's scales are a hundredth of
    later ones, and r_kg was still above 50 there when learning had ended.

    Args:
        epsilon: keeps steps of a teacher that has arrived from counting infinitely.

    Raises:
        ValueError: if epsilon is not a finite number above 0.
    """

    def __init__(self, epsilon: float = 1e-12) -> None:
        check_positive("epsilon", epsilon)
        self.epsilon = epsilon

    def check_teacher(self, gives: frozenset[str]) -> None:
        """Raise ``ValueError`` if there is no teacher, or only its losses are known."""
        if "theta" not in gives:
            raise ValueError(
                "Imitation needs the points that a teacher passed: give data.teacher, an optimizer with the "
                "hyper-parameters that l2l-scale tune finds, and data.teacher_iterates=true"
            )

    def __call__(self, rule: UpdateRule, family: TaskFamily, carry: Carry, batch: WindowBatch) -> Estimate:
        """The mean over slots; where the teacher diverged nothing is learned."""
        errors, rollout = self.relative_errors(rule, family, carry, batch)
        total = torch.zeros_like(rollout.carry.start_loss)
        for error in errors:
            total = total + error.log1p().mean(0)
        return Estimate(total.masked_fill(rollout.carry.diverged, 0.0).mean(), rollout)

    def relative_errors(
        self, rule: UpdateRule, family: TaskFamily, carry: Carry, batch: WindowBatch
    ) -> tuple[Tensor, Rollout]:
        """The r_kg of a window, (K, G, S), groups in the order of the family's spec, and how it went.

        Where the teacher diverged, which the carry says, they mean nothing.
        """
        points = batch.teacher["theta"]
        losses, grads = _along(family, points, batch)
        lost = ~(points.isfinite().all(0).all(-1) & grads.isfinite().all(0).all(-1))
        points = points.masked_fill(lost[:, None], 0.0)
        grads = grads.masked_fill(lost[:, None], 0.0)
        groups = family.spec.groups.values()
        errors, update = [], torch.zeros_like(points[0])
        state = rule.open_window(points[0], carry.state)
        for k in range(batch.window_length):
            update, state = rule(grads[k], points[k], state)
            errors.append(self._relative(update, points[k + 1] - points[k], groups))
        state = rule.close_window(points[-1], state)
        start_loss = torch.where(carry.start_loss.isnan(), losses[0], carry.start_loss)
        end = Carry(points[-1], state, start_loss, lost)
        return torch.stack(errors), Rollout(end, losses[1:], update.detach().square().mean(-1).sqrt())

    def _relative(self, update: Tensor, target: Tensor, groups: Iterable[tuple[slice, ...]]) -> Tensor:
        """‖update − target‖² / (‖target‖² + ε) of every group, (G, S)."""
        errors, sizes = (update - target).square(), target.square()
        return torch.stack([_sum(errors, group) / (_sum(sizes, group) + self.epsilon) for group in groups])


def _sum(values: Tensor, ranges: tuple[slice, ...]) -> Tensor:
    """The sum over these ranges of coordinates."""
    return torch.cat([values[..., part] for part in ranges], dim=-1).sum(-1)


def _along(family: TaskFamily, points: Tensor, batch: WindowBatch) -> tuple[Tensor, Tensor]:
    """Losses (K + 1, S) and gradients (K + 1, S, N) at the teacher's points, on the window's minibatches."""
    found = [
        family.losses_and_gradients(
            point, batch.task, {name: leaf[k] for name, leaf in batch.data.items()}, create_graph=False
        )
        for k, point in enumerate(points)
    ]
    return torch.stack([loss for loss, _ in found]), torch.stack([grad for _, grad in found])
