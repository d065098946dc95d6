"""Update rules, learned and hand-designed (floor 1)."""

from l2l_scale.optimizers.adaptive import AdaGrad, Adam, AdamW, RMSprop
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.optimizers.cells import GlobalAveraging
from l2l_scale.optimizers.classic import SGD, BarzilaiBorwein, HeavyBall, Nesterov
from l2l_scale.optimizers.coordinatewise import CoordinatewiseLSTM
from l2l_scale.optimizers.features import (
    Concatenate,
    Feature,
    Identity,
    InnerStep,
    LogMagnitude,
    LogSign,
    LogSignClamp,
    RNNprop,
)
from l2l_scale.optimizers.grouped import Grouped
from l2l_scale.optimizers.heads import Head, ScaledLinear, TanhExp
from l2l_scale.optimizers.recurrent import CoordinatewiseGRU, CoordinatewiseRNN
from l2l_scale.optimizers.schedules import CosineSchedule, ExponentialSchedule, RateSchedule, Scheduled
from l2l_scale.optimizers.shared_memory import SharedMemory
from l2l_scale.optimizers.steered_memory import SteeredMemory

__all__ = [
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "BarzilaiBorwein",
    "Concatenate",
    "CoordinatewiseGRU",
    "CoordinatewiseLSTM",
    "CoordinatewiseRNN",
    "CosineSchedule",
    "ExponentialSchedule",
    "Feature",
    "GlobalAveraging",
    "Grouped",
    "Head",
    "HeavyBall",
    "Identity",
    "InnerStep",
    "LogMagnitude",
    "LogSign",
    "LogSignClamp",
    "Nesterov",
    "RMSprop",
    "RNNprop",
    "RateSchedule",
    "ScaledLinear",
    "Scheduled",
    "SharedMemory",
    "SteeredMemory",
    "TanhExp",
    "UpdateRule",
]
