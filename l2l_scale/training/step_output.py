"""What a training window of one family shows to callbacks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StepOutput(NamedTuple):
    """What a training window of one family shows to callbacks; all without graph."""

    member: str
    """The family's name in the mixture."""
    losses: Tensor
    """f(θ_1) … f(θ_K), (K, S)."""
    inner_step: Tensor
    """(S,) where in its trajectory each slot stood before the window."""
    diverged: Tensor
    """(S,) whether the slot went astray."""
    update_rms: Tensor
    """(S,) root mean square of the last update."""
