"""Recurrent cells over the coordinates of a problem.

Written in plain matrix products: ``nn.LSTMCell`` has no vmap rule on CPU, and evolution strategies need
weights per slot through ``torch.vmap(torch.func.functional_call)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l2l_scale.checks import check_count
from l2l_scale.flat import FlatSpec

LSTMState = tuple[Tensor, Tensor]
"""h and c, each (*, N, H)."""

Mean: TypeAlias = Callable[[Tensor], Tensor]
"""From values of the coordinates (*, N, G) to their mean at each of them, (*, N, G) or (*, 1, G)."""


Local: TypeAlias = "Callable[[LSTMCell, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]"
"""The local part of a layer's step: from a cell, x (*, N, F), h and c (*, N, H) to h and c after the step."""


@dataclass(frozen=True)
class GlobalAveraging:
    """Global averaging cells (Andrychowicz et al. 2016, appendix B): how coordinates hear of each other.

    In every layer the first ``units`` cells are ordinary LSTM cells, but what they send out, upwards and to
    the next step, is the mean over the coordinates of the problem, never over several problems.

    Args:
        units: how many cells per layer; at least 1.
        averages: the activation h (the paper), or the cell state c, of which each coordinate then makes an
            activation with its own output gate.
        over: all coordinates of the problem, or those of the same parameter group (conv, linear, bias, ... in
            meta-training; a parameter group of the torch optimizer in use).

    Raises:
        ValueError: if a number or choice is out of range.
    """

    units: int = 2
    averages: Literal["activation", "cell"] = "activation"
    over: Literal["problem", "group"] = "problem"

    def __post_init__(self) -> None:
        check_count("units", self.units)
        if self.averages not in ("activation", "cell"):
            raise ValueError(f"averages ({self.averages!r}) must be 'activation' or 'cell'")
        if self.over not in ("problem", "group"):
            raise ValueError(f"over ({self.over!r}) must be 'problem' or 'group'")

    def mean_for(self, spec: FlatSpec) -> Mean:
        """The mean that cells take on tasks with these parameters."""
        return (
            mean_of_problem
            if self.over == "problem"
            else MeanOfGroups(tuple(spec.groups.values()), spec.size)
        )


def mean_of_problem(values: Tensor) -> Tensor:
    """The mean over all coordinates of each problem, (*, 1, G)."""
    return values.mean(-2, keepdim=True)


@dataclass(frozen=True)
class MeanOfGroups:
    """The mean over the coordinates of one's own group.

    Args:
        groups: where each group lies on the axis of the coordinates; together they cover it.
        size: N.
    """

    groups: tuple[tuple[slice, ...], ...]
    size: int

    def __call__(self, values: Tensor) -> Tensor:
        """The means at every coordinate, (*, N, G)."""
        assert values.shape[-2] == self.size, (values.shape, self.size)
        result = values
        for slices in self.groups:
            size = sum(part.stop - part.start for part in slices)
            total = torch.stack([values[..., part, :].sum(-2) for part in slices]).sum(0)
            own = (total / size).unsqueeze(-2)
            for part in slices:
                result = torch.slice_scatter(
                    result, own.expand_as(values[..., part, :]), -2, part.start, part.stop
                )
        return result


