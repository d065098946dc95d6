"""Recurrent cells over the coordinates of a problem.

Written in plain matrix products: ``nn.LSTMCell`` has no vmap rule on CPU, and evolution strategies need
weights per slot through ``torch.vmap(torch.func.functional_call)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

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
        return mean_of_problem if self.over == "problem" else mean_of_groups(spec.groups.values())


def mean_of_problem(values: Tensor) -> Tensor:
    """The mean over all coordinates of each problem, (*, 1, G)."""
    return values.mean(-2, keepdim=True)


def mean_of_groups(groups: Iterable[tuple[slice, ...]]) -> Mean:
    """The mean over the coordinates of one's own group.

    Args:
        groups: where each group lies on the axis of the coordinates; together they cover it.
    """
    ranges = list(groups)

    def mean(values: Tensor) -> Tensor:
        result = values
        for slices in ranges:
            size = sum(part.stop - part.start for part in slices)
            total = torch.stack([values[..., part, :].sum(-2) for part in slices]).sum(0)
            own = (total / size).unsqueeze(-2)
            for part in slices:
                result = torch.slice_scatter(
                    result, own.expand_as(values[..., part, :]), -2, part.start, part.stop
                )
        return result

    return mean


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

    def forward(
        self, x: Tensor, state: LSTMState, mean: Mean = mean_of_problem, chunk: int | None = None
    ) -> LSTMState:
        """One step.

        Args:
            x: (*, N, F).
            state: h and c, each (*, N, H).
            mean: over which coordinates global cells average.
            chunk: how many coordinates are computed at once; all if not given. Chunks are computed again in
                backward, so that their gates need not be kept; means are of all coordinates all the same.
        """
        h, c = state
        if chunk is None or x.shape[-2] <= chunk:
            h, o, c = self._step(x, h, c)
        else:
            pieces = zip(*(torch.split(part, chunk, dim=-2) for part in (x, h, c)), strict=True)
            parts = [checkpoint(self._step, *piece, use_reentrant=False) for piece in pieces]
            h, o, c = (torch.cat(part, dim=-2) for part in zip(*parts, strict=True))
        return (h, c) if self.sharing is None else self._average(h, o, c, mean, self.sharing.averages)

    def _step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The local part: h, the output gate and c of coordinates that do not hear of each other."""
        weight = torch.cat((self.weight_input, self.weight_hidden), dim=1)
        gates = F.linear(torch.cat((x, h), dim=-1), weight, self.bias)  # one product is faster than two
        sigmoids, candidate = torch.split(gates, [3 * self.hidden_size, self.hidden_size], dim=-1)
        i, f, o = sigmoids.sigmoid().chunk(3, dim=-1)
        c = f * c + i * candidate.tanh()
        return o * c.tanh(), o[..., : self.global_units], c

    def _average(self, h: Tensor, o: Tensor, c: Tensor, mean: Mean, averages: str) -> LSTMState:
        """Give the global units the mean instead of their own values; ``o`` is their output gate."""
        first, rest = h[..., : self.global_units], h[..., self.global_units :]
        if averages == "activation":
            return torch.cat((mean(first).expand_as(first), rest), dim=-1), c
        shared = mean(c[..., : self.global_units]).expand_as(first)
        c = torch.cat((shared, c[..., self.global_units :]), dim=-1)
        return torch.cat((o * shared.tanh(), rest), dim=-1), c


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
        self,
        x: Tensor,
        state: tuple[LSTMState, ...],
        mean: Mean = mean_of_problem,
        chunk: int | None = None,
    ) -> tuple[Tensor, tuple[LSTMState, ...]]:
        """One step through all layers: the top h (*, N, H), and the new states."""
        new = []
        for cell, own in zip(self._layers(), state, strict=True):
            x, c = cell(x, own, mean, chunk)
            new.append((x, c))
        return x, tuple(new)
