"""Meta-losses: what a trajectory of losses is worth. Lower is better.

K inner steps of a window, S slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from l2l_scale.checks import check_positive


class MetaLoss(ABC):
    """The value of one window of losses, per slot. The sum over a trajectory's windows is the whole.

    Args:
        weights: one number per inner step 1 … T of the horizon; all 1 if not given (the paper's choice).
    """

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        for step, weight in enumerate(weights or ()):
            check_positive(f"weights[{step}]", weight, zero=True)
        if weights is not None and not any(weights):
            raise ValueError(f"weights ({list(weights)}) must have at least one number > 0")
        self.weights = None if weights is None else tuple(weights)

    @abstractmethod
    def transform(self, losses: Tensor, start_loss: Tensor) -> Tensor:
        """What each loss counts for, (K, S), given losses (K, S) and the trajectories' first losses (S,)."""

    def step_weights(self, horizon: int) -> tuple[float, ...] | None:
        """One weight per inner step of the horizon; None where all are 1.

        Raises:
            ValueError: if weights were given for another horizon.
        """
        if self.weights is not None and len(self.weights) != horizon:
            raise ValueError(
                f"weights ({len(self.weights)} numbers) must have one number per inner step of the horizon "
                f"({horizon})"
            )
        return self.weights

    def __call__(self, losses: Tensor, start_loss: Tensor, inner_step: Tensor, horizon: int) -> Tensor:
        """The window's meta-loss per slot, (S,).

        Args:
            losses: f(θ_1) … f(θ_K), (K, S).
            start_loss: loss at the start of the trajectory, (S,).
            inner_step: (S,) where in its trajectory each slot stood before the window.
            horizon: T.
        """
        values = self.transform(losses, start_loss)
        weights = self.step_weights(horizon)
        if weights is None:
            return values.sum(0)
        steps = inner_step + torch.arange(len(losses), device=inner_step.device)[:, None]
        return (values * values.new_tensor(weights)[steps]).sum(0)


class SumLoss(MetaLoss):
    """Σ_t w_t f(θ_t), Andrychowicz et al. 2016, equation 3."""

    def transform(self, losses: Tensor, start_loss: Tensor) -> Tensor:
        """The losses themselves."""
        return losses


class LastLoss(MetaLoss):
    """f(θ_T) alone: what a user of the optimizer sees, but a signal in the last window only."""

    def __init__(self) -> None:
        super().__init__()

    def step_weights(self, horizon: int) -> tuple[float, ...]:
        """Zero but for the last inner step."""
        return (*[0.0] * (horizon - 1), 1.0)

    def transform(self, losses: Tensor, start_loss: Tensor) -> Tensor:
        """The losses themselves."""
        return losses


class LogLoss(MetaLoss):
    """Σ_t w_t log(f(θ_t) + ε): every order of magnitude counts alike (Wichrowska et al. 2017)."""

    def __init__(self, weights: Sequence[float] | None = None, epsilon: float = 1e-8) -> None:
        super().__init__(weights)
        check_positive("epsilon", epsilon)
        self.epsilon = epsilon

    def transform(self, losses: Tensor, start_loss: Tensor) -> Tensor:
        """log(f + ε); losses must not be negative."""
        return (losses + self.epsilon).log()


class NormalizedLoss(MetaLoss):
    """Σ_t w_t f(θ_t) / (|f(θ_0)| + ε): tasks of any scale count alike."""

    def __init__(self, weights: Sequence[float] | None = None, epsilon: float = 1e-8) -> None:
        super().__init__(weights)
        check_positive("epsilon", epsilon)
        self.epsilon = epsilon

    def transform(self, losses: Tensor, start_loss: Tensor) -> Tensor:
        """f / |f(θ_0)|."""
        return losses / (start_loss.abs() + self.epsilon)
