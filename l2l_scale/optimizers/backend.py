"""How a rule's steps are computed: op by op, compiled by torch, or in a fused kernel."""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal, NamedTuple, TypeAlias, cast, get_args

import torch
from torch import Tensor

from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.optimizers.coordinatewise import CoordinatewiseLSTM
from l2l_scale.optimizers.fused import FusedRule
from l2l_scale.optimizers.grouped import BoundGroups, Grouped
from l2l_scale.optimizers.kernels import KernelUnavailableError, UnsupportedRuleError, make_kernel, program_of
from l2l_scale.optimizers.kernels.cell import check_cells, fused_cells
from l2l_scale.optimizers.network_rule import NetworkRule
from l2l_scale.tree import Tree

_LOG = logging.getLogger(__name__)

Backend: TypeAlias = Literal["auto", "eager", "compiled", "fused", "fused-bf16"]
"""Ways to compute a rule; all give the same results up to rounding.

- eager: torch's operations one after the other, differentiated by autograd; the reference.
- compiled: ``torch.compile`` of one step (CUDA graphs on a GPU); takes from seconds to a minute to compile.
- fused: one kernel, in C++ on a CPU, in Triton on a GPU. First-order windows run in two phases and keep 29
  times less than eager. Where coordinates hear of each other, each LSTM layer is a kernel (on a CPU).
- fused-bf16: as fused, with matrix products in bfloat16 and sums in float32.
- auto: fused in float32 on a CPU, where there is a kernel for the rule; else eager. On a GPU the kernel has
  to be asked for: it is tested in Triton's interpreter only, and its speed is not known yet.
"""


class Accelerated(NamedTuple):
    """A rule as it will be computed."""

    rule: UpdateRule
    """Has the very parameters of the original."""
    description: str
    """For the log: which backend, and why not a faster one."""


class CompiledRule(UpdateRule):
    """Computes a rule's step with ``torch.compile``. Holds the very rule."""

    def __init__(self, rule: UpdateRule) -> None:
        super().__init__()
        self.rule = rule
        on_gpu = any(parameter.is_cuda for parameter in rule.parameters())
        self._compiled = torch.compile(rule, mode="reduce-overhead" if on_gpu else "default")

    def init_state(self, theta: Tensor) -> Tree:
        """The rule's own state."""
        return self.rule.init_state(theta)

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step."""
        update, after = self._compiled(grad, theta, state)
        return update, after


def accelerate(rule: UpdateRule, backend: Backend, device: torch.device, dtype: torch.dtype) -> Accelerated:
    """Return the rule as the backend computes it.

    Args:
        rule: any rule, bound to the parameters of a task; it must be on the device already.
        backend: what to use.
        device: where it will run.
        dtype: of θ.

    Raises:
        ValueError: if there is no such backend, or a fused one was asked for and none computes this rule, or
            in this precision.
        KernelUnavailableError: if a fused backend was asked for and its kernel cannot be built here.
    """
    check_backend(backend)
    if isinstance(rule, BoundGroups):
        parts = {name: accelerate(part, backend, device, dtype) for name, part in rule.parts.items()}
        description = ", ".join(f"{name}: {part.description}" for name, part in parts.items())
        return Accelerated(rule.computed_by({name: part.rule for name, part in parts.items()}), description)
    if backend == "eager":
        return Accelerated(rule, "eager")
    if backend == "compiled":
        return Accelerated(CompiledRule(rule), "compiled by torch")
    if backend in ("fused", "fused-bf16"):
        _check_precision(rule, backend, dtype)
    if backend == "auto" and dtype != torch.float32:
        return Accelerated(rule, f"eager (fused kernels are for float32, not {dtype})")
    if backend == "auto" and device.type == "cuda":
        return Accelerated(rule, "eager (the GPU kernel is new: backend 'fused' asks for it)")
    try:
        return _fused(rule, device, bf16=backend == "fused-bf16")
    except (UnsupportedRuleError, KernelUnavailableError) as error:
        if backend != "auto":
            raise
        if isinstance(error, KernelUnavailableError):
            _warn(str(error))
        return Accelerated(rule, f"eager ({error})")


def _fused(rule: UpdateRule, device: torch.device, bf16: bool) -> Accelerated:
    """The rule as one kernel, or else its LSTM layers as a kernel each.

    Raises:
        UnsupportedRuleError: if no kernel computes it.
        KernelUnavailableError: if there is none for the device, or it cannot be built here.
    """
    if isinstance(rule, NetworkRule) and not is_whole(rule):
        local = fused_cells(rule.computing, rule.hidden_size, device, bf16)
        return Accelerated(rule.with_local(local), f"fused LSTM layers ({local.kernel.name})")
    kernel = make_kernel(rule, device, bf16)
    return Accelerated(FusedRule(cast("CoordinatewiseLSTM", rule), kernel), f"fused ({kernel.name})")


def is_whole(rule: UpdateRule) -> bool:
    """Whether one kernel computes the whole rule: its coordinates do not hear of each other."""
    return type(rule) is CoordinatewiseLSTM and rule.sharing is None


def check_fusable(rule: UpdateRule) -> None:
    """Raise ``UnsupportedRuleError`` if no kernel computes this rule, whatever the device."""
    if isinstance(rule, Grouped):
        for part in rule.rules.values():
            check_fusable(cast("UpdateRule", part))
    elif isinstance(rule, NetworkRule) and not is_whole(rule):
        check_cells(rule.computing, rule.hidden_size)
    else:
        program_of(rule)


def _check_precision(rule: UpdateRule, backend: str, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` unless the kernels compute in this precision."""
    known = [torch.float32] if backend == "fused-bf16" else [torch.float32, torch.float64]
    own = {parameter.dtype for parameter in rule.parameters()}
    if dtype not in known or own - {dtype}:
        raise ValueError(
            f"backend ({backend!r}) computes in {' or '.join(map(str, known))}, rule and θ alike; here "
            f"the rule has {', '.join(map(str, own))} and θ {dtype}. Use backend 'eager' or 'auto'"
        )


@cache
def _warn(reason: str) -> None:
    """Say, once in a process, that rules are slower than they could be."""
    _LOG.warning("learned rules run without a fused kernel, several times slower: %s", reason)


def check_backend(backend: str) -> None:
    """Raise ``ValueError`` unless there is such a backend."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend ({backend!r}) must be one of {', '.join(get_args(Backend))}")
