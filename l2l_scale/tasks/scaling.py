"""Tasks whose coordinates are measured in random units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from l2l_scale.checks import check_range
from l2l_scale.rng import Split
from l2l_scale.tasks.base import Arrays, TaskFamily, Tensors
from l2l_scale.tasks.wrapped import WrappedFamily

_T = TypeVar("_T", np.ndarray, Tensor)

_KEY = "random_scaling"
"""The name of c among a task's constants."""


@dataclass(frozen=True)
class RandomScaling(WrappedFamily):
    """For training, f(c θ) in place of f(θ), with c drawn anew for every task and coordinate.

    Starts at θ0 / c, so that the first loss is the family's. The optimizer meets gradients of many scales,
    and learns to depend on them less [Lv, Jiang and Li 2017, "Learning gradient descent: better
    generalization and longer horizons", section 4.1, "random scaling"].

    Validation, tuning and test are on the tasks as they are: :meth:`for_split` gives the bare family.

    Args:
        family: whose tasks are scaled.
        log_range: L; c = exp(u) with u uniform in [−L, L]. The paper's is 3.

    Raises:
        ValueError: if ``log_range`` is negative or above 20, where c spans more than float32 resolves.
    """

    log_range: float = 3.0

    def __post_init__(self) -> None:
        check_range("log_range", self.log_range, 0, 20)

    def sample_task(self, rng: np.random.Generator) -> Arrays:
        """Draw the family's own task, and then c (N,).

        Raises:
            ValueError: if the family has a constant of the same name, as it has if it is scaled already.
        """
        task = self.family.sample_task(rng)
        if _KEY in task:
            raise ValueError(
                f"family ({self.family}) must not have a constant named {_KEY!r}. To scale more, set a "
                "higher log_range in place of a second RandomScaling; else rename the constant"
            )
        return {**task, _KEY: np.exp(rng.uniform(-self.log_range, self.log_range, self.spec.size))}

    def sample_init(self, rng: np.random.Generator, task: Arrays) -> np.ndarray:
        """The family's start point over c, (N,)."""
        own, scale = _part(task)
        start: np.ndarray = self.family.sample_init(rng, own) / scale
        return start

    def sample_data(self, rng: np.random.Generator, task: Arrays) -> Arrays:
        """As the family does."""
        return self.family.sample_data(rng, _part(task)[0])

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        """f(c θ) of one problem."""
        own, scale = _part(task)
        return self.family.loss(self.spec.unflatten(scale * self.spec.flatten(params)), own, data)

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        """f(c θ), by the family's formula for all slots."""
        own, scale = _part(task)
        return self.family.losses(scale * theta, own, data)

    def losses_and_gradients(
        self, theta: Tensor, task: Tensors, data: Tensors, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """f(c θ) and c ∇f(c θ), by the family's formulas."""
        own, scale = _part(task)
        with torch.set_grad_enabled(create_graph):
            losses, grads = self.family.losses_and_gradients(scale * theta, own, data, create_graph)
            return losses, scale * grads

    def pictures(self, task: Arrays, points: Arrays) -> Arrays:
        """The family's, at c θ."""
        own, scale = _part(task)
        return self.family.pictures(own, {name: scale * theta for name, theta in points.items()})

    def for_split(self, split: Split) -> TaskFamily:
        """The scaled family on the training data; on all others the family without scaling."""
        return super().for_split(split) if split is Split.TRAIN else self.family.for_split(split)


def _part(task: dict[str, _T]) -> tuple[dict[str, _T], _T]:
    """The family's own constants, and c."""
    own = dict(task)
    scale = own.pop(_KEY)
    return own, scale
