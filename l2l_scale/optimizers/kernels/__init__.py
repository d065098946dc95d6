"""Fused kernels for the coordinatewise LSTM: one contract, one kernel per kind of device."""

from __future__ import annotations

import torch

from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.optimizers.kernels.base import Kernel, StepGradient
from l2l_scale.optimizers.kernels.build import KernelUnavailableError
from l2l_scale.optimizers.kernels.native import NativeKernel
from l2l_scale.optimizers.kernels.program import Program, UnsupportedRuleError, program_of

__all__ = [
    "Kernel",
    "KernelUnavailableError",
    "NativeKernel",
    "Program",
    "StepGradient",
    "UnsupportedRuleError",
    "make_kernel",
    "program_of",
]


def make_kernel(rule: UpdateRule, device: torch.device, bf16: bool = False) -> Kernel:
    """Return the kernel that computes a rule on a device.

    Args:
        rule: the rule.
        device: where it runs.
        bf16: matrix products in bfloat16, sums in float32.

    Raises:
        UnsupportedRuleError: if no kernel computes this rule.
        KernelUnavailableError: if there is none for the device, or it cannot be built here.
    """
    program = program_of(rule)
    if device.type == "cpu":
        return NativeKernel(program, bf16)
    if device.type == "cuda":
        return _gpu_kernel(program, bf16)
    raise KernelUnavailableError(f"there is no fused kernel for {device.type} devices")


def _gpu_kernel(program: Program, bf16: bool) -> Kernel:
    try:  # imported here alone: Triton is large, and only there for Linux with a GPU
        from l2l_scale.optimizers.kernels.gpu.kernel import TritonKernel
    except ImportError as error:
        raise KernelUnavailableError(
            f"the GPU kernel needs Triton ({error}): pip install triton, or use backend 'eager' or 'compiled'"
        ) from error
    return TritonKernel(program, bf16)
