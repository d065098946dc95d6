"""Recurrent cells over the coordinates of a problem.

Written in plain matrix products: ``nn.LSTMCell`` has no vmap rule on CPU, and evolution strategies need
weights per slot through ``torch.vmap(torch.func.functional_call)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LSTMState = tuple[Tensor, Tensor]
"""h and c, each (*, H)."""


class LSTMCell(nn.Module):
    """One LSTM layer (Hochreiter and Schmidhuber 1997, with forget gate), one step.

    The gates lie in the order input, forget, output, candidate, so that one sigmoid serves three of them
    (torch's order is input, forget, candidate, output).

    Args:
        input_size: F.
        hidden_size: H.
        forget_bias: added to the forget gate's bias at initialisation; 1 keeps memory alive early on
            (Jozefowicz et al. 2015).
    """

    def __init__(self, input_size: int, hidden_size: int, forget_bias: float = 1.0) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        bound = 1 / math.sqrt(hidden_size)
        self.weight_input = nn.Parameter(torch.empty(4 * hidden_size, input_size).uniform_(-bound, bound))
        self.weight_hidden = nn.Parameter(torch.empty(4 * hidden_size, hidden_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))
        with torch.no_grad():
            self.bias[hidden_size : 2 * hidden_size] += forget_bias

    def init_state(self, theta: Tensor) -> LSTMState:
        """Zeros, (*, N, H) for ``theta`` (*, N)."""
        zeros = theta.new_zeros(*theta.shape, self.hidden_size)
        return zeros, zeros

    def forward(self, x: Tensor, state: LSTMState) -> LSTMState:
        """One step: x (*, F), state (*, H)."""
        h, c = state
        weight = torch.cat((self.weight_input, self.weight_hidden), dim=1)
        gates = F.linear(torch.cat((x, h), dim=-1), weight, self.bias)  # one product is faster than two
        sigmoids, candidate = torch.split(gates, [3 * self.hidden_size, self.hidden_size], dim=-1)
        i, f, o = sigmoids.sigmoid().chunk(3, dim=-1)
        c = f * c + i * candidate.tanh()
        return o * c.tanh(), c


class StackedLSTM(nn.Module):
    """Layers of :class:`LSTMCell`, each fed with the hidden activation of the one below."""

    def __init__(self, input_size: int, hidden_size: int, layers: int, forget_bias: float = 1.0) -> None:
        super().__init__()
        sizes = [input_size, *[hidden_size] * (layers - 1)]
        self.cells = nn.ModuleList(LSTMCell(size, hidden_size, forget_bias) for size in sizes)

    def _layers(self) -> Iterable[LSTMCell]:
        return cast("Iterable[LSTMCell]", self.cells)

    def init_state(self, theta: Tensor) -> tuple[LSTMState, ...]:
        """Zeros for every layer."""
        return tuple(cell.init_state(theta) for cell in self._layers())

    def forward(self, x: Tensor, state: tuple[LSTMState, ...]) -> tuple[Tensor, tuple[LSTMState, ...]]:
        """One step through all layers: the top h (*, H), and the new states."""
        new = []
        for cell, own in zip(self._layers(), state, strict=True):
            x, c = cell(x, own)
            new.append((x, c))
        return x, tuple(new)
