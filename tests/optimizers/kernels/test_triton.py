"""The Triton kernels in Triton's interpreter, on the CPU, against the eager rule through autograd.

S slots, N coordinates each, M = S · N; K inner steps. The truth is always computed in float64.
"""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import draw_windows, phi_gradient
from torch import Tensor

from l2l_scale.estimators import SumLoss, TruncatedBPTT
from l2l_scale.optimizers import (
    Concatenate,
    CoordinatewiseLSTM,
    Feature,
    Identity,
    InnerStep,
    LogMagnitude,
    LogSign,
    LogSignClamp,
    RNNprop,
    TanhExp,
)
from l2l_scale.optimizers.fused import FusedRule
from l2l_scale.optimizers.kernels import KernelUnavailableError, make_kernel, program_of
from l2l_scale.optimizers.kernels.layout import pack
from l2l_scale.optimizers.kernels.program import flat_weights
from l2l_scale.sampling import Schedule
from l2l_scale.tasks import Quadratic
from l2l_scale.tree import Tree, tree_map
from l2l_scale.unroll import Carry, InnerGradient, WindowBatch, begin, unroll

triton = pytest.importorskip("triton", reason="the GPU kernel is written in Triton: pip install triton")
# Lanes beyond the last coordinate and untaken branches divide by zero, as they may on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

PACKAGE = "l2l_scale.optimizers.kernels"
CUDA = torch.device("cuda")


def fresh_kernel_module(interpret: bool) -> ModuleType:
    """Import the kernels anew, which settles whether they are interpreted; leaves sys.modules as it was."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.startswith(f"{PACKAGE}.gpu.")]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
        for name in ours():
            patch.delitem(sys.modules, name)
        module = importlib.import_module(f"{PACKAGE}.gpu.kernel")
        for name in ours():
            del sys.modules[name]
    return module


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """The module of the kernel, interpreted."""
    return fresh_kernel_module(interpret=True)


def rule_of(
    features: Feature | None = None,
    hidden_size: int = 20,
    layers: int = 2,
    head: Any = None,
    dtype: torch.dtype = torch.float64,
) -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    features = LogSign() if features is None else features
    rule = CoordinatewiseLSTM(hidden_size, layers, features, head, output_scale=1.0)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter += 0.3 * torch.randn_like(parameter) * (parameter.dim() == 1)  # biases start as zeros
    return rule.to(dtype)


def middle(rule: CoordinatewiseLSTM, slots: int, coordinates: int) -> tuple[Carry, WindowBatch]:
    """A window of trajectories under way, in float64, and what it starts from."""
    rule, family = copy.deepcopy(rule).double(), Quadratic(dimension=coordinates, theta0_scale=1.0)
    first, second = draw_windows(family, Schedule(horizon=6, window=2), 2, range(slots))
    rollout = unroll(rule, family, begin(rule, first, None), first, InnerGradient.NONE)
    return begin(rule, second, rollout.carry), second


def to_dtype(tree: Tree, dtype: torch.dtype) -> Tree:
    def convert(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(convert, tree)


def window(rule: Any, start: tuple[Carry, WindowBatch], second_order: bool, dtype: torch.dtype) -> Tensor:
    """∂(meta-loss)/∂φ of a window."""
    carry, batch = start
    carry = Carry(*(to_dtype(leaf, dtype) for leaf in carry))
    batch = batch._replace(theta0=batch.theta0.to(dtype), task=to_dtype(batch.task, dtype))
    family = Quadratic(dimension=carry.theta.shape[1], theta0_scale=1.0)
    return phi_gradient(rule, TruncatedBPTT(second_order, SumLoss())(rule, family, carry, batch).surrogate)


def error(
    kernels: ModuleType,
    rule: CoordinatewiseLSTM,
    second_order: bool = False,
    bf16: bool = False,
    shape: tuple[int, int] = (2, 7),
) -> float:
    """How far the fused window's gradient is from that of the eager rule in float64, relative to its norm."""
    start, dtype = middle(rule, *shape), next(rule.parameters()).dtype
    expected = window(copy.deepcopy(rule).double(), start, second_order, torch.float64)
    assert expected.norm() > 0
    fused = FusedRule(rule, kernels.TritonKernel(program_of(rule), bf16))
    value = window(fused, start, second_order, dtype).double()
    return float((value - expected).norm() / expected.norm())


FEATURES: dict[str, Callable[[], Feature]] = {
    "identity": lambda: Identity(0.5),
    "log-sign-clamp": LogSignClamp,
    "log-magnitude": LogMagnitude,
    "inner-step": lambda: Concatenate([Identity(), InnerStep(2.0)]),
    "nested": lambda: Concatenate(
        [RNNprop(0.9, 0.8, 1e-6, log_scale=True), Concatenate([LogSign(), InnerStep(3.0), RNNprop(0.5, 0.0)])]
    ),
}


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_equals_the_eager_rule(name: str, second_order: bool, kernels: ModuleType) -> None:
    rule = rule_of(FEATURES[name](), hidden_size=3, layers=1, head=TanhExp())
    assert error(kernels, rule, second_order) <= 1e-12


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize(
    ("hidden_size", "layers", "shape"), [(20, 2, (3, 11)), (16, 3, (1, 1)), (33, 1, (2, 7)), (32, 2, (1, 2))]
)
def test_every_size_equals_the_eager_rule(
    hidden_size: int, layers: int, shape: tuple[int, int], second_order: bool, kernels: ModuleType
) -> None:
    """16 and 32 are powers of two, so no column is to spare for the bias."""
    assert error(kernels, rule_of(None, hidden_size, layers), second_order, shape=shape) <= 1e-12


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 2e-6), (True, 5e-3)], ids=["float32", "bf16"])
def test_precisions(bf16: bool, tolerance: float, second_order: bool, kernels: ModuleType) -> None:
    features = Concatenate([LogSign(), LogMagnitude()])
    rule = rule_of(features, 20, 2, TanhExp(), torch.float32)
    assert error(kernels, rule, second_order, bf16) <= tolerance


