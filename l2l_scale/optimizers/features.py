"""What a learned rule sees of a gradient: parts that can be combined.

Gradients span many orders of magnitude and networks like inputs near one. Every feature maps a gradient
(*, N) to (*, N, F), coordinate by coordinate, and may keep a state such as moving averages.
All are differentiable in the gradient without NaN at zero, as the true meta-gradient needs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from l2l_scale.checks import check_fraction, check_positive, check_range
from l2l_scale.tree import Tree

_TINY = 1e-30  # keeps logarithms and square roots, and their derivatives, finite in float32
_MAX_EXPONENT = 80.0  # e^p must be finite in float32


class Feature(nn.Module, ABC):
    """A map from a gradient (*, N) to features (*, N, size)."""

    size: int
    """F, the number of features per coordinate."""

    def init_state(self, theta: Tensor) -> Tree:
        """State before the first inner step at ``theta`` (*, N); most features have none."""
        return ()

    @abstractmethod
    def forward(self, grad: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """Features (*, N, F) of a gradient (*, N), and the new state."""


class Identity(Feature):
    """The gradient itself, times ``scale``: the paper's input for quadratics."""

    size = 1

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        check_positive("scale", scale)
        self.scale = scale

    def forward(self, grad: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """scale · ∇, as (*, N, 1)."""
        return (self.scale * grad).unsqueeze(-1), state


class LogSign(Feature):
    """The paper's preprocessing (Andrychowicz et al. 2016, appendix A), in two branches.

    (log|∇|/p, sgn ∇) where |∇| >= e^-p, else (−1, e^p ∇).
    """

    size = 2

    def __init__(self, p: float = 10.0) -> None:
        super().__init__()
        check_range("p", p, 1e-3, _MAX_EXPONENT)
        self.p = p

    def forward(self, grad: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """(log magnitude, sign), as (*, N, 2)."""
        threshold = math.exp(-self.p)
        magnitude = grad.abs()
        large = magnitude >= threshold
        log = magnitude.clamp(min=threshold).log() / self.p  # −1 below the threshold, by continuity
        sign = torch.where(large, grad.sign(), grad * math.exp(self.p))
        return torch.stack((log, sign), dim=-1), state


class LogSignClamp(Feature):
    """The preprocessing of the authors' released code.

    (max(log(|∇| + ε)/k, −1), clamp(e^k ∇, −1, 1)), k = 5 there.
    """

    size = 2

    def __init__(self, k: float = 5.0) -> None:
        super().__init__()
        check_range("k", k, 1e-3, _MAX_EXPONENT)
        self.k = k

    def forward(self, grad: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """(log magnitude, clamped sign), as (*, N, 2)."""
        log = (grad.abs() + torch.finfo(grad.dtype).eps).log() / self.k
        sign = grad * math.exp(self.k)
        return torch.stack((log.clamp(min=-1.0), sign.clamp(-1.0, 1.0)), dim=-1), state


class LogMagnitude(Feature):
    """log|∇|/p, clamped to [−limit, limit]: the size of the gradient without its sign."""

    size = 1

    def __init__(self, p: float = 10.0, limit: float = 2.0) -> None:
        super().__init__()
        check_positive("p", p)
        check_positive("limit", limit)
        self.p, self.limit = p, limit

    def forward(self, grad: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """log|∇|/p, as (*, N, 1)."""
        log = grad.abs().clamp(min=_TINY).log() / self.p
        return log.clamp(-self.limit, self.limit).unsqueeze(-1), state


class RNNprop(Feature):
    """The inputs of RNNprop (Lv, Jiang, Li 2017, section 4): m̂/√v̂ and ∇/√v̂.

    m and v are moving averages of ∇ and ∇², with Adam's bias correction; but for ε, these two inputs do not
    change when the loss is multiplied by a constant. With ``log_scale`` the size itself is a third feature.

    Args:
        beta1: decay of m.
        beta2: decay of v.
        epsilon: added to √v̂.
        log_scale: append log √v̂ / 10, clamped to [−2, 2].
    """

    def __init__(
        self, beta1: float = 0.95, beta2: float = 0.95, epsilon: float = 1e-8, log_scale: bool = False
    ) -> None:
        super().__init__()
        check_fraction("beta1", beta1)
        check_fraction("beta2", beta2)
        check_positive("epsilon", epsilon)
        self.beta1, self.beta2, self.epsilon, self.log_scale = beta1, beta2, epsilon, log_scale
        self.size = 3 if log_scale else 2

    def init_state(self, theta: Tensor) -> Tree:
        """m, v (*, N) and the step count (*, 1), all zero."""
        zeros = torch.zeros_like(theta)
        return zeros, zeros, torch.zeros_like(theta[..., :1])

    def forward(self, grad: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """(m̂/√v̂, ∇/√v̂[, log √v̂/10]), as (*, N, F)."""
        m, v, step = state
        step = step + 1
        m = self.beta1 * m + (1 - self.beta1) * grad
        v = self.beta2 * v + (1 - self.beta2) * grad.square()
        # √ has an infinite slope at zero, and ∞ · 0 is NaN in the true meta-gradient: hence the clamp.
        root = (v / _bias_correction(self.beta2, step)).clamp(min=_TINY).sqrt()
        scale = 1 / (root + self.epsilon)
        parts = [m / _bias_correction(self.beta1, step) * scale, grad * scale]
        if self.log_scale:
            parts.append((root.log() / 10).clamp(-2, 2))
        return torch.stack(parts, dim=-1), (m, v, step)


class InnerStep(Feature):
    """tanh(t/τ − 1), where t = 0, 1, … is the number of inner steps before: how far training has come.

    From −0.76 at the start to 1 long after τ steps. Several of them, with other τ, tell the time on all
    scales, as in Metz et al. 2020 ("Tasks, stability, architecture, and compute to train learned
    optimizers", where features are listed). Rules that see it can learn a schedule; they then expect
    trainings as long as those that they were meta-trained on.

    Args:
        timescale: τ, in inner steps.
    """

    size = 1

    def __init__(self, timescale: float = 100.0) -> None:
        super().__init__()
        check_positive("timescale", timescale)
        self.timescale = timescale

    def init_state(self, theta: Tensor) -> Tree:
        """t (*, 1), zero."""
        return torch.zeros_like(theta[..., :1])

    def forward(self, grad: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """tanh(t/τ − 1), as (*, N, 1)."""
        time = (state / self.timescale - 1).tanh()
        return time.expand(grad.shape).unsqueeze(-1), state + 1


def _bias_correction(decay: float, step: Tensor) -> Tensor:
    """1 − decay^t; as written it would lose digits while decay^t is near one."""
    rate = math.log(decay) if decay > 0 else -math.inf
    return -torch.expm1(rate * step)


class Concatenate(Feature):
    """Several features side by side."""

    def __init__(self, parts: Sequence[Feature]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("parts ([]) must name at least one feature")
        self.parts = nn.ModuleList(parts)
        self.size = sum(part.size for part in parts)

    def _parts(self) -> Iterable[Feature]:
        return cast("Iterable[Feature]", self.parts)

    def init_state(self, theta: Tensor) -> Tree:
        """The states of the parts."""
        return tuple(part.init_state(theta) for part in self._parts())

    def forward(self, grad: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """The features of the parts, in order."""
        results = [part(grad, own) for part, own in zip(self._parts(), state, strict=True)]
        features, states = zip(*results, strict=True)
        return torch.cat(features, dim=-1), states
