"""Importance sampling of coordinates: an unbiased meta-gradient from a part of a very large optimizee.

M coordinates of all slots, J of them drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_scale.optimizers.base import Draw
from l2l_scale.rng import Channel, Split, stream

_UNIFORM = 0.1  # bounds the weights: no coordinate weighs more than ten times its uniform share


def draw_coordinates(count: int, window_index: int) -> Draw:
    """Draw ``count`` coordinates with replacement, for one window; the draw is a function of its index.

    A coordinate of size C_j (how much its updates can matter) is drawn with probability
    p_j = 0.9 · C_j / Σ C + 0.1 / M and weighs 1 / (J · p_j). All coordinates are taken, each once, where
    there are no more than that.
    """

    def draw(sizes: Tensor) -> tuple[Tensor, Tensor]:
        if len(sizes) <= count:
            return torch.arange(len(sizes), device=sizes.device), torch.ones_like(sizes)
        shares = probabilities(sizes)
        uniforms = torch.from_numpy(stream(0, Split.TRAIN, Channel.NOISE, window_index).random(count))
        bounds = shares.cumsum(0)
        chosen = torch.searchsorted(bounds, uniforms.to(bounds) * bounds[-1])
        return chosen, (1 / (count * shares[chosen])).to(sizes.dtype)

    return draw


def probabilities(sizes: Tensor) -> Tensor:
    """p (M,) in float64: long sums of probabilities need it. Uniform if sizes are all zero or not finite."""
    sizes = sizes.double()
    total = sizes.sum()
    uniform = torch.full_like(sizes, 1 / len(sizes))
    if not 0 < total < torch.inf:
        return uniform
    return (1 - _UNIFORM) * sizes / total + _UNIFORM * uniform