def test_moving_averages_keep_their_digits_in_float32(kernels: ModuleType) -> None:
    """1 − β^step is a small difference of large numbers for β near one."""
    rule = rule_of(RNNprop(0.99, 0.999, log_scale=True), 4, 1, dtype=torch.float32)
    assert error(kernels, rule, second_order=True, shape=(1, 5)) <= 2e-6


def test_bf16_state_only_where_it_is_precise_enough(kernels: ModuleType) -> None:
    def dtype(features: Feature, bf16: bool) -> torch.dtype | None:
        return kernels.TritonKernel(program_of(rule_of(features)), bf16).state_dtype

    assert dtype(LogSign(), True) == torch.bfloat16
    assert dtype(RNNprop(), True) is dtype(LogSign(), False) is None
    assert error(kernels, rule_of(RNNprop(), 4, 1, dtype=torch.float32), bf16=True) <= 5e-3


def step_inputs(rule: CoordinatewiseLSTM, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """φ, gradients and a packed state."""
    program = program_of(rule)
    torch.manual_seed(1)
    grad = torch.randn(total, dtype=torch.float64)
    state = rule.init_state(grad[None])
    with torch.no_grad():
        for _ in range(2):
            _, state = rule(grad[None], grad[None], state)
    return flat_weights(rule).detach(), grad, pack(state, grad[None].shape, program.state_rows)


def test_in_place_equals_out_of_place(kernels: ModuleType) -> None:
    rule = rule_of(Concatenate([RNNprop(), LogSign()]), 5)
    weights, grad, state = step_inputs(rule, 45)
    kernel, after = kernels.TritonKernel(program_of(rule)), torch.empty_like(state)
    update = kernel.step(weights, grad, state.clone(), after)
    assert torch.equal(kernel.step(weights, grad, state, state), update)
    assert torch.equal(state, after)


@pytest.mark.parametrize("features", [LogSign, Identity, LogMagnitude, LogSignClamp, RNNprop])
def test_bad_gradients_stay_with_their_coordinate(
    features: Callable[[], Feature], kernels: ModuleType
) -> None:
    rule = rule_of(features(), 5)
    weights, grad, state = step_inputs(rule, 35)
    grad[3], grad[33] = torch.nan, torch.inf
    theta, rule_state = grad[None], rule.init_state(grad[None])
    kernel, packed = kernels.TritonKernel(program_of(rule)), torch.zeros_like(state)
    with torch.no_grad():
        for _ in range(2):
            expected, rule_state = rule(grad[None], theta, rule_state)
            update = kernel.step(weights, grad, packed, packed)
    assert update[3].isnan()
    assert torch.equal(update.isfinite(), expected[0].isfinite())
    assert torch.allclose(update, expected[0], rtol=1e-12, atol=0, equal_nan=True)


def test_few_programs_share_many_tiles(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rule_of(RNNprop(), 5)
    weights, grad, state = step_inputs(rule, 64)
    grads, loss_weights = torch.stack([grad, -grad, grad.flip(0)]), torch.rand(2, 4, dtype=torch.float64)
    kernel = kernels.TritonKernel(program_of(rule))
    many = kernel.window_gradient(weights, grads, loss_weights, state)
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    few = kernel.window_gradient(weights, grads, loss_weights, state)
    assert (few - many).norm() <= 1e-14 * many.norm()
    assert torch.equal(few, kernel.window_gradient(weights, grads, loss_weights, state))


def test_a_kernel_can_be_sent_to_another_process() -> None:
    kernel = make_kernel(rule_of(), CUDA, bf16=True)
    assert pickle.loads(pickle.dumps(kernel)).spec == kernel.spec  # type: ignore[attr-defined]
    assert kernel.name == "Triton, products in bf16"


def test_without_triton_the_error_names_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{PACKAGE}.gpu.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(KernelUnavailableError, match="pip install triton, or use backend 'eager'"):
        make_kernel(rule_of(), CUDA)


POINTERS_OF_STATE = ("state", "out", "scratch", "d_after", "d_state")
NUMBERS = ("total", "per_problem", "problems", "blocks", "steps", "tiles")


@pytest.fixture
def no_compile_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", ["step_kernel", "window_kernel", "step_gradient_kernel"])
def test_kernels_compile_for_a_gpu(name: str, bf16: bool, no_compile_cache: None) -> None:
    """Down to machine code for Hopper; no GPU is needed for that."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = fresh_kernel_module(interpret=False)
    features = Concatenate([make() for make in FEATURES.values()])
    kernel = module.TritonKernel(program_of(rule_of(features, 4, 1, TanhExp())), bf16)
    function: Any = getattr(module, name)
    state = "*bf16" if kernel.state_dtype else "*fp32"
    types = dict.fromkeys(function.arg_names, "*fp32") | {"spec": "constexpr", "bn": "constexpr"}
    types |= {n: state for n in POINTERS_OF_STATE if n in types}
    types |= {n: "i32" for n in NUMBERS if n in types}
    source = ASTSource(function, types, {"spec": kernel.spec, "bn": kernel.launch.tile})
    options = {"num_warps": kernel.launch.warps, "num_stages": 1}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
