"""Which kernel a run will use, and a hollow one in its place, which allocates and is never built.

K inner steps, H hidden units.
"""

from __future__ import annotations

import shlex
import shutil
from typing import cast

import torch
from torch import Tensor
from torch.utils.cpp_extension import get_cxx_compiler

from l2l_scale.optimizers import CoordinatewiseLSTM, UpdateRule
from l2l_scale.optimizers.backend import Accelerated, Backend
from l2l_scale.optimizers.fused import FusedRule
from l2l_scale.optimizers.kernels import (
    Kernel,
    KernelUnavailableError,
    Program,
    StepGradient,
    UnsupportedRuleError,
    make_kernel,
    program_of,
)
from l2l_scale.optimizers.kernels.layout import BLOCK

# Coordinate-steps for which sums are kept apart, and how many such parts there are: in cpp/backward.h.
_PART, _MAX_PARTS, _PARTS_BYTES = 4096, 256, 32 << 20


def choose_kernel(
    rule: UpdateRule, backend: Backend, device: torch.device, dtype: torch.dtype
) -> tuple[Kernel | None, str]:
    """What the backend will compute with, None for torch itself; nothing is built. And a word for it.

    Raises:
        UnsupportedRuleError: if a fused backend is asked for and none computes the rule.
        KernelUnavailableError: if it can be seen that its kernel cannot be built here.
    """
    fused_by_choice = dtype == torch.float32 and device.type == "cpu"  # as `accelerate` chooses
    if backend in ("eager", "compiled") or (backend == "auto" and not fused_by_choice):
        return None, "eager" if backend != "compiled" else "compiled, counted as eager"
    compiler = shlex.split(get_cxx_compiler() or "c++")[0]  # type: ignore[no-untyped-call]
    try:
        if device.type == "cpu" and shutil.which(compiler) is not None:
            return HollowKernel(program_of(rule)), "fused"
        kernel = make_kernel(rule, device, bf16=backend == "fused-bf16")
        return HollowKernel(kernel.program, kernel.state_dtype), "fused"
    except (UnsupportedRuleError, KernelUnavailableError) as error:
        if backend != "auto":
            raise
        return None, f"eager ({error})"


def as_computed(kernel: Kernel | None, rule: UpdateRule) -> Accelerated:
    """The rule as that kernel computes it."""
    if kernel is None:
        return Accelerated(rule, "eager")
    return Accelerated(FusedRule(cast("CoordinatewiseLSTM", rule), kernel), "fused")


def workspace_bytes(program: Program, coordinates: int, window: int, dtype: torch.dtype) -> int:
    """What the C++ kernel allocates itself in phase 2; see ``GroupBackward`` and ``backward`` in its sources.

    Args:
        program: of the rule.
        coordinates: of all slots.
        window: K.
        dtype: of φ.
    """
    hidden, layers = program.hidden_size, program.layers
    inputs = program.feature_size + (layers - 1) * hidden
    record = program.state_rows + program.feature_size + program.head_size + 5 * layers * hidden
    rows = record * window + (window + 1) + 2 * program.state_rows + program.feature_size + 8 * hidden
    sums = 4 * hidden * (inputs + layers * (hidden + 1)) + 16 * program.head_size * (hidden + 1)
    thread = rows * BLOCK * dtype.itemsize + sums * dtype.itemsize
    most = min(max(_PARTS_BYTES // (sums * 8), 1), _MAX_PARTS)
    parts = min(max(coordinates * window // _PART, 1), most)
    return torch.get_num_threads() * thread + parts * sums * 8


class HollowKernel(Kernel):
    """Allocates what a kernel returns, and computes nothing.

    Args:
        program: of the rule.
        state_dtype: of the kernel that it stands for.
    """

    def __init__(self, program: Program, state_dtype: torch.dtype | None = None) -> None:
        super().__init__(program)
        self._state_dtype = state_dtype

    @property
    def name(self) -> str:
        """Hollow."""
        return "hollow"

    @property
    def state_dtype(self) -> torch.dtype | None:
        """That of the kernel that it stands for."""
        return self._state_dtype

    def step(self, weights: Tensor, grad: Tensor, state: Tensor, out: Tensor) -> Tensor:
        """An update."""
        return torch.empty_like(grad)

    def step_gradient(
        self, weights: Tensor, grad: Tensor, state: Tensor, d_update: Tensor, d_state: Tensor
    ) -> StepGradient:
        """A step's derivatives."""
        return StepGradient(torch.empty_like(weights), torch.empty_like(grad), torch.empty_like(state))

    def window_gradient(self, weights: Tensor, grads: Tensor, loss_weights: Tensor, state: Tensor) -> Tensor:
        """A window's derivative."""
        return torch.empty_like(weights)
