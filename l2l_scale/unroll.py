"""Windows of inner steps: the one loop that training, evaluation and every estimator share.

S slots, N coordinates, K inner steps of the window, T of the horizon.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_scale.optimizers.base import Draw, TwoPhaseRule, UpdateRule
from l2l_scale.tasks.base import TaskFamily, Tensors
from l2l_scale.tree import Tree, tree_detach, tree_where


class WindowBatch(NamedTuple):
    """Everything random that one window needs: a pure function of (seed, window index, slots)."""

    window_index: int
    """The window counter of the run."""
    inner_step: Tensor
    """(S,) where in its trajectory each slot stands at the start of the window."""
    reset: Tensor
    """(S,) whether a new trajectory starts with this window."""
    task: Tensors
    """Constants of each slot's problem, (S, ...)."""
    theta0: Tensor
    """Start points of the slots' trajectories, (S, N)."""
    data: Tensors
    """Minibatches for the K inner steps and for the loss after the last one, (K + 1, S, ...)."""
    window_length: int
    """K."""
    horizon: Tensor
    """(S,) T of each slot's trajectory."""
    teacher: Tensors
    """What a teacher did on the same problems, if there is one: "losses", its f(θ_1) … f(θ_K), (K, S), and
    if asked for "theta", its θ_0 … θ_K, (K + 1, S, N)."""


class Carry(NamedTuple):
    """What survives a window; every leaf has the slot axis first."""

    theta: Tensor
    """(S, N)"""
    state: Tree
    """The rule's state."""
    start_loss: Tensor
    """(S,) loss at the start point of the trajectory."""
    diverged: Tensor
    """(S,) whether the slot went astray in this window and must start again."""


class Rollout(NamedTuple):
    """What a window did."""

    carry: Carry
    losses: Tensor
    """f(θ_1) … f(θ_K), (K, S); differentiable in φ as the mode says."""
    update_rms: Tensor
    """(S,) root mean square of the last update, without graph."""


class InnerGradient(Enum):
    """How the losses of an unrolled window depend on φ."""

    NONE = "none"
    """Not at all: no graph is built."""
    FIRST_ORDER = "first_order"
    """∇f(θ_t) enters the rule as a constant (the paper's choice: ∂∇_t/∂φ = 0)."""
    SECOND_ORDER = "second_order"
    """The true derivative, through the gradients as well."""


# A loss so far above its start is treated as overflowed: its gradients would drown all other slots'.
_CEILING = 1e8
# A gradient beyond this, too: products with it overflow in float32, though its loss may be finite.
_STEEPEST = 1e20


def begin(rule: UpdateRule, batch: WindowBatch, carry: Carry | None, restart_diverged: bool = True) -> Carry:
    """Start new trajectories where the batch says so, and where the previous window diverged.

    What goes on is cut from its graph: this is where backpropagation is truncated.

    Args:
        rule: the rule whose state is started.
        batch: the window to come.
        carry: from the window before; None at the very start (then all slots start).
        restart_diverged: training does; in validation and evaluation what diverged stays so, as a result.
    """
    start_loss = torch.full_like(batch.theta0[:, 0], torch.nan)
    fresh = Carry(batch.theta0, rule.init_state(batch.theta0), start_loss, torch.zeros_like(batch.reset))
    if carry is None:
        return fresh
    starts = batch.reset | carry.diverged if restart_diverged else batch.reset
    started: Carry = tree_where(starts, fresh, tree_detach(carry))
    return started


