"""What all families have in common that wrap another one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from l2l_scale.flat import FlatSpec
from l2l_scale.rng import Split
from l2l_scale.tasks.base import Arrays, TaskFamily, Tensors


@dataclass(frozen=True)
class WrappedFamily(TaskFamily):
    """Another family, unchanged. Subclasses override what is to be different.

    Args:
        family: what is wrapped.
    """

    family: TaskFamily

    @property
    def spec(self) -> FlatSpec:
        """The family's own."""
        return self.family.spec

    @property
    def has_data(self) -> bool:
        """Whether the family has minibatches."""
        return self.family.has_data

    @property
    def has_gradient_formula(self) -> bool:
        """Whether gradients are written out both here and in the family."""
        return super().has_gradient_formula and self.family.has_gradient_formula

    @property
    def has_pictures(self) -> bool:
        """Whether the family has something to look at."""
        return self.family.has_pictures

    def sample_task(self, rng: np.random.Generator) -> Arrays:
        """As the family does."""
        return self.family.sample_task(rng)

    def sample_init(self, rng: np.random.Generator, task: Arrays) -> np.ndarray:
        """As the family does."""
        return self.family.sample_init(rng, task)

    def sample_data(self, rng: np.random.Generator, task: Arrays) -> Arrays:
        """As the family does."""
        return self.family.sample_data(rng, task)

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        """The family's own."""
        return self.family.loss(params, task, data)

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        """The family's own."""
        return self.family.losses(theta, task, data)

    def losses_and_gradients(
        self, theta: Tensor, task: Tensors, data: Tensors, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """The family's own."""
        return self.family.losses_and_gradients(theta, task, data, create_graph)

    def for_split(self, split: Split) -> TaskFamily:
        """The same around the family on the data of a split."""
        return replace(self, family=self.family.for_split(split))

    def scores(self, theta: Tensor, task: Tensors) -> Tensors:
        """The family's own."""
        return self.family.scores(theta, task)

    def pictures(self, task: Arrays, points: Arrays) -> Arrays:
        """The family's own."""
        return self.family.pictures(task, points)

    def prepare(self, device: torch.device) -> None:
        """Put the family's resident data on the device."""
        self.family.prepare(device)


def unwrapped(family: TaskFamily) -> TaskFamily:
    """The family inside all wrappers; one that is not wrapped is itself."""
    while isinstance(family, WrappedFamily):
        family = family.family
    return family
