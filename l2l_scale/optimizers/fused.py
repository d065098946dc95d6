"""A coordinatewise LSTM whose steps run in one fused kernel: same φ, same results up to rounding.

S slots, N coordinates each, M = S · N in all, K inner steps. Three ways to compute, all driven by ``unroll``:

- without a graph, a step overwrites the packed state of its window;
- with one (the true meta-gradient), a step is an autograd function that keeps its inputs, and computes itself
  again when its derivative is asked for;
- in first order a window has two phases. Phase 1 runs it without a graph and keeps the gradients; phase 2
  (:meth:`FusedRule.window_losses`) computes the steps again, block by block in cache, and adds up ∂L/∂φ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l2l_scale.optimizers.base import Draw, TwoPhaseRule
from l2l_scale.optimizers.coordinatewise import CoordinatewiseLSTM
from l2l_scale.optimizers.kernels.base import Kernel
from l2l_scale.optimizers.kernels.layout import outlines, pack, unpack
from l2l_scale.optimizers.kernels.program import flat_weights
from l2l_scale.optimizers.kernels.subset import loss_weights_of, sizes, state_of
from l2l_scale.tree import Tree


class OpenState(NamedTuple):
    """The state during a window."""

    packed: Tensor
    """(B, R, BLOCK), see :mod:`l2l_scale.optimizers.kernels.layout`."""
    weights: Tensor
    """φ as one tensor."""
    outlines: Tree
    """Structure and shapes of the state that was packed."""


class FusedRule(TwoPhaseRule):
    """Computes a rule with a kernel. Holds the very rule, so its parameters are the rule's own.

    Args:
        rule: what is computed.
        kernel: made for that rule.
    """

    def __init__(self, rule: CoordinatewiseLSTM, kernel: Kernel) -> None:
        super().__init__()
        self.rule, self.kernel = rule, kernel

    def init_state(self, theta: Tensor) -> Tree:
        """The rule's own state."""
        return self.rule.init_state(theta)

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step, on the rule's state or on that of an open window."""
        if not isinstance(state, OpenState):
            update, opened = self.forward(grad, theta, self.open_window(theta, state))
            return update, self.close_window(theta, opened)
        flat, packed = grad.reshape(-1).contiguous(), state.packed
        if torch.is_grad_enabled():
            update, packed = _Step.apply(self.kernel, state.weights, flat, packed)  # type: ignore[no-untyped-call]
        else:
            update = self.kernel.step(state.weights, flat, packed, packed)
        return update.view(theta.shape), state._replace(packed=packed)

    def open_window(self, theta: Tensor, state: Tree) -> Tree:
        """Pack the state, and φ."""
        return OpenState(self._pack(theta.shape, state), flat_weights(self.rule), outlines(state))

    def close_window(self, theta: Tensor, state: Tree) -> Tree:
        """Unpack the state."""
        return unpack(state.packed, state.outlines, theta.shape)

    def window_losses(
        self, losses: Tensor, grads: Tensor, state: Tree, frozen: Tensor | None, draw: Draw | None = None
    ) -> Tensor:
        """The losses, differentiable in φ by phase 2."""
        weights = flat_weights(self.rule)
        result: Tensor = _Window.apply(self, weights, losses, grads, state, frozen, draw)  # type: ignore[no-untyped-call]
        return result

    def window_gradient(
        self, weights: Tensor, d_losses: Tensor, grads: Tensor, state: Tree, draw: Draw | None
    ) -> Tensor:
        """∂L/∂φ, flat, for ∂L/∂losses (K, S); see :meth:`window_losses`."""
        steps, shape = len(d_losses), grads.shape[1:]
        flat = grads.reshape(steps + 1, -1).contiguous()
        if draw is None:
            return self.kernel.window_gradient(weights, flat, d_losses, self._pack(shape, state))
        chosen, factors = draw(sizes(d_losses, grads))
        d_losses = loss_weights_of(d_losses, chosen, factors, shape)
        packed = self._pack(chosen.shape, state_of(state, chosen, shape))
        return self.kernel.window_gradient(weights, flat[:, chosen].contiguous(), d_losses, packed)

    def _pack(self, shape: torch.Size, state: Tree) -> Tensor:
        return pack(state, shape, self.kernel.program.state_rows, self.kernel.state_dtype)


class _Step(torch.autograd.Function):
    """(φ, gradient, packed state) -> (update, packed state)."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, weights: Tensor, grad: Tensor, packed: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.kernel = kernel
        ctx.save_for_backward(weights, grad, packed)
        after = torch.empty_like(packed)
        return kernel.step(weights, grad, packed, after), after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_update: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        weights, grad, packed = ctx.saved_tensors
        adjoints = d_update.contiguous(), d_after.contiguous()
        return None, *ctx.kernel.step_gradient(weights, grad, packed, *adjoints)


class _Window(torch.autograd.Function):
    """(φ, losses) -> losses, with phase 2 as derivative in φ."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: FusedRule,
        weights: Tensor,
        losses: Tensor,
        grads: Tensor,
        state: Tree,
        frozen: Tensor | None,
        draw: Draw | None,
    ) -> Tensor:
        ctx.rule, ctx.state, ctx.frozen, ctx.draw = rule, state, frozen, draw
        ctx.save_for_backward(weights, grads)
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        weights, grads = ctx.saved_tensors
        passed_on = d_losses if ctx.needs_input_grad[2] else None
        if ctx.frozen is not None:
            d_losses = d_losses.masked_fill(ctx.frozen, 0.0)
        d_weights = ctx.rule.window_gradient(weights, d_losses.contiguous(), grads, ctx.state, ctx.draw)
        return None, d_weights, passed_on, None, None, None, None
