"""The GPU kernel, in Triton. Imports triton: import it only where that is wanted.

M coordinates, K inner steps; the kernels themselves are in the modules step and gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from l2l_scale.optimizers.kernels.base import Kernel, StepGradient
from l2l_scale.optimizers.kernels.gpu.gradient import step_gradient_kernel, window_kernel
from l2l_scale.optimizers.kernels.gpu.spec import make_spec
from l2l_scale.optimizers.kernels.gpu.step import INTERPRETED, step_kernel
from l2l_scale.optimizers.kernels.layout import BLOCK
from l2l_scale.optimizers.kernels.program import Program

PROGRAMS = 528
"""Programs that share a backward pass: four for each multiprocessor of an H100. Sums are grouped by program,
so the number is the same on every device, and with it the result."""


class Launch(NamedTuple):
    """How a kernel is cut up."""

    tile: int
    """BN, coordinates per tile: a power of two from 16 on."""
    warps: int


class TritonKernel(Kernel):
    """Runs on a GPU; in Triton's interpreter, also on the CPU.

    Args:
        program: of the rule.
        bf16: operands of matrix products in bfloat16, sums in float32; the state too is held in bfloat16,
            unless features have a state: counts and averages need more digits.
        product: how float32 products are computed: exactly on the ordinary units ("ieee"), or in three passes
            on tensor cores, good to some 2^-21 ("tf32x3"). If not given, exactly up to H = 32; wider layers
            need more registers for that than there are.
    """

    def __init__(
        self, program: Program, bf16: bool = False, product: Literal["ieee", "tf32x3"] | None = None
    ) -> None:
        super().__init__(program)
        self.bf16 = bf16
        if bf16:
            self.spec = make_spec(program, "rounded" if INTERPRETED else "bf16", fast=not INTERPRETED)
        else:
            self.spec = make_spec(program, product or ("ieee" if program.hidden_size <= 32 else "tf32x3"))

    @property
    def name(self) -> str:
        """Triton and the kind of products."""
        return f"Triton, products in {'bf16' if self.bf16 else self.spec.product}"

    @property
    def state_dtype(self) -> torch.dtype | None:
        """Bfloat16 if asked for and precise enough."""
        return torch.bfloat16 if self.bf16 and not self.program.feature_rows else None

    @property
    def launch(self) -> Launch:
        """Of all kernels: tensor cores like 64 rows for 4 warps, ordinary products few numbers per thread."""
        product, wide = self.spec.product, self.spec.units > 32
        if wide:
            return Launch(tile=BLOCK if product == "bf16" else BLOCK // 2, warps=8)
        return Launch(tile=BLOCK, warps=8) if product == "ieee" else Launch(tile=2 * BLOCK, warps=4)

    def step(self, weights: Tensor, grad: Tensor, state: Tensor, out: Tensor) -> Tensor:
        """One inner step."""
        update = torch.empty_like(grad)
        arguments = (weights, grad, state, out, update, grad.numel(), len(state))
        self._run(step_kernel, self._tiles(state), arguments)
        return update

    def step_gradient(
        self, weights: Tensor, grad: Tensor, state: Tensor, d_update: Tensor, d_state: Tensor
    ) -> StepGradient:
        """The derivative of one step."""
        scratch, sums = self._memory(weights, state, steps=1)
        d_before, d_grad = torch.empty_like(state), torch.empty_like(grad)
        tensors = (weights, grad, d_update, state, d_state, scratch, sums, d_before, d_grad)
        arguments = (*tensors, grad.numel(), len(state), 1, self._tiles(state))
        self._run(step_gradient_kernel, len(sums), arguments)
        return StepGradient(_total(sums), d_grad, d_before)

    def window_gradient(self, weights: Tensor, grads: Tensor, loss_weights: Tensor, state: Tensor) -> Tensor:
        """Phase 2 of a first-order window."""
        steps, problems = loss_weights.shape
        scratch, sums = self._memory(weights, state, steps)
        total = grads.shape[1]
        numbers = (total, total // problems, problems, len(state), steps, self._tiles(state))
        arguments = (weights, grads, loss_weights, state, scratch, sums, *numbers)
        self._run(window_kernel, len(sums), arguments)
        return _total(sums)

    def _tiles(self, state: Tensor) -> int:
        return -(-len(state) * BLOCK // self.launch.tile)

    def _memory(self, weights: Tensor, state: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The scratch, and the programs' sums (programs, φ)."""
        programs = min(PROGRAMS, self._tiles(state))
        scratch = state.new_empty(programs, (steps + 1) * self.spec.columns * self.launch.tile)
        return scratch, weights.new_zeros(programs, self.spec.weights)

    def _run(self, kernel: Any, programs: int, arguments: tuple[Tensor | int, ...]) -> None:
        for argument in arguments:
            assert not isinstance(argument, Tensor) or argument.is_contiguous()
        tile, warps = self.launch
        with _device_of(arguments):
            # Loads are not pipelined (one stage): that takes registers, which are the scarce good.
            kernel[(programs,)](*arguments, spec=self.spec, bn=tile, num_warps=warps, num_stages=1)


def _device_of(arguments: tuple[Tensor | int, ...]) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of the tensors."""
    first = arguments[0]
    return torch.cuda.device(first.device) if isinstance(first, Tensor) and first.is_cuda else nullcontext()


def _total(sums: Tensor) -> Tensor:
    """Add the programs' sums, in order and in double."""
    return sums.sum(0, dtype=torch.float64).to(sums.dtype)
