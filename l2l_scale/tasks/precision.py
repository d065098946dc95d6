"""Tasks whose matrix products are computed in bfloat16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_scale.tasks.base import Tensors
from l2l_scale.tasks.wrapped import WrappedFamily


@dataclass(frozen=True)
class MixedPrecision(WrappedFamily):
    """The same tasks; matrix products of losses and gradients are computed in bfloat16 (``torch.autocast``).

    θ, losses and gradients have θ's precision as ever, so nothing but the tasks knows of the 16 bits. The
    package's own families sum their losses in θ's precision; an objective of your own best takes its loss of
    ``model(x).float()``, since on a CPU autocast leaves it in 16 bits.

    Autocast is on for the tasks alone and then as it was before, so results are the same inside another
    autocast. A θ of float64 stays so throughout. On torch's meta device, where memory is rehearsed,
    everything counts as float32.

    Args:
        family: what is computed so.
        dtype: torch.bfloat16, and no other. In float16 inner gradients, which are the rule's input, would
            underflow: they span ten orders of magnitude.

    Raises:
        ValueError: if ``dtype`` is another.
    """

    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.dtype != torch.bfloat16:
            raise ValueError(
                f"dtype ({self.dtype}) must be torch.bfloat16: inner gradients span ten orders of magnitude, "
                "which underflow in float16. Full precision is the family itself, not wrapped"
            )

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        """The family's, in mixed precision."""
        theta = next(iter(params.values()))
        with self._autocast(theta):
            value = self.family.loss(params, task, data)
        return value.to(theta.dtype)

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        """The family's, in mixed precision."""
        with self._autocast(theta):
            values = self.family.losses(theta, task, data)
        return values.to(theta.dtype)

    def losses_and_gradients(
        self, theta: Tensor, task: Tensors, data: Tensors, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """The family's, forward and backward in mixed precision."""
        with self._autocast(theta):
            losses, grads = self.family.losses_and_gradients(theta, task, data, create_graph)
        return losses.to(theta.dtype), grads.to(theta.dtype)

    def _autocast(self, theta: Tensor) -> AbstractContextManager[object]:
        if theta.device.type == "meta":
            return nullcontext()  # autocast knows no such device
        # θ is new at every step: a cache would hold memory for nothing. And inside another autocast it would
        # go on giving the old values of a θ that was changed in place.
        return torch.autocast(theta.device.type, self.dtype, cache_enabled=False)
