"""One LSTM layer as a fused kernel, for rules in which something else stands between the layers.

A rule with global averaging cells or a memory cannot be one kernel: a mean over all coordinates comes after
every layer. What is left to fuse is the local part of each layer, and that is where most of the time goes.
The kernel keeps nothing but its inputs, and computes itself again when its derivative is asked for.

M coordinates of all problems, I inputs, H hidden units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l2l_scale.optimizers.cells import Computing, LSTMCell
from l2l_scale.optimizers.kernels.build import KernelUnavailableError, library
from l2l_scale.optimizers.kernels.native import call, check_products, native_name
from l2l_scale.optimizers.kernels.program import MAX_HIDDEN, UnsupportedRuleError


class CellGradient(NamedTuple):
    """What the backward pass of a layer gives."""

    weights: Tensor
    """Flat, as :func:`flat_cell_weights`."""
    x: Tensor
    h: Tensor
    c: Tensor


class CellKernel(ABC):
    """The contract of a kernel of one layer; sizes are those of the tensors, which are contiguous."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is, for the log."""

    @abstractmethod
    def step(self, weights: Tensor, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """H and c after a step, (M, H), for x (M, I)."""

    @abstractmethod
    def step_gradient(
        self, weights: Tensor, x: Tensor, h: Tensor, c: Tensor, d_h: Tensor, d_c: Tensor
    ) -> CellGradient:
        """The derivative of one step, which is computed again, for adjoints of h and c after it."""


class NativeCell(CellKernel):
    """The C++ kernel of one layer.

    Args:
        bf16: round the operands of matrix products to bfloat16 where numbers are float32; sums stay float32.

    Raises:
        KernelUnavailableError: if it cannot be built here, or the CPU has no products of bfloat16.
    """

    def __init__(self, bf16: bool = False) -> None:
        self.bf16 = bf16
        check_products(bf16)
        library()

    @property
    def name(self) -> str:
        """C++ and the instruction set."""
        return native_name(self.bf16)

    def step(self, weights: Tensor, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """H and c after a step, (M, H), for x (M, I)."""
        after = torch.empty_like(h), torch.empty_like(c)
        self._call("cell_forward", x, h, weights, len(x), x, h, c, *after)
        return after

    def step_gradient(
        self, weights: Tensor, x: Tensor, h: Tensor, c: Tensor, d_h: Tensor, d_c: Tensor
    ) -> CellGradient:
        """The derivative of one step, which is computed again."""
        result = CellGradient(*(torch.empty_like(value) for value in (weights, x, h, c)))
        self._call("cell_backward", x, h, weights, len(x), x, h, c, d_h, d_c, *result)
        return result

    def _call(self, name: str, x: Tensor, h: Tensor, *arguments: Tensor | int) -> None:
        call(name, self.bf16, len(x), x.dtype, (x.shape[-1], h.shape[-1]), *arguments)


def flat_cell_weights(cell: LSTMCell) -> Tensor:
    """A layer's weights as one tensor: weight_input (4H, I), weight_hidden (4H, H), bias (4H)."""
    return torch.cat([part.reshape(-1) for part in (cell.weight_input, cell.weight_hidden, cell.bias)])


def check_cells(computing: Computing, hidden_size: int) -> None:
    """Raise ``UnsupportedRuleError`` if layers are too wide for a kernel, or computed in chunks."""
    if hidden_size > MAX_HIDDEN:
        raise UnsupportedRuleError(f"hidden_size ({hidden_size}) must be <= {MAX_HIDDEN} for a fused kernel")
    if computing.chunk is not None:
        raise UnsupportedRuleError(
            f"chunk ({computing.chunk}) must be left out for a fused kernel, which keeps no gates anyway"
        )


def fused_cells(
    computing: Computing, hidden_size: int, device: torch.device, bf16: bool = False
) -> FusedLocal:
    """The local part of a layer as a kernel, for a rule that computes its layers so.

    Raises:
        UnsupportedRuleError: if the layers are too wide, or computed in chunks.
        KernelUnavailableError: if there is no kernel for the device, or it cannot be built here.
    """
    check_cells(computing, hidden_size)
    if device.type != "cpu":
        raise KernelUnavailableError(f"there is no fused kernel for single layers on {device.type} devices")
    return FusedLocal(NativeCell(bf16))


class FusedLocal:
    """Computes the local part of a layer with a kernel; see :func:`cells.local_step`."""

    def __init__(self, kernel: CellKernel) -> None:
        self.kernel = kernel

    def __call__(self, cell: LSTMCell, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """H and c after a step, (*, N, H)."""
        flat = (value.reshape(-1, value.shape[-1]).contiguous() for value in (x, h, c))
        h_after, c_after = _Cell.apply(self.kernel, flat_cell_weights(cell), *flat)  # type: ignore[no-untyped-call]
        return h_after.view(h.shape), c_after.view(c.shape)


class _Cell(torch.autograd.Function):
    """(weights, x, h, c) -> (h, c)."""

    @staticmethod
    def forward(
        ctx: Any, kernel: CellKernel, weights: Tensor, x: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.kernel = kernel
        ctx.save_for_backward(weights, x, h, c)
        return kernel.step(weights, x, h, c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_h: Tensor, d_c: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.kernel.step_gradient(*ctx.saved_tensors, d_h.contiguous(), d_c.contiguous())
