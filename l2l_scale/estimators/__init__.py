"""Gradient estimators: from windows of inner steps to meta-gradients (floor 3)."""

from l2l_scale.estimators.base import Estimate, GradientEstimator
from l2l_scale.estimators.bptt import TruncatedBPTT
from l2l_scale.estimators.imitation import Imitation
from l2l_scale.estimators.objectives import (
    LastLoss,
    LogLoss,
    MetaLoss,
    NormalizedLoss,
    RelativeLoss,
    SumLoss,
)

__all__ = [
    "Estimate",
    "GradientEstimator",
    "Imitation",
    "LastLoss",
    "LogLoss",
    "MetaLoss",
    "NormalizedLoss",
    "RelativeLoss",
    "SumLoss",
    "TruncatedBPTT",
]
