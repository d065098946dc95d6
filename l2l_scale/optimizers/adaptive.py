"""Hand-designed rules that scale every coordinate by its gradients so far; equal to ``torch.optim``.

Every hyper-parameter is a number or a tensor of shape (S,), one value per slot; defaults are torch's.
All raise ``ValueError`` for a hyper-parameter that is not finite or out of its range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_scale.checks import check_fraction
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.optimizers.hyper import check_not_negative, hyper, per_problem
from l2l_scale.tree import Tree


class AdaGrad(UpdateRule):
    """AdaGrad (Duchi, Hazan, Singer 2011): v ← v + ∇², update = −η ∇ / (√v + ε).

    Args:
        learning_rate: η, not negative.
        epsilon: ε, not negative.
    """

    def __init__(self, learning_rate: float | Tensor = 1e-2, epsilon: float | Tensor = 1e-10) -> None:
        super().__init__()
        self.learning_rate = hyper("learning_rate", learning_rate, check_not_negative)
        self.epsilon = hyper("epsilon", epsilon, check_not_negative)

    def init_state(self, theta: Tensor) -> Tree:
        """The sum of squares v (*, N), zero."""
        return torch.zeros_like(theta)

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step."""
        v = state + grad.square()
        direction = grad / (v.sqrt() + per_problem(self.epsilon, grad))
        return -per_problem(self.learning_rate, grad) * direction, v


class RMSprop(UpdateRule):
    """RMSprop (Tieleman, Hinton 2012): v ← α v + (1 − α) ∇², update = −η ∇ / (√v + ε).

    Args:
        learning_rate: η, not negative.
        decay: α in [0, 1).
        epsilon: ε, not negative.
    """

    def __init__(
        self,
        learning_rate: float | Tensor = 1e-2,
        decay: float | Tensor = 0.99,
        epsilon: float | Tensor = 1e-8,
    ) -> None:
        super().__init__()
        self.learning_rate = hyper("learning_rate", learning_rate, check_not_negative)
        self.decay = hyper("decay", decay, check_fraction)
        self.epsilon = hyper("epsilon", epsilon, check_not_negative)

    def init_state(self, theta: Tensor) -> Tree:
        """The moving average v of squares (*, N), zero."""
        return torch.zeros_like(theta)

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step."""
        v = _moving_average(state, grad.square(), self.decay)
        direction = grad / (v.sqrt() + per_problem(self.epsilon, grad))
        return -per_problem(self.learning_rate, grad) * direction, v


class Adam(UpdateRule):
    """Adam (Kingma, Ba 2015): m and v are moving averages of ∇ and ∇²; update = −η m̂ / (√v̂ + ε).

    Args:
        learning_rate: η, not negative.
        beta1: decay of m, in [0, 1).
        beta2: decay of v, in [0, 1).
        epsilon: ε, not negative.
    """

    def __init__(
        self,
        learning_rate: float | Tensor = 1e-3,
        beta1: float | Tensor = 0.9,
        beta2: float | Tensor = 0.999,
        epsilon: float | Tensor = 1e-8,
    ) -> None:
        super().__init__()
        self.learning_rate = hyper("learning_rate", learning_rate, check_not_negative)
        self.beta1 = hyper("beta1", beta1, check_fraction)
        self.beta2 = hyper("beta2", beta2, check_fraction)
        self.epsilon = hyper("epsilon", epsilon, check_not_negative)

    def init_state(self, theta: Tensor) -> Tree:
        """m, v (*, N) and the number of inner steps (*, 1), all zero."""
        return _adam_state(theta)

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step."""
        direction, state = _adam_direction(grad, state, self.beta1, self.beta2, self.epsilon)
        return -per_problem(self.learning_rate, grad) * direction, state


class AdamW(UpdateRule):
    """Adam with decoupled weight decay (Loshchilov, Hutter 2019): update = −η (m̂ / (√v̂ + ε) + λ θ).

    Args:
        learning_rate: η, not negative.
        beta1: decay of m, in [0, 1).
        beta2: decay of v, in [0, 1).
        epsilon: ε, not negative.
        weight_decay: λ, not negative.
    """

    def __init__(
        self,
        learning_rate: float | Tensor = 1e-3,
        beta1: float | Tensor = 0.9,
        beta2: float | Tensor = 0.999,
        epsilon: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
    ) -> None:
        super().__init__()
        self.learning_rate = hyper("learning_rate", learning_rate, check_not_negative)
        self.beta1 = hyper("beta1", beta1, check_fraction)
        self.beta2 = hyper("beta2", beta2, check_fraction)
        self.epsilon = hyper("epsilon", epsilon, check_not_negative)
        self.weight_decay = hyper("weight_decay", weight_decay, check_not_negative)

    def init_state(self, theta: Tensor) -> Tree:
        """m, v (*, N) and the number of inner steps (*, 1), all zero."""
        return _adam_state(theta)

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step."""
        direction, state = _adam_direction(grad, state, self.beta1, self.beta2, self.epsilon)
        direction = direction + per_problem(self.weight_decay, grad) * theta
        return -per_problem(self.learning_rate, grad) * direction, state


def _adam_state(theta: Tensor) -> Tree:
    zeros = torch.zeros_like(theta)
    return zeros, zeros, torch.zeros_like(theta[..., :1])


def _adam_direction(
    grad: Tensor, state: Tree, beta1: float | Tensor, beta2: float | Tensor, epsilon: float | Tensor
) -> tuple[Tensor, Tree]:
    """m̂ / (√v̂ + ε) and the new state."""
    m, v, inner_step = state
    inner_step = inner_step + 1
    m = _moving_average(m, grad, beta1)
    v = _moving_average(v, grad.square(), beta2)
    m_hat = m / _bias_correction(beta1, inner_step)
    v_hat = v / _bias_correction(beta2, inner_step)
    return m_hat / (v_hat.sqrt() + per_problem(epsilon, grad)), (m, v, inner_step)


def _moving_average(average: Tensor, value: Tensor, decay: float | Tensor) -> Tensor:
    return per_problem(decay, value) * average + per_problem(1 - decay, value) * value


def _bias_correction(decay: float | Tensor, inner_step: Tensor) -> Tensor:
    """1 − decay^t, (*, 1); as written it would lose four digits in float32 while decay^t is near one."""
    rate = torch.as_tensor(decay, dtype=torch.float64).log()
    return -torch.expm1(rate.to(inner_step).unsqueeze(-1) * inner_step)
