"""Start points of networks, as people initialise them."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import numpy as np

from l2l_scale.flat import FlatSpec, Segment

Initialisation: TypeAlias = Literal["normal", "torch", "xavier", "he"]
"""Described in :class:`~l2l_scale.tasks.image_family.ImageFamily`; normal is that of the released code of
Andrychowicz et al. 2016. Inputs and outputs of a convolution are counted with its kernel's area."""


def check_initialisation(value: str) -> None:
    """Raise ``ValueError`` unless there is such an initialisation."""
    names = get_args(Initialisation)
    if value not in names:
        raise ValueError(f"initialisation ({value!r}) must be one of {', '.join(names)}")


def draw_start(
    rng: np.random.Generator, spec: FlatSpec, initialisation: Initialisation, normal_scale: float
) -> np.ndarray:
    """Draw θ0 (N,) of a network whose every weight is followed by its bias, if it has one.

    Args:
        rng: where from.
        spec: the network's parameters: weights (outputs, inputs, ...), biases, and those of group "norm".
        initialisation: how.
        normal_scale: σ of "normal".
    """
    parts, weight = [], spec.segments[0]
    for segment in spec.segments:
        if segment.group == "norm":
            parts.append(np.full(segment.size, float(segment.name.endswith("weight"))))
        elif initialisation == "normal":
            parts.append(normal_scale * rng.standard_normal(segment.size))
        else:
            weight = segment if len(segment.shape) > 1 else weight
            parts.append(_draw_segment(rng, segment, weight, initialisation))
    return np.concatenate(parts)


def _draw_segment(
    rng: np.random.Generator, segment: Segment, weight: Segment, initialisation: Initialisation
) -> np.ndarray:
    """Start values of a weight, or of the bias that belongs to it."""
    inputs = math.prod(weight.shape[1:])
    if initialisation == "torch":
        bound = 1 / math.sqrt(inputs)
        return rng.uniform(-bound, bound, segment.size)
    if segment is not weight:
        return np.zeros(segment.size)
    if initialisation == "xavier":
        outputs = weight.size // weight.shape[1]
        bound = math.sqrt(6 / (inputs + outputs))
        return rng.uniform(-bound, bound, segment.size)
    return math.sqrt(2 / inputs) * rng.standard_normal(segment.size)
