"""The interface of an update rule: what turns gradients into updates, learned or hand-designed.

Shapes: ``*`` are any leading axes of independent problems (usually slots S), N the coordinates of one
problem, H hidden units, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from l2l_scale.flat import FlatSpec
from l2l_scale.tree import Tree

Draw: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From sizes of the coordinates' contributions (M,) to the coordinates drawn (J,) and their weights (J,)."""


class UpdateRule(nn.Module, ABC):
    """θ_{t+1} = θ_t + update, (update, state_{t+1}) = rule(∇f(θ_t), θ_t, state_t); φ are its parameters.

    A rule is pure: what it remembers between inner steps is in ``state``, never in attributes.
    Every leaf of the state has the leading axes of θ first; one number per problem has shape (*, 1).
    Every argument of ``__init__`` is kept as an attribute of the same name (parts of a rule do so too), so
    that a rule can be written to a file and built again.
    """

    safeguarded = False
    """Whether the rule itself returns from steps that went wrong, so that no guard is needed around it."""

    @abstractmethod
    def init_state(self, theta: Tensor) -> Tree:
        """State before the first inner step at ``theta`` (*, N)."""

    @abstractmethod
    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step: the update to add to θ, (*, N), and the new state.

        Args:
            grad: ∇f(θ), (*, N).
            theta: θ, (*, N).
            state: from :meth:`init_state`, :meth:`open_window` or the previous step.
        """

    def for_spec(self, spec: FlatSpec) -> UpdateRule:
        """The same rule, with the very same φ, for tasks with these parameters; most rules do not ask."""
        return self

    def storage_for(self, size: int) -> str:
        """How the state of problems of ``size`` coordinates is stored, for the log, if there is a choice."""
        return ""

    def open_window(self, theta: Tensor, state: Tree) -> Tree:
        """The state in the form that the steps of one window work in; most rules have only one form.

        Without a graph, a step may overwrite what this returns.
        """
        return state

    def close_window(self, theta: Tensor, state: Tree) -> Tree:
        """The inverse of :meth:`open_window`, after the last step."""
        return state


class TwoPhaseRule(UpdateRule):
    """A rule that finds the first-order meta-gradient of a window from the gradients along it.

    Its updates must depend on the gradients alone, coordinate by coordinate: then nothing else of the window
    needs to be kept, and the steps can be computed again in pieces.
    """

    @abstractmethod
    def window_losses(
        self, losses: Tensor, grads: Tensor, state: Tree, frozen: Tensor | None, draw: Draw | None = None
    ) -> Tensor:
        """Phase 2: the losses of a window again, (K, S), now differentiable in φ.

        Args:
            losses: f(θ_1) … f(θ_K), (K, S); a graph that they have goes on.
            grads: ∇f(θ_0) … ∇f(θ_K), (K + 1, S, N): what entered the rule, and the last one.
            state: at the start of the window.
            frozen: (S,) slots that contribute no gradient.
            draw: chooses coordinates to backpropagate through; all of them if not given.
        """
