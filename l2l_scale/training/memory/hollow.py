"""Which kernel a run will use, and a hollow one in its place, which allocates and is never built.

K inner steps, H hidden units.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.cpp_extension import get_cxx_compiler

from l2l_scale.optimizers import CoordinatewiseLSTM, UpdateRule
from l2l_scale.optimizers.backend import Accelerated, Backend, is_whole
from l2l_scale.optimizers.fused import FusedRule
from l2l_scale.optimizers.grouped import BoundGroups, Grouped
from l2l_scale.optimizers.kernels import (
    Kernel,
    KernelUnavailableError,
    Program,
    StepGradient,
    UnsupportedRuleError,
    make_kernel,
    program_of,
)
from l2l_scale.optimizers.kernels.cell import CellGradient, CellKernel, FusedLocal, check_cells, fused_cells
from l2l_scale.optimizers.kernels.layout import BLOCK
from l2l_scale.optimizers.network_rule import NetworkRule

# Coordinate-steps for which sums are kept apart, and how many such parts there are: in cpp/parts.h.
_PART, _MAX_PARTS, _PARTS_BYTES = 4096, 256, 32 << 20


class Choice(NamedTuple):
    """How a run will compute its rule."""

    description: str
    compute: Callable[[UpdateRule], Accelerated]
    """The rule as it will be computed, with a hollow kernel where there is one."""
    program: Program | None = None
    """Of the whole rule in one kernel, if it is."""


def choose_kernel(rule: UpdateRule, backend: Backend, device: torch.device, dtype: torch.dtype) -> Choice:
    """What the backend will compute with; nothing is built.

    Raises:
        UnsupportedRuleError: if a fused backend is asked for and none computes the rule.
        KernelUnavailableError: if it can be seen that its kernel cannot be built here.
    """
    fused_by_choice = dtype == torch.float32 and device.type == "cpu"  # as `accelerate` chooses
    if backend in ("eager", "compiled") or (backend == "auto" and not fused_by_choice):
        return _eager("eager" if backend != "compiled" else "compiled, counted as eager")
    if isinstance(rule, Grouped):
        return _grouped(rule, backend, device, dtype)
    try:
        if isinstance(rule, NetworkRule) and not is_whole(rule):
            return _cells(rule, device, backend)
        return _whole(rule, device, backend)
    except (UnsupportedRuleError, KernelUnavailableError) as error:
        if backend != "auto":
            raise
        return _eager(f"eager ({error})")


def _grouped(rule: Grouped, backend: Backend, device: torch.device, dtype: torch.dtype) -> Choice:
    """Every rule by itself. The program is the largest: kernels work, and need their space, one at a time."""
    choices = {
        name: choose_kernel(cast("UpdateRule", part), backend, device, dtype)
        for name, part in rule.rules.items()
    }

    def compute(rule: UpdateRule) -> Accelerated:
        groups = cast("BoundGroups", rule)
        parts = {name: choices[name].compute(part).rule for name, part in groups.parts.items()}
        return Accelerated(groups.computed_by(parts), "grouped")

    description = ", ".join(f"{name}: {choice.description}" for name, choice in choices.items())
    programs = [choice.program for choice in choices.values() if choice.program is not None]
    whole = len(programs) == len(choices)
    return Choice(description, compute, max(programs, key=lambda one: one.state_rows) if whole else None)


def _eager(description: str) -> Choice:
    return Choice(description, lambda rule: Accelerated(rule, "eager"))


def _can_build(device: torch.device) -> bool:
    compiler = shlex.split(get_cxx_compiler() or "c++")[0]  # type: ignore[no-untyped-call]
    return device.type == "cpu" and shutil.which(compiler) is not None


def _whole(rule: UpdateRule, device: torch.device, backend: Backend) -> Choice:
    """The rule as one kernel."""
    if _can_build(device):
        kernel = HollowKernel(program_of(rule))
    else:
        real = make_kernel(rule, device, bf16=backend == "fused-bf16")
        kernel = HollowKernel(real.program, real.state_dtype)

    def compute(rule: UpdateRule) -> Accelerated:
        return Accelerated(FusedRule(cast("CoordinatewiseLSTM", rule), kernel), "fused")

    return Choice("fused", compute, kernel.program)


def _cells(rule: NetworkRule, device: torch.device, backend: Backend) -> Choice:
    """The rule's layers as a kernel each."""
    check_cells(rule.computing, rule.hidden_size)
    if not _can_build(device):
        fused_cells(rule.computing, rule.hidden_size, device, bf16=backend == "fused-bf16")

    def compute(rule: UpdateRule) -> Accelerated:
        local = FusedLocal(HollowCell())
        return Accelerated(cast("NetworkRule", rule).with_local(local), "fused LSTM layers")

    return Choice("fused LSTM layers", compute)


def workspace_bytes(program: Program, coordinates: int, window: int, dtype: torch.dtype) -> int:
    """What the C++ kernel allocates itself in phase 2; see ``GroupBackward`` and ``sum_parts`` there.

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


class HollowCell(CellKernel):
    """Allocates what a layer's kernel returns, and computes nothing."""

    @property
    def name(self) -> str:
        """Hollow."""
        return "hollow"

    def step(self, weights: Tensor, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """H and c."""
        return torch.empty_like(h), torch.empty_like(c)

    def step_gradient(
        self, weights: Tensor, x: Tensor, h: Tensor, c: Tensor, d_h: Tensor, d_c: Tensor
    ) -> CellGradient:
        """A step's derivatives."""
        return CellGradient(*(torch.empty_like(value) for value in (weights, x, h, c)))
