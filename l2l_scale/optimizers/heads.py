"""From a network's hidden activation to the update of one coordinate: w·h + b, then one of these."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from l2l_scale.checks import check_positive


class Head(ABC):
    """A map from the network's linear outputs (*, N, size) to updates (*, N). Without parameters."""

    size: int
    """Linear outputs per coordinate."""

    @abstractmethod
    def __call__(self, outputs: Tensor) -> Tensor:
        """The update (*, N)."""


class ScaledLinear(Head):
    """update = scale · o, the paper's head; scale is 0.1 in the paper and 0.01 in the released code."""

    size = 1

    def __init__(self, scale: float = 0.1) -> None:
        check_positive("scale", scale)
        self.scale = scale

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scale · o, (*, N)."""
        return self.scale * outputs.squeeze(-1)


class TanhExp(Head):
    """update = scale · tanh(o₁) · exp(exp_scale · o₂): a bounded direction and a size of its own.

    RNNprop (Lv, Jiang, Li 2017) has the tanh, Metz et al. 2019 the exponential of a second output.
    """

    size = 2

    def __init__(self, scale: float = 0.05, exp_scale: float = 2.0) -> None:
        check_positive("scale", scale)
        check_positive("exp_scale", exp_scale, zero=True)
        self.scale, self.exp_scale = scale, exp_scale

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scale · tanh(o₁) · exp(exp_scale · o₂), (*, N)."""
        direction, size = outputs.unbind(-1)
        return self.scale * direction.tanh() * (self.exp_scale * size).exp()