def unroll(
    rule: UpdateRule,
    family: TaskFamily,
    carry: Carry,
    batch: WindowBatch,
    mode: InnerGradient,
    frozen: Tensor | None = None,
    draw: Draw | None = None,
) -> Rollout:
    """Apply the rule K times in every slot.

    In first order the gradients are constants to φ, and they are also the gradients of the losses. So a
    :class:`TwoPhaseRule` is run without a graph, only the gradients are kept, and backward computes its steps
    again; for any other rule autograd keeps everything.

    Args:
        rule: the update rule.
        family: whose losses are minimised.
        carry: from :func:`begin`, so the graph ends at the start of the window.
        batch: the window.
        mode: how the losses depend on φ.
        frozen: (S,) slots whose θ must not move; they contribute no gradient to φ.
        draw: chooses the coordinates that backward goes through, if not all; for two phases only.

    Returns:
        losses after each inner step, and the carry; only the losses are sure to have a graph.
    """
    if mode is InnerGradient.FIRST_ORDER and isinstance(rule, TwoPhaseRule):
        grads = carry.theta.new_empty(batch.window_length + 1, *carry.theta.shape)
        rollout = _run(rule, family, carry, batch, InnerGradient.NONE, frozen, grads)
        diverged = rollout.carry.diverged | _too_steep(grads).any(0)
        rollout = rollout._replace(carry=rollout.carry._replace(diverged=diverged))
        return rollout._replace(losses=rule.window_losses(rollout.losses, grads, carry.state, frozen, draw))
    assert draw is None or mode is InnerGradient.NONE, (type(rule), mode)
    return _run(rule, family, carry, batch, mode, frozen, None)


def _run(
    rule: UpdateRule,
    family: TaskFamily,
    carry: Carry,
    batch: WindowBatch,
    mode: InnerGradient,
    frozen: Tensor | None,
    grads: Tensor | None,
) -> Rollout:
    """The loop over inner steps; fills ``grads`` (K + 1, S, N) if given."""

    def enter(k: int, grad: Tensor) -> Tensor:
        grad = grad if frozen is None else grad.masked_fill(frozen[:, None], 0.0)
        if grads is not None:
            grads[k] = grad
        return grad

    theta = carry.theta
    update, steep = torch.zeros_like(theta), torch.zeros_like(carry.diverged)
    loss, grad = _loss_and_gradient(family, theta, batch, 0, mode)
    start_loss = torch.where(carry.start_loss.isnan(), loss.detach(), carry.start_loss)
    losses = []
    with torch.set_grad_enabled(mode is not InnerGradient.NONE):
        grad, state = enter(0, grad), rule.open_window(theta, carry.state)
        for k in range(batch.window_length):
            update, state = rule(grad, theta, state)
            if frozen is not None:
                update = update.masked_fill(frozen[:, None], 0.0)
            theta = theta + update
            loss, grad = _loss_and_gradient(family, theta, batch, k + 1, mode)
            grad = enter(k + 1, grad)
            if mode is not InnerGradient.NONE:
                steep = steep | _too_steep(grad.detach())
            losses.append(loss)
        state = rule.close_window(theta, state)
    stacked = torch.stack(losses)
    end = Carry(theta, state, start_loss, steep | has_diverged(stacked.detach(), start_loss, _CEILING))
    return Rollout(end, stacked, update.detach().square().mean(-1).sqrt())


def _too_steep(grads: Tensor) -> Tensor:
    """Where a gradient (..., N) is not finite or so large that products with it overflow, (...)."""
    return ~((grads.amax(-1) <= _STEEPEST) & (grads.amin(-1) >= -_STEEPEST))


def has_diverged(losses: Tensor, start_loss: Tensor, factor: float) -> Tensor:
    """Which slots went astray, (S,): a loss is not finite, or has risen by ``factor`` times its start.

    Args:
        losses: (K, S).
        start_loss: (S,).
        factor: how many times |start| (plus one) a loss may lie above its start.
    """
    bound = start_loss + factor * (start_loss.abs() + 1)
    return ~((losses <= bound) & losses.isfinite()).all(0)


def _loss_and_gradient(
    family: TaskFamily, theta: Tensor, batch: WindowBatch, k: int, mode: InnerGradient
) -> tuple[Tensor, Tensor]:
    """Losses (S,) and their gradients (S, N) at θ on the k-th minibatch of the window."""
    data = {name: leaf[k] for name, leaf in batch.data.items()}
    # Where the window starts, θ does not depend on φ, and no mode needs a graph.
    create_graph = mode is InnerGradient.SECOND_ORDER and theta.requires_grad
    point = theta if create_graph else theta.detach()
    loss, grad = family.losses_and_gradients(point, batch.task, data, create_graph)
    if mode is InnerGradient.FIRST_ORDER:
        # The value is f(θ); the derivative is ⟨∇f, dθ⟩ with ∇f constant, which is all that first order
        # needs of the optimizee: its graph ends here.
        linear = (grad * theta).sum(-1)
        loss = loss + (linear - linear.detach())
    return loss, grad
