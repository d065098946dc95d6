"""The interface of a task family: a distribution over optimization problems with one parameter layout.

Sampling is numpy (it may run in another process); losses are torch and pure.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from l2l_scale.flat import FlatSpec
from l2l_scale.rng import Split

Arrays: TypeAlias = dict[str, np.ndarray]
"""Named arrays: one problem's constants, or one minibatch. Floats are cast to the run's precision later."""

Tensors: TypeAlias = dict[str, Tensor]
"""The same on the device; stacked over slots where a method says so."""


class TaskFamily(ABC):
    """A distribution over tasks. Subclasses hold settings only; nothing changes after ``__init__``."""

    @property
    @abstractmethod
    def spec(self) -> FlatSpec:
        """Names, shapes and groups of one task's parameters."""

    @abstractmethod
    def sample_task(self, rng: np.random.Generator) -> Arrays:
        """Draw the constants of one problem."""

    @abstractmethod
    def sample_init(self, rng: np.random.Generator, task: Arrays) -> np.ndarray:
        """Draw a start point, shape (N,)."""

    def sample_data(self, rng: np.random.Generator, task: Arrays) -> Arrays:
        """Draw what one inner step sees besides the constants: a minibatch or, better, its indices.

        A family that does not override this is deterministic, and no stream is opened for it.
        """
        return {}

    @abstractmethod
    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        """Loss of ONE problem, a scalar; pure and differentiable.

        Args:
            params: named parameters, shapes as in :attr:`spec`.
            task: what :meth:`sample_task` returned, as tensors.
            data: what :meth:`sample_data` returned, as tensors.
        """

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        """Losses of S problems at once: theta (S, N), leaves of task and data (S, ...), result (S,).

        This default maps :meth:`loss` over the slots. Override it where a batched formula is faster.
        """

        def one(flat: Tensor, task: Tensors, data: Tensors) -> Tensor:
            return self.loss(self.spec.unflatten(flat), task, data)

        result: Tensor = torch.vmap(one)(theta, task, data)
        return result

    def for_split(self, split: Split) -> TaskFamily:
        """The same family on the data of a split; families without a data set return themselves."""
        return self

    def prepare(self, device: torch.device) -> None:  # noqa: B027 - an optional hook, empty on purpose
        """Put resident data (a whole data set) on the device, once, before the first loss there."""

    @property
    def has_data(self) -> bool:
        """Whether inner steps see minibatches."""
        return type(self).sample_data is not TaskFamily.sample_data