class LSTMCell(nn.Module):
    """One LSTM layer (Hochreiter and Schmidhuber 1997, with forget gate), one step.

    The gates lie in the order input, forget, output, candidate, so that one sigmoid serves three of them
    (torch's order is input, forget, candidate, output).

    Args:
        input_size: F.
        hidden_size: H.
        forget_bias: added to the forget gate's bias at initialisation; 1 keeps memory alive early on
            (Jozefowicz et al. 2015).
        sharing: which of the units are global averaging cells; none if not given.

    Raises:
        ValueError: if more units are shared than there are.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        forget_bias: float = 1.0,
        sharing: GlobalAveraging | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.sharing = hidden_size, sharing
        self.global_units = 0 if sharing is None else sharing.units
        if self.global_units > hidden_size:
            raise ValueError(f"units ({self.global_units}) must be <= hidden_size ({hidden_size})")
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

    def forward(self, x: Tensor, state: LSTMState, computing: Computing | None = None) -> LSTMState:
        """One step: x (*, N, F), state (*, N, H)."""
        how = Computing() if computing is None else computing
        h, c = state
        if how.chunk is None or x.shape[-2] <= how.chunk:
            h, c = how.local(self, x, h, c)
        else:
            pieces = zip(*(torch.split(part, how.chunk, dim=-2) for part in (x, h, c)), strict=True)
            parts = [checkpoint(how.local, self, *piece, use_reentrant=False) for piece in pieces]
            h, c = (torch.cat(part, dim=-2) for part in zip(*parts, strict=True))
        if self.sharing is None:
            return h, c
        if self.sharing.averages == "activation":
            return self._with_first(h, how.mean(h[..., : self.global_units])), c
        shared = how.mean(c[..., : self.global_units])
        gate = self._output_gate(x, state[0])
        return self._with_first(h, gate * shared.tanh()), self._with_first(c, shared)

    def _with_first(self, values: Tensor, shared: Tensor) -> Tensor:
        """``values`` (*, N, H) with other values of the global units, (*, N, G) or (*, 1, G)."""
        rest = values[..., self.global_units :]
        return torch.cat((shared.expand(*values.shape[:-1], self.global_units), rest), dim=-1)

    def _output_gate(self, x: Tensor, h: Tensor) -> Tensor:
        """The output gate of the global units, (*, N, G), from h before the step."""
        rows = slice(2 * self.hidden_size, 2 * self.hidden_size + self.global_units)
        inputs = F.linear(x, self.weight_input[rows], self.bias[rows])
        return (inputs + F.linear(h, self.weight_hidden[rows])).sigmoid()


def local_step(cell: LSTMCell, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The step of coordinates that do not hear of each other, op by op."""
    i, f, o, candidate = lstm_gates(cell, x, h)
    c = f * c + i * candidate
    return o * c.tanh(), c


def lstm_gates(cell: LSTMCell, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, forget and output gate, and the candidate, (*, N, H) each."""
    weight = torch.cat((cell.weight_input, cell.weight_hidden), dim=1)
    gates = F.linear(torch.cat((x, h), dim=-1), weight, cell.bias)  # one product is faster than two
    sigmoids, candidate = torch.split(gates, [3 * cell.hidden_size, cell.hidden_size], dim=-1)
    i, f, o = sigmoids.sigmoid().chunk(3, dim=-1)
    return i, f, o, candidate.tanh()


class Computing(NamedTuple):
    """How the layers of a network are computed; the result is the same up to rounding, but for the mean."""

    mean: Mean = mean_of_problem
    """Over which coordinates global cells average."""
    chunk: int | None = None
    """How many coordinates are computed at once; all if None. Chunks are computed again in backward, so that
    their gates need not be kept; means are of all coordinates all the same."""
    local: Local = local_step
    """The local part of a step."""


class StackedLSTM(nn.Module):
    """Layers of :class:`LSTMCell`, each fed with the hidden activation of the one below."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        layers: int,
        forget_bias: float = 1.0,
        sharing: GlobalAveraging | None = None,
    ) -> None:
        super().__init__()
        sizes = [input_size, *[hidden_size] * (layers - 1)]
        self.cells = nn.ModuleList(LSTMCell(size, hidden_size, forget_bias, sharing) for size in sizes)

    def _layers(self) -> Iterable[LSTMCell]:
        return cast("Iterable[LSTMCell]", self.cells)

    def init_state(self, theta: Tensor) -> tuple[LSTMState, ...]:
        """Zeros for every layer."""
        return tuple(cell.init_state(theta) for cell in self._layers())

    def forward(
        self, x: Tensor, state: tuple[LSTMState, ...], computing: Computing | None = None
    ) -> tuple[Tensor, tuple[LSTMState, ...]]:
        """One step through all layers: the top h (*, N, H), and the new states."""
        new = []
        for cell, own in zip(self._layers(), state, strict=True):
            x, c = cell(x, own, computing)
            new.append((x, c))
        return x, tuple(new)
