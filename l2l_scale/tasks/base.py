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

    def losses_and_gradients(
        self, theta: Tensor, task: Tensors, data: Tensors, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """Losses (S,) and their gradients in θ, (S, N): what every inner step asks for.

        This default differentiates :meth:`losses`. Override it where a formula for the gradient is faster. A
        subclass that changes the loss and not the formula gets the default back (:meth:`__init_subclass__`).

        Args:
            theta: (S, N); outside any graph unless ``create_graph``.
            task: as for :meth:`losses`.
            data: as for :meth:`losses`.
            create_graph: whether both results must be differentiable in ``theta``, as the true meta-gradient
                needs it. If not, both are without graph.
        """
        with torch.enable_grad():
            point = theta if create_graph else theta.detach().requires_grad_()
            losses = self.losses(point, task, data)
            (grads,) = torch.autograd.grad(losses.sum(), point, create_graph=create_graph)
        return (losses if create_graph else losses.detach()), grads

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # A formula inherited from below a new loss would be the gradient of another function.
        defined = {name: _depth(cls, name) for name in ("loss", "losses", "losses_and_gradients")}
        if min(defined["loss"], defined["losses"]) < defined["losses_and_gradients"]:
            cls.losses_and_gradients = TaskFamily.losses_and_gradients  # type: ignore[method-assign]

    def for_split(self, split: Split) -> TaskFamily:
        """The same family on the data of a split; families without a data set return themselves."""
        return self

    def prepare(self, device: torch.device) -> None:  # noqa: B027 - an optional hook, empty on purpose
        """Put resident data (a whole data set) on the device, once, before the first loss there."""

    def scores(self, theta: Tensor, task: Tensors) -> Tensors:
        """Figures of merit besides the loss, of S problems at once, by name; here none.

        What is known of a data set is meant, as the accuracy on all of its split; higher is better.

        Args:
            theta: (S, N), the end points of runs.
            task: as for :meth:`losses`.

        Returns:
            (S,) each.
        """
        return {}

    def pictures(self, task: Arrays, points: Arrays) -> Arrays:
        """What there is to look at in ONE problem, by name, (H, W, 3) each in [0, 1]; here nothing.

        Args:
            task: what :meth:`sample_task` returned.
            points: parameters (N,) by name; each becomes the picture of its name, after those of the task.
        """
        return {}

    @property
    def has_gradient_formula(self) -> bool:
        """Whether gradients are written out, and are not torch's derivatives of the losses."""
        return type(self).losses_and_gradients is not TaskFamily.losses_and_gradients

    @property
    def has_data(self) -> bool:
        """Whether inner steps see minibatches."""
        return type(self).sample_data is not TaskFamily.sample_data

    @property
    def has_pictures(self) -> bool:
        """Whether there is something to look at."""
        return type(self).pictures is not TaskFamily.pictures


def _depth(cls: type, name: str) -> int:
    """How many classes lie between a class and the definition of a method that it has."""
    return next(depth for depth, base in enumerate(cls.__mro__) if name in vars(base))
