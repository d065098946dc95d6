"""Backward through some coordinates only: what each contributes, and the inputs of those that were drawn.

S slots, N coordinates each, M = S · N, J drawn coordinates, K inner steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_scale.tree import Tree, tree_map


def sizes(d_losses: Tensor, grads: Tensor) -> Tensor:
    """How much each coordinate's updates can matter, (M,): Σ_k |∂L/∂update_k|.

    Args:
        d_losses: ∂L/∂loss, (K, S).
        grads: (K + 1, S, N).
    """
    adjoint, total = torch.zeros_like(grads[0]), torch.zeros_like(grads[0])
    for weight, grad in zip(d_losses.flip(0), grads[1:].flip(0), strict=True):
        adjoint += weight[:, None] * grad
        total += adjoint.abs()
    return total.view(-1)


def loss_weights_of(d_losses: Tensor, chosen: Tensor, factors: Tensor, shape: torch.Size) -> Tensor:
    """∂L/∂loss (K, S) for drawn coordinates (J,): each a problem of its own, times its factor, (K, J)."""
    return d_losses[:, chosen // shape[-1]] * factors


def state_of(state: Tree, chosen: Tensor, shape: torch.Size) -> Tree:
    """The state (leaves (S, N, ...) or (S, 1)) of drawn coordinates, leaves (J, ...)."""
    slot, coordinate = chosen // shape[-1], chosen % shape[-1]

    def choose(leaf: Tensor) -> Tensor:
        return leaf[slot, 0 if leaf.shape[1] == 1 != shape[1] else coordinate]

    return tree_map(choose, state)
