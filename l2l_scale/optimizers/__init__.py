"""Update rules, learned and hand-designed (floor 1)."""

from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.optimizers.coordinatewise import CoordinatewiseLSTM
from l2l_scale.optimizers.features import Concatenate, Identity, LogMagnitude, LogSign, LogSignClamp, RNNprop
from l2l_scale.optimizers.heads import ScaledLinear, TanhExp

__all__ = [
    "Concatenate",
    "CoordinatewiseLSTM",
    "Identity",
    "LogMagnitude",
    "LogSign",
    "LogSignClamp",
    "RNNprop",
    "ScaledLinear",
    "TanhExp",
    "UpdateRule",
]
