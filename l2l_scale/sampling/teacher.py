"""A teacher: a hand-designed optimizer that works on every task too, so that φ can be compared with it.

T inner steps of a trajectory, N coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from l2l_scale.cores import one_thread
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.tasks.base import Arrays, TaskFamily, Tensors
from l2l_scale.tree import tree_map


@dataclass(frozen=True)
class Teacher:
    """Runs an optimizer on one task after another, with the minibatches that φ will see.

    That costs as many inner steps as φ makes, so it is work for sampling actors. Each task is run alone and
    in one thread: rounding then does not depend on which tasks are drawn together.

    Args:
        rule: the optimizer, with the hyper-parameters that ``l2l-scale tune`` found, say.
        iterates: keep the points that it passed as well: T + 1 times N numbers for each task.
    """

    rule: UpdateRule
    iterates: bool = False

    @property
    def gives(self) -> frozenset[str]:
        """What there is to compare with: names in :attr:`WindowBatch.teacher`."""
        return frozenset({"losses", "theta"} if self.iterates else {"losses"})

    def __call__(
        self, family: TaskFamily, task: Arrays, theta0: np.ndarray, minibatches: Sequence[Arrays]
    ) -> Arrays:
        """The teacher's own trajectory: "losses" f(θ_1) … f(θ_T), (T,); "theta" θ_0 … θ_T, (T + 1, N).

        Args:
            family: whose task it is.
            task: its constants.
            theta0: its start point, (N,).
            minibatches: T + 1 of them, as for :attr:`WindowBatch.data`.
        """
        family.prepare(torch.device("cpu"))
        with one_thread(), torch.no_grad():
            theta, constants = _one_slot(theta0), {name: _one_slot(leaf) for name, leaf in task.items()}
            rule = self.rule.for_spec(family.spec)
            state, losses, points = rule.init_state(theta), [], []
            for step, minibatch in enumerate(minibatches):
                data: Tensors = {name: _one_slot(leaf) for name, leaf in minibatch.items()}
                loss, grad = family.losses_and_gradients(theta, constants, data, create_graph=False)
                losses.append(loss)
                points.append(theta)
                if step + 1 < len(minibatches):
                    update, state = rule(grad, theta, state)
                    theta, state = theta + update, tree_map(lambda leaf: leaf.detach(), state)
        taught = {"losses": torch.cat(losses[1:]).numpy()}
        return {**taught, "theta": torch.cat(points).numpy()} if self.iterates else taught


def _one_slot(leaf: np.ndarray) -> Tensor:
    value = torch.from_numpy(np.asarray(leaf)[None])
    return value.float() if value.is_floating_point() else value
