"""A family whose losses and gradients are compiled by torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from l2l_scale.tasks.base import TaskFamily, Tensors
from l2l_scale.tasks.wrapped import WrappedFamily

LossesAndGradients: TypeAlias = Callable[[Tensor, Tensors, Tensors], tuple[Tensor, Tensor]]
"""From (theta, task, data) to losses and gradients, without graph."""


@dataclass(frozen=True)
class CompiledFamily(WrappedFamily):
    """The same tasks; what an inner step asks of them runs through ``torch.compile``.

    Compiling takes from seconds to a minute, at the first inner step and again for another number of slots.
    Equal to the family itself up to rounding. For families of many small operations: what is one or two
    matrix products is not faster.

    Args:
        family: what is compiled.
    """

    def losses_and_gradients(
        self, theta: Tensor, task: Tensors, data: Tensors, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """Compiled.

        Raises:
            ValueError: if the results are to have a graph.
        """
        if create_graph:
            raise ValueError(
                "compiled tasks have no second derivatives (torch.compile cannot differentiate twice), but "
                "the true meta-gradient needs them: use the family itself, or first order"
            )
        with torch.no_grad():  # always: another grad mode would be compiled anew
            losses, grads = self._compiled(theta, task, data)
        if theta.is_cuda:  # the next replay of the CUDA graph writes into the same memory
            losses, grads = losses.clone(), grads.clone()
        return losses, grads

    @cached_property
    def _compiled(self) -> LossesAndGradients:
        # On a GPU as a CUDA graph: there launches dominate small tasks.
        compiled: LossesAndGradients = torch.compile(_traceable(self.family), mode="reduce-overhead")
        return compiled

    def __getstate__(self) -> dict[str, TaskFamily]:
        return {"family": self.family}  # compiled code stays in its process


def _traceable(family: TaskFamily) -> LossesAndGradients:
    """Losses and gradients in a form that torch.compile takes in one piece."""

    def by_formula(theta: Tensor, task: Tensors, data: Tensors) -> tuple[Tensor, Tensor]:
        return family.losses_and_gradients(theta, task, data, create_graph=False)

    def by_derivative(theta: Tensor, task: Tensors, data: Tensors) -> tuple[Tensor, Tensor]:
        def total(point: Tensor) -> tuple[Tensor, Tensor]:
            losses = family.losses(point, task, data)
            return losses.sum(), losses

        grads, losses = torch.func.grad(total, has_aux=True)(theta)
        return losses, grads

    # torch.autograd.grad, which the default calls, would cut the function into pieces.
    return by_formula if family.has_gradient_formula else by_derivative
