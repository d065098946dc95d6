"""The interface of a gradient estimator: from a window of inner steps to a gradient for φ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.tasks.base import TaskFamily
from l2l_scale.unroll import Carry, Rollout, WindowBatch


class Estimate(NamedTuple):
    """One window's contribution to the meta-gradient."""

    surrogate: Tensor
    """A scalar: its value is the meta-loss, its derivative the estimate of the meta-gradient."""
    rollout: Rollout
    """The window itself, for metrics and for the next window's start."""


class GradientEstimator(ABC):
    """Estimates the meta-gradient from one window.

    The result is a scalar whose ``backward()`` gives the gradient, never ``.grad`` assigned by hand: so
    DDP's all-reduce, clipping and accumulation work for every estimator.
    """

    def check_horizons(self, horizons: Sequence[int]) -> None:  # noqa: B027 - most take any horizon
        """Raise ``ValueError`` if this estimator was made for other horizons than a run's."""

    def check_rule(self, rule: UpdateRule) -> None:  # noqa: B027 - most estimators take any rule
        """Raise ``ValueError`` if this estimator cannot work with a rule as it will be computed."""

    def check_teacher(self, gives: frozenset[str]) -> None:  # noqa: B027 - most need none
        """Raise ``ValueError`` if this estimator needs of a teacher what a run's does not give.

        Args:
            gives: names of what there is; none without a teacher.
        """

    @abstractmethod
    def __call__(self, rule: UpdateRule, family: TaskFamily, carry: Carry, batch: WindowBatch) -> Estimate:
        """Unroll the window from ``carry`` (see :func:`l2l_scale.unroll.begin`)."""
