"""The interface of an update rule: what turns gradients into updates, learned or hand-designed.

Shapes: ``*`` are any leading axes of independent problems (usually slots S), N the coordinates of one
problem, H hidden units, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from l2l_scale.tree import Tree


class UpdateRule(nn.Module, ABC):
    """θ_{t+1} = θ_t + update, (update, state_{t+1}) = rule(∇f(θ_t), θ_t, state_t); φ are its parameters.

    A rule is pure: what it remembers between inner steps is in ``state``, never in attributes.
    Every leaf of the state has the leading axes of θ first; one number per problem has shape (*, 1).
    Every argument of ``__init__`` is kept as an attribute of the same name (parts of a rule do so too), so
    that a rule can be written to a file and built again.
    """

    @abstractmethod
    def init_state(self, theta: Tensor) -> Tree:
        """State before the first inner step at ``theta`` (*, N)."""

    @abstractmethod
    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step: the update to add to θ, (*, N), and the new state.

        Args:
            grad: ∇f(θ), (*, N).
            theta: θ, (*, N).
            state: from :meth:`init_state` or the previous step.
        """
