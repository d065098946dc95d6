"""What a fused kernel needs to know of a rule, in numbers: layer sizes, codes of features and head.

The C++ mirror is ``cpp/program.h``; the rows of the packed state are those of :mod:`layout`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, cast

import torch
from torch import Tensor

from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.optimizers.cells import LSTMCell
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
from l2l_scale.optimizers.heads import Head, ScaledLinear, TanhExp

MAX_HIDDEN, MAX_LAYERS, MAX_FEATURES = 64, 3, 16


class UnsupportedRuleError(ValueError):
    """No fused kernel computes this rule; says why."""


class FeatureKind(IntEnum):
    """Codes of the features."""

    IDENTITY = 0
    LOG_SIGN = 1
    LOG_SIGN_CLAMP = 2
    LOG_MAGNITUDE = 3
    RNNPROP = 4
    INNER_STEP = 5


class HeadKind(IntEnum):
    """Codes of the heads."""

    SCALED_LINEAR = 0
    TANH_EXP = 1


class FeatureCode(NamedTuple):
    """One elementary feature."""

    kind: FeatureKind
    size: int
    """Outputs per coordinate."""
    numbers: tuple[float, float, float]
    """Its settings in the order of its constructor: (scale), (p), (k), (p, limit), (β1, β2, ε), (τ)."""
    state_rows: int = 0
    """Rows of the packed state."""
    log_scale: bool = False
    """RNNprop: whether the third output is there."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A coordinatewise LSTM in numbers."""

    hidden_size: int
    layers: int
    features: tuple[FeatureCode, ...]
    head: HeadKind
    scale: float
    exp_scale: float

    @property
    def feature_size(self) -> int:
        """F, all features' outputs."""
        return sum(feature.size for feature in self.features)

    @property
    def feature_rows(self) -> int:
        """Rows of the packed state that belong to features; they come first."""
        return sum(feature.state_rows for feature in self.features)

    @property
    def state_rows(self) -> int:
        """R: the features' rows, then h and c of every layer, from the bottom."""
        return self.feature_rows + 2 * self.layers * self.hidden_size

    @property
    def head_size(self) -> int:
        """Linear outputs per coordinate."""
        return 2 if self.head is HeadKind.TANH_EXP else 1


def program_of(rule: UpdateRule) -> Program:
    """Describe a rule.

    Raises:
        UnsupportedRuleError: if it is not a :class:`CoordinatewiseLSTM` of the sizes, features and head that
            kernels know. Subclasses may compute anything, so they are not taken.
    """
    if type(rule) is not CoordinatewiseLSTM:
        raise UnsupportedRuleError(f"{type(rule).__name__} has no fused kernel, only CoordinatewiseLSTM has")
    if rule.sharing is not None:
        raise UnsupportedRuleError(
            "global averaging cells are in no fused kernel: it computes block after block of coordinates, "
            "and a mean over all of them stands between two layers"
        )
    if rule.hidden_size > MAX_HIDDEN or rule.layers > MAX_LAYERS:
        raise UnsupportedRuleError(
            f"hidden_size ({rule.hidden_size}) and layers ({rule.layers}) must be <= {MAX_HIDDEN} and "
            f"<= {MAX_LAYERS} for a fused kernel"
        )
    features = tuple(_feature_codes(rule.features))
    if len(features) > MAX_FEATURES:
        raise UnsupportedRuleError(
            f"{len(features)} features are more than the {MAX_FEATURES} of a fused kernel"
        )
    head, scale, exp_scale = _head_code(rule.head)
    return Program(
        hidden_size=rule.hidden_size,
        layers=rule.layers,
        features=features,
        head=head,
        scale=scale,
        exp_scale=exp_scale,
    )


def flat_weights(rule: CoordinatewiseLSTM) -> Tensor:
    """φ as one flat tensor, differentiable.

    Per layer: weight_input (4H, I), weight_hidden (4H, H), bias (4H); then the output layer's weight (O, H)
    and bias (O).
    """
    cells = cast("Iterable[LSTMCell]", rule.network.cells)
    parts = [part for cell in cells for part in (cell.weight_input, cell.weight_hidden, cell.bias)]
    return torch.cat([part.reshape(-1) for part in (*parts, rule.output.weight, rule.output.bias)])


def _feature_codes(feature: Feature) -> Iterator[FeatureCode]:
    """The elementary features in order."""
    kind = type(feature)
    if kind is Concatenate:
        for part in cast("Iterable[Feature]", cast("Concatenate", feature).parts):
            yield from _feature_codes(part)
    elif isinstance(feature, Identity) and kind is Identity:
        yield FeatureCode(FeatureKind.IDENTITY, 1, (feature.scale, 0.0, 0.0))
    elif isinstance(feature, LogSign) and kind is LogSign:
        yield FeatureCode(FeatureKind.LOG_SIGN, 2, (feature.p, 0.0, 0.0))
    elif isinstance(feature, LogSignClamp) and kind is LogSignClamp:
        yield FeatureCode(FeatureKind.LOG_SIGN_CLAMP, 2, (feature.k, 0.0, 0.0))
    elif isinstance(feature, LogMagnitude) and kind is LogMagnitude:
        yield FeatureCode(FeatureKind.LOG_MAGNITUDE, 1, (feature.p, feature.limit, 0.0))
    elif isinstance(feature, RNNprop) and kind is RNNprop:
        numbers = (feature.beta1, feature.beta2, feature.epsilon)
        yield FeatureCode(FeatureKind.RNNPROP, feature.size, numbers, 3, feature.log_scale)
    elif isinstance(feature, InnerStep) and kind is InnerStep:
        yield FeatureCode(FeatureKind.INNER_STEP, 1, (feature.timescale, 0.0, 0.0), 1)
    else:
        raise UnsupportedRuleError(f"the feature {kind.__name__} is in no fused kernel")


def _head_code(head: Head) -> tuple[HeadKind, float, float]:
    """Code, scale and exp_scale of a head."""
    if isinstance(head, ScaledLinear) and type(head) is ScaledLinear:
        return HeadKind.SCALED_LINEAR, head.scale, 0.0
    if isinstance(head, TanhExp) and type(head) is TanhExp:
        return HeadKind.TANH_EXP, head.scale, head.exp_scale
    raise UnsupportedRuleError(f"the head {type(head).__name__} is in no fused kernel")
