"""The network that steers a quasi-Newton memory: it sees the last step, and scales the next one."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from l2l_scale.optimizers.cells import Computing, GlobalAveraging, StackedLSTM
from l2l_scale.optimizers.network_rule import output_layer
from l2l_scale.optimizers.quasi_newton import norm, reciprocal
from l2l_scale.tree import Tree

_COORDINATE_OUTPUTS, _PROBLEM_OUTPUTS = 1, 4


class Steering(NamedTuple):
    """What the network decides; everything is one where its outputs are zero. Numbers are (*, 1)."""

    coordinates: Tensor
    """(*, N): D, the relative step lengths of the coordinates in unknown directions."""
    explore: Tensor
    """Factor on the step into unknown directions."""
    trust: Tensor
    """Factor on the step in known directions."""
    conjugate: Tensor
    """In (0, 1]: how far the written pair is made conjugate to the known ones."""
    accept: Tensor
    """In (0, 1]: how much of a pair memory believes; the rest of s is what memory expected, M y."""


class Observations(NamedTuple):
    """What the network sees; all relative, or logarithms."""

    vectors: tuple[Tensor, ...]
    """Vectors (*, N), of which it sees the direction."""
    lengths: tuple[Tensor, ...]
    """Positive numbers (*, 1) of any magnitude, of which it sees the logarithm."""
    flags: tuple[Tensor, ...]
    """Masks (*, 1)."""


class SteeringNetwork(nn.Module):
    """An LSTM over the coordinates; what concerns the whole problem is the mean of the coordinates' outputs.

    Observations enter as constants: they are ratios of numbers that nearly cancel, whose derivatives would be
    noise. The network learns from what its factors do to the next points.

    Args:
        vectors: number of vectors that it sees.
        numbers: number of lengths and flags that it sees.
        hidden_size: H, units per layer.
        layers: LSTM layers.
        sharing: global averaging cells.
        freedom: the largest factor by which a step is lengthened or shortened.
        forget_bias: initial bias of the forget gates.
        output_scale: factor on the initial weights of the output layer.
    """

    def __init__(
        self,
        vectors: int,
        numbers: int,
        hidden_size: int,
        layers: int,
        sharing: GlobalAveraging,
        freedom: float,
        forget_bias: float,
        output_scale: float,
    ) -> None:
        super().__init__()
        self.log_freedom = math.log(freedom)
        self.lstm = StackedLSTM(vectors + numbers, hidden_size, layers, forget_bias, sharing)
        self.output = output_layer(hidden_size, _COORDINATE_OUTPUTS + _PROBLEM_OUTPUTS, output_scale)

    def init_state(self, theta: Tensor) -> Tree:
        """Zeros."""
        return self.lstm.init_state(theta)

    def forward(self, seen: Observations, state: Tree, computing: Computing) -> tuple[Steering, Tree]:
        """One step: what to do, in the precision of the observations, and the new state."""
        work = seen.vectors[0].dtype
        inputs = _inputs(seen).detach().to(self.output.weight.dtype)
        hidden, state = self.lstm(inputs, state, computing)
        outputs = self.output(hidden).to(work)
        coordinates = outputs[..., 0]
        explore, trust, conjugate, accept = outputs[..., _COORDINATE_OUTPUTS:].mean(-2).split(1, dim=-1)
        steering = Steering(
            self._factor(coordinates),
            self._factor(explore),
            self._factor(trust),
            _share(conjugate),
            _share(accept),
        )
        return steering, state

    def _factor(self, output: Tensor) -> Tensor:
        """Between 1 / freedom and freedom."""
        return (self.log_freedom * output.tanh()).exp()


def _share(output: Tensor) -> Tensor:
    """In (0, 1], and one at zero."""
    return 1 / (1 + output.square())


def _inputs(seen: Observations) -> Tensor:
    """As one tensor (*, N, F), of numbers that are about one or below."""
    like = seen.vectors[0]
    root = math.sqrt(like.shape[-1])
    lengths = [norm(vector) for vector in seen.vectors]
    directions = [
        root * reciprocal(length, length > 0) * vector
        for vector, length in zip(seen.vectors, lengths, strict=True)
    ]
    logs = [value.clamp(1e-30, 1e30).log() / 10 for value in seen.lengths]
    numbers = [*logs, *(flag.to(like.dtype) for flag in seen.flags)]
    return torch.stack([*directions, *(number.expand_as(like) for number in numbers)], dim=-1)
