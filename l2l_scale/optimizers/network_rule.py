"""What rules have in common that an LSTM over the coordinates drives."""

from __future__ import annotations

import copy
from abc import ABC
from typing import TypeVar

import torch
from torch import nn

from l2l_scale.checks import check_count, check_positive, check_range
from l2l_scale.flat import FlatSpec
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.optimizers.cells import Computing, GlobalAveraging, Local

Self = TypeVar("Self", bound="NetworkRule")


class NetworkRule(UpdateRule, ABC):
    """A rule whose network is a :class:`~l2l_scale.optimizers.cells.StackedLSTM` over the coordinates.

    How its layers are computed is apart from what they compute. Rules are not changed: one that is computed
    in another way is a copy that has the very same φ.
    """

    hidden_size: int
    """H, units per layer."""
    sharing: GlobalAveraging | None
    """Its global averaging cells."""
    computing: Computing
    """How its layers are computed."""

    def computed(self: Self, computing: Computing) -> Self:
        """The same rule, computed in this way."""
        rule = copy.copy(self)
        rule.computing = computing
        return rule

    def with_local(self: Self, local: Local) -> Self:
        """The same rule, the local part of its layers computed by ``local``."""
        return self.computed(self.computing._replace(local=local))

    def for_one_group(self: Self) -> Self:
        """The same rule where all coordinates of a problem are one group, as in use, computed op by op."""
        return self.computed(Computing(chunk=self.computing.chunk))

    def for_spec(self: Self, spec: FlatSpec) -> Self:
        """The same rule, whose cells average over these tasks' parameter groups, if they are to do so."""
        if self.sharing is None:
            return self
        return self.computed(self.computing._replace(mean=self.sharing.mean_for(spec)))


def check_network(
    hidden_size: int, layers: int, forget_bias: float, output_scale: float, chunk: int | None
) -> None:
    """Raise ``ValueError`` unless a network can be made with these arguments."""
    check_count("hidden_size", hidden_size)
    check_count("layers", layers)
    check_range("forget_bias", forget_bias, -100, 100)
    check_positive("output_scale", output_scale, zero=True)
    if chunk is not None:
        check_count("chunk", chunk)


def output_layer(hidden_size: int, outputs: int, scale: float) -> nn.Linear:
    """From hidden units to outputs, torch's initial weights times ``scale``, and no initial bias."""
    layer = nn.Linear(hidden_size, outputs)
    with torch.no_grad():
        layer.weight *= scale
        layer.bias.zero_()
    return layer
