"""Hand-designed rules with one step length for all coordinates; equal to ``torch.optim`` where it has them.

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


class SGD(UpdateRule):
    """Gradient descent: update = −η ∇.

    Args:
        learning_rate: η, not negative.
    """

    def __init__(self, learning_rate: float | Tensor = 1e-3) -> None:
        super().__init__()
        self.learning_rate = hyper("learning_rate", learning_rate, check_not_negative)

    def init_state(self, theta: Tensor) -> Tree:
        """Nothing."""
        return ()

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step."""
        return -per_problem(self.learning_rate, grad) * grad, state


class HeavyBall(UpdateRule):
    """Momentum (Polyak 1964), as ``torch.optim.SGD(momentum=μ)``: v ← μ v + ∇, update = −η v.

    Args:
        learning_rate: η, not negative.
        momentum: μ in [0, 1).
    """

    def __init__(self, learning_rate: float | Tensor = 1e-3, momentum: float | Tensor = 0.9) -> None:
        super().__init__()
        self.learning_rate = hyper("learning_rate", learning_rate, check_not_negative)
        self.momentum = hyper("momentum", momentum, check_fraction)

    def init_state(self, theta: Tensor) -> Tree:
        """The velocity v (*, N), zero."""
        return torch.zeros_like(theta)

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step."""
        velocity = per_problem(self.momentum, grad) * state + grad
        return -per_problem(self.learning_rate, grad) * velocity, velocity


class Nesterov(UpdateRule):
    """Nesterov's accelerated gradient, as ``torch.optim.SGD(momentum=μ, nesterov=True)``.

    v ← μ v + ∇, update = −η (∇ + μ v) (Sutskever et al. 2013, with θ at the point looked ahead to).

    Args:
        learning_rate: η, not negative.
        momentum: μ in [0, 1).
    """

    def __init__(self, learning_rate: float | Tensor = 1e-3, momentum: float | Tensor = 0.9) -> None:
        super().__init__()
        self.learning_rate = hyper("learning_rate", learning_rate, check_not_negative)
        self.momentum = hyper("momentum", momentum, check_fraction)

    def init_state(self, theta: Tensor) -> Tree:
        """The velocity v (*, N), zero."""
        return torch.zeros_like(theta)

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step."""
        momentum = per_problem(self.momentum, grad)
        velocity = momentum * state + grad
        return -per_problem(self.learning_rate, grad) * (grad + momentum * velocity), velocity


class BarzilaiBorwein(UpdateRule):
    """Gradient descent with the second step length of Barzilai and Borwein 1988 (BB2).

    update = −η ∇ with η = sᵀy / yᵀy, where s and y are the last changes of θ and ∇. The sums run over the
    coordinates of one problem. Where the curvature sᵀy is not positive, or the quotient not finite, as in
    the first inner step, η is the given learning rate.

    Args:
        learning_rate: of the first inner step and of the fallback, not negative.
    """

    def __init__(self, learning_rate: float | Tensor = 1e-3) -> None:
        super().__init__()
        self.learning_rate = hyper("learning_rate", learning_rate, check_not_negative)

    def init_state(self, theta: Tensor) -> Tree:
        """θ (*, N), which makes the first s zero, and a gradient of zeros (*, N)."""
        return theta, torch.zeros_like(theta)

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step."""
        s, y = theta - state[0], grad - state[1]
        curvature = (s * y).sum(-1, keepdim=True)
        quotient = curvature / y.square().sum(-1, keepdim=True)
        usable = (curvature > 0) & quotient.isfinite()
        rate = torch.where(usable, quotient, per_problem(self.learning_rate, grad))
        return -rate * grad, (theta, grad)
