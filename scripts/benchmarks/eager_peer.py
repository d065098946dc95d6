"""The peer to compare with: the same meta-step in plain PyTorch, as a good user would write it by hand.

Nothing of l2l_scale is used, so it is also an independent check of the mathematics. All slots at once
through ``torch.vmap``, ``nn.LSTMCell`` over all coordinates, real losses with detached gradients, autograd.

S slots, N coordinates, K inner steps, H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Loss = Callable[[Tensor, Tensors, Tensors], Tensor]
"""(theta (N,), one task's constants, one minibatch) -> scalar."""

LOG_SCALE, OUTPUT_SCALE = 10.0, 0.1


class EagerLSTM(nn.Module):
    """Andrychowicz et al. 2016: two layers, log-sign input, update = 0.1 · output."""

    def __init__(self, hidden_size: int = 20) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.lower = nn.LSTMCell(2, hidden_size)
        self.upper = nn.LSTMCell(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, 1)

    def forward(self, grad: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The update (S * N,) for gradients (S * N,), and the new state, four tensors (S * N, H)."""
        h1, c1, h2, c2 = state
        h1, c1 = self.lower(log_sign(grad), (h1, c1))
        h2, c2 = self.upper(h1, (h2, c2))
        return OUTPUT_SCALE * self.output(h2).squeeze(-1), (h1, c1, h2, c2)


def log_sign(grad: Tensor) -> Tensor:
    """(log|g|/p, sgn g) where |g| >= e^-p, else (−1, e^p g), as (*, 2)."""
    threshold = math.exp(-LOG_SCALE)
    large = grad.abs() >= threshold
    log = grad.abs().clamp(min=threshold).log() / LOG_SCALE
    return torch.stack([log, torch.where(large, grad.sign(), grad / threshold)], dim=-1)


def meta_loss(rule: EagerLSTM, loss: Loss, theta: Tensor, task: Tensors, data: Tensors, steps: int) -> Tensor:
    """Σ_k f(θ_k) over the window, mean over the slots: what is backpropagated.

    Args:
        rule: the learned optimizer.
        loss: of one task.
        theta: start points (S, N).
        task: constants, leaves (S, ...).
        data: minibatches, leaves (K + 1, S, ...).
        steps: K.
    """
    slots, coordinates = theta.shape
    losses_of = torch.vmap(loss)
    state = tuple(theta.new_zeros(slots * coordinates, rule.hidden_size) for _ in range(4))
    theta = theta.clone().requires_grad_()
    losses = losses_of(theta, task, minibatch(data, 0))
    total = theta.new_zeros(())
    for k in range(steps):
        (grad,) = torch.autograd.grad(losses.sum(), theta, retain_graph=True)
        update, state = rule(grad.reshape(-1), state)
        theta = theta + update.view(slots, coordinates)
        losses = losses_of(theta, task, minibatch(data, k + 1))
        total = total + losses.mean()
    return total


def minibatch(data: Tensors, k: int) -> Tensors:
    """The k-th minibatch of every slot."""
    return {name: leaf[k] for name, leaf in data.items()}
