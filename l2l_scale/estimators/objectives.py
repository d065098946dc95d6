"""Meta-losses: what a trajectory of losses is worth. Lower is better.

K inner steps of a window, S slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from l2l_scale.checks import check_positive
from l2l_scale.tasks.base import Tensors
from l2l_scale.unroll import WindowBatch


class MetaLoss(ABC):
    """The value of one window of losses, per slot. The sum over a trajectory's windows is the whole.

    Args:
        weights: one number per inner step 1 … T of the horizon; all 1 if not given (the paper's choice).
        growth: p of weights (1 + p)·(t/T)^p for any horizon, about 1 on average. Losses far above what can be
            reached outweigh those of late steps, where an optimizer has to be better than another one.

    Raises:
        ValueError: if a weight is negative or none is positive, if growth is negative, or both are given.
    """

    def __init__(self, weights: Sequence[float] | None = None, growth: float = 0.0) -> None:
        for step, weight in enumerate(weights or ()):
            check_positive(f"weights[{step}]", weight, zero=True)
        if weights is not None and not any(weights):
            raise ValueError(f"weights ({list(weights)}) must have at least one number > 0")
        check_positive("growth", growth, zero=True)
        if weights is not None and growth:
            raise ValueError(
                f"growth ({growth}) must be 0 where weights are given: it makes weights; leave out one"
            )
        self.weights = None if weights is None else tuple(weights)
        self.growth = growth

    @abstractmethod
    def transform(self, losses: Tensor, start_loss: Tensor, teacher: Tensors) -> Tensor:
        """What each loss counts for, (K, S).

        Args:
            losses: f(θ_1) … f(θ_K), (K, S).
            start_loss: loss at the start of the trajectory, (S,).
            teacher: what a teacher did in the same inner steps, if there is one: "losses" (K, S).
        """

    def check_teacher(self, gives: frozenset[str]) -> None:  # noqa: B027 - most need none
        """Raise ``ValueError`` if the meta-loss compares with a teacher and none is given."""

    def check_horizons(self, horizons: Sequence[int]) -> None:
        """Raise ``ValueError`` if weights were given for another horizon than those of the trajectories."""
        for horizon in horizons:
            if self.weights is not None and len(self.weights) != horizon:
                raise ValueError(
                    f"weights ({len(self.weights)} numbers) must have one number per inner step of the "
                    f"horizon ({horizon})"
                )

    def step_weights(self, steps: Tensor, horizon: Tensor) -> Tensor | None:
        """Weights (K, S) of the losses after ``steps`` (K, S) = 0 … T − 1; None where all are 1.

        Args:
            steps: inner steps, counted from 0 in each slot's trajectory.
            horizon: (S,) T.
        """
        if self.growth:
            return (1 + self.growth) * ((steps + 1) / horizon.double()) ** self.growth
        if self.weights is None:
            return None
        return torch.tensor(self.weights, dtype=torch.float64, device=steps.device)[steps]

    def __call__(self, losses: Tensor, start_loss: Tensor, window: WindowBatch) -> Tensor:
        """The window's meta-loss per slot, (S,).

        Args:
            losses: f(θ_1) … f(θ_K), (K, S).
            start_loss: loss at the start of the trajectory, (S,).
            window: where in their trajectories the slots are, and what a teacher did there.
        """
        values = self.transform(losses, start_loss, window.teacher)
        inner_step = window.inner_step
        steps = inner_step + torch.arange(len(losses), device=inner_step.device)[:, None]
        weights = self.step_weights(steps, window.horizon)
        return values.sum(0) if weights is None else (values * weights.to(values)).sum(0)


class SumLoss(MetaLoss):
    """Σ_t w_t f(θ_t), Andrychowicz et al. 2016, equation 3."""

    def transform(self, losses: Tensor, start_loss: Tensor, teacher: Tensors) -> Tensor:
        """The losses themselves."""
        return losses


class LastLoss(MetaLoss):
    """f(θ_T) alone: what a user of the optimizer sees, but a signal in the last window only."""

    def __init__(self) -> None:
        super().__init__()

    def step_weights(self, steps: Tensor, horizon: Tensor) -> Tensor:
        """Zero but for the last inner step."""
        return steps == horizon - 1

    def transform(self, losses: Tensor, start_loss: Tensor, teacher: Tensors) -> Tensor:
        """The losses themselves."""
        return losses


class _WithEpsilon(MetaLoss, ABC):
    """A meta-loss with an ε that keeps it finite."""

    def __init__(
        self, weights: Sequence[float] | None = None, epsilon: float = 1e-8, growth: float = 0.0
    ) -> None:
        super().__init__(weights, growth)
        check_positive("epsilon", epsilon)
        self.epsilon = epsilon


class LogLoss(_WithEpsilon):
    """Σ_t w_t log(f(θ_t) + ε): every order of magnitude counts alike (Wichrowska et al. 2017)."""

    def transform(self, losses: Tensor, start_loss: Tensor, teacher: Tensors) -> Tensor:
        """log(f + ε); losses must not be negative."""
        return (losses + self.epsilon).log()


class NormalizedLoss(_WithEpsilon):
    """Σ_t w_t f(θ_t) / (|f(θ_0)| + ε): tasks of any scale count alike."""

    def transform(self, losses: Tensor, start_loss: Tensor, teacher: Tensors) -> Tensor:
        """f / |f(θ_0)|."""
        return losses / (start_loss.abs() + self.epsilon)


class RelativeLoss(_WithEpsilon):
    """Σ_t w_t f(θ_t) / (|f(θ_t of the teacher)| + ε): below 1 is better than the teacher at that inner step.

    Where NormalizedLoss asks for progress, this asks for more progress than a tuned optimizer makes on that
    very task, so that hard and easy tasks, and families, count alike. Needs ``data.teacher``. A slot that
    diverged starts again in the middle of the teacher's trajectory, and is measured by that until its next
    task.
    """

    def check_teacher(self, gives: frozenset[str]) -> None:
        """Raise ``ValueError`` if there is none."""
        if "losses" not in gives:
            raise ValueError(
                "RelativeLoss compares with a teacher: give data.teacher, an optimizer with the "
                "hyper-parameters that l2l-scale tune finds, or take NormalizedLoss"
            )

    def transform(self, losses: Tensor, start_loss: Tensor, teacher: Tensors) -> Tensor:
        """f / |f of the teacher|."""
        return losses / (teacher["losses"].abs() + self.epsilon)
