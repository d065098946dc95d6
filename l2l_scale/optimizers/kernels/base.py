"""The contract of a fused kernel: a coordinatewise LSTM's steps and derivatives on packed state.

M coordinates of all problems, one after the other; N of one problem; S = M / N problems; K inner steps; the
packed state (B, R, BLOCK) of :mod:`layout`; φ as one flat tensor, see :func:`program.flat_weights`. All
tensors are contiguous, on one device and of one precision (a kernel may hold the state in a smaller one).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_scale.optimizers.kernels.program import Program


class StepGradient(NamedTuple):
    """What one step's backward pass gives."""

    weights: Tensor
    """∂L/∂φ, flat."""
    grad: Tensor
    """(M,) with respect to the gradient that entered the rule."""
    state: Tensor
    """(B, R, BLOCK) with respect to the packed state before the step."""


class Kernel(ABC):
    """Computes what :class:`CoordinatewiseLSTM` computes; without autograd, which :mod:`fused` adds."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is, for the log: "C++ AVX-512"."""

    @property
    def state_dtype(self) -> torch.dtype | None:
        """The precision of the packed state; None for that of the gradients."""
        return None

    @abstractmethod
    def step(self, weights: Tensor, grad: Tensor, state: Tensor, out: Tensor) -> Tensor:
        """One inner step.

        Args:
            weights: φ, flat.
            grad: (M,).
            state: packed, before the step.
            out: packed, filled with the state after the step; may be ``state`` itself.

        Returns:
            the update (M,).
        """

    @abstractmethod
    def step_gradient(
        self, weights: Tensor, grad: Tensor, state: Tensor, d_update: Tensor, d_state: Tensor
    ) -> StepGradient:
        """The derivative of one step, which is computed again.

        Args:
            weights: φ, flat.
            grad: (M,), as given to :meth:`step`.
            state: packed, before the step.
            d_update: (M,), ∂L/∂update.
            d_state: packed, ∂L/∂(state after the step).
        """

    @abstractmethod
    def window_gradient(self, weights: Tensor, grads: Tensor, loss_weights: Tensor, state: Tensor) -> Tensor:
        """Phase 2 of a first-order window: ∂L/∂φ, flat; the K steps are computed again, block by block.

        The gradients are constants, so update k moves every later loss by the gradient there:
        ∂L/∂update_k = Σ_{j ≥ k} loss_weights[j] · grads[j + 1].

        Args:
            weights: φ, flat.
            grads: (K + 1, M): what entered the rule at steps 0 … K − 1, and the gradient after the last one.
            loss_weights: (K, S'): ∂L/∂loss after each step, for problems of M / S' coordinates each.
            state: packed, at the start of the window.
        """
