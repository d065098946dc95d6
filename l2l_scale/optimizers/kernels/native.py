"""The C++ kernel: vectors over coordinates, threads over blocks of them."""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from l2l_scale.optimizers.kernels.base import Kernel, StepGradient
from l2l_scale.optimizers.kernels.build import BFLOAT16, KernelUnavailableError, instruction_set, library
from l2l_scale.optimizers.kernels.program import MAX_FEATURES, Program

_WORK_PER_THREAD = 4096  # coordinate-steps, a third of a millisecond: below, waking a thread costs more
_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}


class _Feature(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("kind", "first_row", "state_row", "log_scale")],
        *[(name, ctypes.c_double) for name in "abc"],
    ]


class _Program(ctypes.Structure):
    _fields_ = [
        *[
            (name, ctypes.c_int32)
            for name in ("hidden_size", "layers", "feature_size", "feature_rows", "num_features", "head")
        ],
        *[(name, ctypes.c_double) for name in ("scale", "exp_scale")],
        ("features", _Feature * MAX_FEATURES),
    ]


class NativeKernel(Kernel):
    """Runs on the CPU in float32 (fast) and float64 (exact: the functions of the C library).

    Args:
        program: of the rule.
        bf16: round the operands of matrix products to bfloat16 where numbers are float32; sums stay float32.

    Raises:
        KernelUnavailableError: if it cannot be built here, or the CPU has no products of bfloat16.
    """

    def __init__(self, program: Program, bf16: bool = False) -> None:
        super().__init__(program)
        self.bf16 = bf16
        check_products(bf16)
        library()

    @property
    def name(self) -> str:
        """C++ and the instruction set."""
        return native_name(self.bf16)

    def step(self, weights: Tensor, grad: Tensor, state: Tensor, out: Tensor) -> Tensor:
        """One inner step."""
        update = torch.empty_like(grad)
        self._call("forward", grad.numel(), grad.dtype, weights, grad.numel(), grad, state, out, update)
        return update

    def step_gradient(
        self, weights: Tensor, grad: Tensor, state: Tensor, d_update: Tensor, d_state: Tensor
    ) -> StepGradient:
        """The derivative of one step."""
        result = StepGradient(torch.empty_like(weights), torch.empty_like(grad), torch.empty_like(state))
        total = grad.numel()
        outputs = (result.weights, result.state, result.grad)
        inputs = (grad, None, d_update, state, d_state)
        self._call("backward", total, grad.dtype, weights, total, total, 1, *inputs, *outputs)
        return result

    def window_gradient(self, weights: Tensor, grads: Tensor, loss_weights: Tensor, state: Tensor) -> Tensor:
        """Phase 2 of a first-order window."""
        result = torch.empty_like(weights)
        steps, problems = loss_weights.shape
        total = grads.shape[1]
        inputs = (grads, loss_weights, None, state, None)
        arguments = (weights, total, total // problems, steps, *inputs, result, None, None)
        self._call("backward", total * steps, grads.dtype, *arguments)
        return result

    @cached_property
    def _structure(self) -> _Program:
        """The program as C++ reads it."""
        p = self.program
        structure = _Program(
            p.hidden_size,
            p.layers,
            p.feature_size,
            p.feature_rows,
            len(p.features),
            p.head,
            p.scale,
            p.exp_scale,
        )
        first_row = state_row = 0
        for i, feature in enumerate(p.features):
            codes = (feature.kind, first_row, state_row, feature.log_scale, *feature.numbers)
            structure.features[i] = _Feature(*codes)
            first_row, state_row = first_row + feature.size, state_row + feature.state_rows
        return structure

    def _call(self, name: str, work: int, dtype: torch.dtype, *arguments: Tensor | int | None) -> None:
        """Call a function on ``work`` coordinate-steps."""
        call(name, self.bf16, work, dtype, (ctypes.byref(self._structure),), *arguments)

    def __getstate__(self) -> dict[str, Program | bool]:
        return {"program": self.program, "bf16": self.bf16}  # the structure is made anew in another process


def native_name(bf16: bool) -> str:
    """What a C++ kernel is called in the log."""
    return f"C++ {instruction_set()}{', products in bfloat16' if bf16 else ''}"


def check_products(bf16: bool) -> None:
    """Raise ``KernelUnavailableError`` if products in bfloat16 are asked for, and the CPU has none."""
    if bf16 and instruction_set() != BFLOAT16:
        raise KernelUnavailableError(
            f"this CPU ({instruction_set()}) cannot multiply bfloat16 ({BFLOAT16}); use backend 'fused'"
        )


def call(
    name: str,
    bf16: bool,
    work: int,
    dtype: torch.dtype,
    first: tuple[Any, ...],
    *arguments: Tensor | int | None,
) -> None:
    """Call a function of the C library.

    Args:
        name: without prefix and suffix.
        bf16: products in bfloat16 where numbers are float32.
        work: coordinate-steps, which decide on the number of threads.
        dtype: of all tensors.
        first: the leading arguments, as ctypes takes them.
        arguments: the rest; tensors are passed by address.
    """
    suffix = "bfloat16" if bf16 and dtype == torch.float32 else _SUFFIX[dtype]
    function = getattr(library(), f"l2l_{name}_{suffix}")
    for argument in arguments:
        assert not isinstance(argument, Tensor) or (argument.is_contiguous() and argument.dtype == dtype)
    threads = min(torch.get_num_threads(), 1 + work // _WORK_PER_THREAD)
    if function(*first, *map(_argument, arguments), threads):
        raise MemoryError("the fused kernel's working memory could not be allocated")


def _argument(argument: Tensor | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())
