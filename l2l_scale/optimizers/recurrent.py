"""The coordinatewise rule with other recurrent cells than the LSTM: is the LSTM needed?"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.optimizers.features import Feature, Identity
from l2l_scale.optimizers.heads import Head, ScaledLinear
from l2l_scale.optimizers.network_rule import check_network, output_layer
from l2l_scale.tree import Tree


class RNNCell(nn.Module):
    """One layer of the plain recurrent network (Elman 1990), one step: h ← tanh(W x + U h + b).

    Args:
        input_size: F.
        hidden_size: H.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(hidden_size)
        self.weight_input = nn.Parameter(torch.empty(hidden_size, input_size).uniform_(-bound, bound))
        self.weight_hidden = nn.Parameter(torch.empty(hidden_size, hidden_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """One step: x (*, N, F), h (*, N, H)."""
        return (F.linear(x, self.weight_input, self.bias) + F.linear(h, self.weight_hidden)).tanh()


class GRUCell(nn.Module):
    """One gated recurrent unit layer (Cho et al. 2014, in the form of cuDNN and torch), one step.

    h ← z h + (1 − z) n with n = tanh(W x + b + r (U h + c)); the gates lie in the order reset r, update z,
    candidate n, as torch's do.

    Args:
        input_size: F.
        hidden_size: H.
        keep_bias: added to the update gate's bias at initialisation; 1 keeps memory alive early on, as the
            forget bias does in an LSTM.
    """

    def __init__(self, input_size: int, hidden_size: int, keep_bias: float = 1.0) -> None:
        super().__init__()
        bound = 1 / math.sqrt(hidden_size)
        self.hidden_size = hidden_size
        self.weight_input = nn.Parameter(torch.empty(3 * hidden_size, input_size).uniform_(-bound, bound))
        self.weight_hidden = nn.Parameter(torch.empty(3 * hidden_size, hidden_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.bias_candidate = nn.Parameter(torch.zeros(hidden_size))
        with torch.no_grad():
            self.bias[hidden_size : 2 * hidden_size] += keep_bias

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """One step: x (*, N, F), h (*, N, H)."""
        _, z, candidate = self.gates(x, h)
        mixed: Tensor = candidate + z * (h - candidate)
        return mixed

    def gates(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reset and update gate, and the candidate, (*, N, H) each."""
        sizes = [2 * self.hidden_size, self.hidden_size]
        gates_x, candidate_x = torch.split(F.linear(x, self.weight_input, self.bias), sizes, dim=-1)
        gates_h, candidate_h = torch.split(F.linear(h, self.weight_hidden), sizes, dim=-1)
        r, z = (gates_x + gates_h).sigmoid().chunk(2, dim=-1)
        return r, z, (candidate_x + r * (candidate_h + self.bias_candidate)).tanh()


class CoordinatewiseRecurrent(UpdateRule, ABC):
    """A small recurrent network whose layers keep one vector each, shared by all coordinates.

    Like :class:`~l2l_scale.optimizers.CoordinatewiseLSTM` in all but the cell, and computed op by op.
    Subclasses call :meth:`_build` in ``__init__``.
    """

    features: Feature
    head: Head
    hidden_size: int

    @abstractmethod
    def _cell(self, input_size: int) -> nn.Module:
        """A new layer."""

    def _build(self, layers: int, features: Feature | None, head: Head | None, output_scale: float) -> None:
        """Make features, layers and output; the arguments are those of the subclasses."""
        self.features = Identity() if features is None else features
        self.head = ScaledLinear() if head is None else head
        sizes = [self.features.size, *[self.hidden_size] * (layers - 1)]
        self.cells = nn.ModuleList(self._cell(size) for size in sizes)
        self.output = output_layer(self.hidden_size, self.head.size, output_scale)

    def init_state(self, theta: Tensor) -> Tree:
        """The states of the features and of the layers, zero; h is (*, N, H) for ``theta`` (*, N)."""
        zeros = theta.new_zeros(*theta.shape, self.hidden_size)
        return self.features.init_state(theta), (zeros,) * len(self.cells)

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step, coordinate by coordinate; θ itself is not looked at."""
        feature_state, hidden = state
        x, feature_state = self.features(grad, feature_state)
        after = []
        for cell, own in zip(cast("Iterable[nn.Module]", self.cells), hidden, strict=True):
            x = cell(x, own)
            after.append(x)
        return self.head(self.output(x)), (feature_state, tuple(after))


class CoordinatewiseGRU(CoordinatewiseRecurrent):
    """The coordinatewise rule with gated recurrent units.

    Args:
        hidden_size: H, units per layer; at least 1.
        layers: number of layers; at least 1.
        features: what the network sees of the gradient; the gradient itself if not given.
        head: how outputs become updates; ``ScaledLinear(0.1)`` if not given.
        keep_bias: initial bias of the update gates.
        output_scale: factor on the initial weights of the output layer.

    Raises:
        ValueError: if a size is below 1, or a scale is not a positive finite number.
    """

    def __init__(
        self,
        hidden_size: int = 20,
        layers: int = 2,
        features: Feature | None = None,
        head: Head | None = None,
        keep_bias: float = 1.0,
        output_scale: float = 0.1,
    ) -> None:
        super().__init__()
        check_network(hidden_size, layers, keep_bias, output_scale, None)
        self.hidden_size, self.layers = hidden_size, layers
        self.keep_bias, self.output_scale = keep_bias, output_scale
        self._build(layers, features, head, output_scale)

    def _cell(self, input_size: int) -> nn.Module:
        return GRUCell(input_size, self.hidden_size, self.keep_bias)


class CoordinatewiseRNN(CoordinatewiseRecurrent):
    """The coordinatewise rule with a plain recurrent network.

    Args:
        hidden_size: H, units per layer; at least 1.
        layers: number of layers; at least 1.
        features: what the network sees of the gradient; the gradient itself if not given.
        head: how outputs become updates; ``ScaledLinear(0.1)`` if not given.
        output_scale: factor on the initial weights of the output layer.

    Raises:
        ValueError: if a size is below 1, or a scale is not a positive finite number.
    """

    def __init__(
        self,
        hidden_size: int = 20,
        layers: int = 2,
        features: Feature | None = None,
        head: Head | None = None,
        output_scale: float = 0.1,
    ) -> None:
        super().__init__()
        check_network(hidden_size, layers, 0.0, output_scale, None)
        self.hidden_size, self.layers, self.output_scale = hidden_size, layers, output_scale
        self._build(layers, features, head, output_scale)

    def _cell(self, input_size: int) -> nn.Module:
        return RNNCell(input_size, self.hidden_size)
