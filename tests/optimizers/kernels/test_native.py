"""The C++ kernel against the eager rule and autograd, both fed with the same gradients.

S slots, N coordinates each, M = S · N; K inner steps. The truth is always computed in float64.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from l2l_scale.optimizers import (
    Concatenate,
    CoordinatewiseLSTM,
    Feature,
    Head,
    Identity,
    InnerStep,
    LogMagnitude,
    LogSign,
    LogSignClamp,
    RNNprop,
    ScaledLinear,
    TanhExp,
)
from l2l_scale.optimizers.kernels import NativeKernel, program_of
from l2l_scale.optimizers.kernels.build import BFLOAT16, instruction_set
from l2l_scale.optimizers.kernels.layout import pack, unpack
from l2l_scale.optimizers.kernels.program import flat_weights
from l2l_scale.tree import Tree, tree_leaves, tree_map

FEATURES = {
    "identity": lambda: Identity(0.5),
    "log-sign": LogSign,
    "log-sign-clamp": LogSignClamp,
    "log-magnitude": LogMagnitude,
    "rnnprop": RNNprop,
    "inner-step": lambda: Concatenate([Identity(), InnerStep(2.0)]),
    "rnnprop-log": lambda: RNNprop(0.9, 0.8, 1e-6, log_scale=True),
    "nested": lambda: Concatenate(
        [RNNprop(log_scale=True), Concatenate([LogSign(), InnerStep(3.0), RNNprop(0.5, 0.7)]), LogMagnitude()]
    ),
    "sixteen": lambda: Concatenate([LogSign(1.0 + i) for i in range(15)] + [RNNprop()]),
}
# Without fused multiply-add (the baseline instruction set) every product is rounded by itself.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6 if instruction_set() == "DEFAULT" else 2e-6}
STEPS = 4

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


class SinglePrecisionClamp(LogSignClamp):
    """LogSignClamp with the ε that it has in float32, for a truth in float64."""

    def forward(self, grad: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        log = (grad.abs() + torch.finfo(torch.float32).eps).log() / self.k
        return torch.stack((log.clamp(min=-1.0), (grad * math.exp(self.k)).clamp(-1.0, 1.0)), dim=-1), state


class Setting(NamedTuple):
    """A rule, its kernel, the truth, and what enters both."""

    rule: CoordinatewiseLSTM
    truth: CoordinatewiseLSTM
    kernel: NativeKernel
    grads: Tensor
    """(K + 1, S, N), over many orders of magnitude and with zeros."""
    state: Tree

    def pack(self, state: Tree) -> Tensor:
        return pack(state, self.grads.shape[1:], self.kernel.program.state_rows).to(self.grads.dtype)

    @property
    def flat(self) -> Tensor:
        return self.grads.flatten(1)

    @property
    def weights(self) -> Tensor:
        return flat_weights(self.rule).detach()


def setting(
    dtype: torch.dtype,
    features: Feature | None = None,
    head: Head | None = None,
    shape: tuple[int, int] = (3, 11),
    hidden_size: int = 5,
    layers: int = 2,
    steps: int = STEPS,
) -> Setting:
    """A rule in the middle of a trajectory."""
    torch.manual_seed(0)
    features = LogSign() if features is None else features
    rule = CoordinatewiseLSTM(hidden_size, layers, features, head, output_scale=1.0)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter += 0.3 * torch.randn_like(parameter) * (parameter.dim() == 1)  # biases start as zeros
    truth = copy.deepcopy(rule.to(dtype)).double()
    if isinstance(features, LogSignClamp) and dtype == torch.float32:
        truth.features = SinglePrecisionClamp(features.k)
    grads = gradients(steps + 4, *shape).to(dtype)
    state = truth.init_state(grads[0].double())
    with torch.no_grad():
        for grad in grads[:3].double():
            _, state = truth(grad, grad, state)
    state = tree_map(lambda leaf: leaf.to(dtype), state)
    return Setting(rule, truth, NativeKernel(program_of(rule)), grads[3:], state)


def gradients(steps: int, slots: int, coordinates: int) -> Tensor:
    numbers = torch.Generator().manual_seed(1)
    shape = (steps, slots, coordinates)
    sizes = 10 ** (12 * torch.rand(shape, generator=numbers, dtype=torch.float64) - 9)
    signs = torch.randint(-8, 9, shape, generator=numbers).sign()  # some are zero
    return sizes * signs


def like(tensor: Tensor, seed: int) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=numbers, dtype=torch.float64).to(tensor.dtype)


def assert_close(value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    value = value.double()
    assert (value - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def assert_trees_close(value: Tree, expected: Tree, dtype: torch.dtype) -> None:
    for a, b in zip(tree_leaves(value), tree_leaves(expected), strict=True):
        assert_close(a, b, dtype)


def check_step(s: Setting) -> None:
    grad, dtype = s.grads[0], s.grads.dtype
    state = s.pack(s.state)
    after = torch.empty_like(state)
    update = s.kernel.step(s.weights, s.flat[0], state, after)
    assert torch.equal(state, s.pack(s.state))
    with torch.no_grad():
        double = tree_map(torch.Tensor.double, s.state)
        expected, expected_state = s.truth(grad.double(), grad.double(), double)
    assert_close(update.view(grad.shape), expected, dtype)
    assert_trees_close(unpack(after, s.state, grad.shape), expected_state, dtype)


def check_step_gradient(s: Setting) -> None:
    grad, dtype = s.grads[0], s.grads.dtype
    d_update, d_state = like(grad, 2), tree_map(lambda leaf: like(leaf, 3), s.state)
    result = s.kernel.step_gradient(
        s.weights, s.flat[0], s.pack(s.state), d_update.flatten(), s.pack(d_state)
    )
    point = grad.double().requires_grad_()
    state = tree_map(lambda leaf: leaf.double().requires_grad_(), s.state)
    update, after = s.truth(point, point, state)
    total = (update * d_update).sum()
    for leaf, adjoint in zip(tree_leaves(after), tree_leaves(d_state), strict=True):
        total = total + (leaf * adjoint).sum()
    leaves = tree_leaves(state)
    d_grad, *d_leaves = torch.autograd.grad(total, [point, *leaves], retain_graph=True)
    size = grad.double().abs().clamp(min=1e-9)  # or the few smallest gradients would be all that counts
    assert_close(result.grad.view(grad.shape) * size, d_grad * size, dtype)
    d_before = tree_leaves(unpack(result.state, s.state, grad.shape))
    for value, expected, leaf in zip(d_before, d_leaves, leaves, strict=True):
        if leaf.dim() == 3:
            assert_close(value, expected, dtype)
        elif leaf.shape == grad.shape != (len(grad), 1):  # m and v; nobody asks for the step count's adjoint
            assert_close(value * leaf.detach(), expected * leaf.detach(), dtype)
    assert_close(result.weights, weight_gradient(s.truth, total), dtype)


def check_window_gradient(s: Setting) -> None:
    steps, slots = len(s.grads) - 1, s.grads.shape[1]
    loss_weights = like(s.grads[1:, :, 0], 4)
    result = s.kernel.window_gradient(s.weights, s.flat, loss_weights, s.pack(s.state))
    theta, total = torch.zeros(slots, s.grads.shape[2]), torch.zeros(())
    state = tree_map(torch.Tensor.double, s.state)
    for k in range(steps):
        update, state = s.truth(s.grads[k].double(), theta, state)
        theta = theta + update
        total = total + (loss_weights[k] * (s.grads[k + 1] * theta).sum(-1)).sum()
    assert_close(result, weight_gradient(s.truth, total), s.grads.dtype)


def weight_gradient(rule: CoordinatewiseLSTM, scalar: Tensor) -> Tensor:
    """Derivative in the flat weights."""
    parameters = list(rule.parameters())
    derivatives = dict(zip(parameters, torch.autograd.grad(scalar, parameters), strict=True))
    cells = [
        part for cell in rule.network.cells for part in (cell.weight_input, cell.weight_hidden, cell.bias)
    ]
    order = [*cells, rule.output.weight, rule.output.bias]
    return torch.cat([derivatives[parameter].flatten() for parameter in order])


def check_all(s: Setting) -> None:
    check_step(s)
    check_step_gradient(s)
    check_window_gradient(s)


@both_precisions
@pytest.mark.parametrize("head", [ScaledLinear(), TanhExp(0.1, 1.5)], ids=["linear", "tanh-exp"])
@pytest.mark.parametrize("features", FEATURES)
def test_every_feature_and_head(features: str, head: Head, dtype: torch.dtype) -> None:
    check_all(setting(dtype, FEATURES[features](), head))


@both_precisions
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("hidden_size", [1, 2, 3, 20, 33, 64])
def test_every_size_of_the_network(hidden_size: int, layers: int, dtype: torch.dtype) -> None:
    check_all(setting(dtype, hidden_size=hidden_size, layers=layers))


@both_precisions
@pytest.mark.parametrize("features", ["log-sign", "nested"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 31), (1, 32), (1, 33), (1, 257), (7, 1), (32, 1), (33, 1), (3, 32), (5, 13), (2, 257)],
)
def test_every_number_of_coordinates_and_slots(
    shape: tuple[int, int], features: str, dtype: torch.dtype
) -> None:
    check_all(setting(dtype, FEATURES[features](), shape=shape))


@both_precisions
@pytest.mark.parametrize("steps", [1, 2, 65])
def test_every_length_of_window(steps: int, dtype: torch.dtype) -> None:
    check_window_gradient(setting(dtype, shape=(2, 40), steps=steps))


def test_window_gradient_of_many_coordinates() -> None:
    s = setting(torch.float32, shape=(3, 4000), steps=20, hidden_size=3, layers=1)
    check_window_gradient(s)


def smooth(s: Setting) -> Setting:
    """Gradients and moving averages away from the kinks of features."""

    def away(leaf: Tensor) -> Tensor:
        return leaf if leaf.shape == (3, 1) else 0.5 + like(leaf, 5).abs()

    return s._replace(grads=away(s.grads), state=tree_map(away, s.state))


def test_step_gradient_equals_finite_differences() -> None:
    s = smooth(setting(torch.float64, FEATURES["nested"](), TanhExp()))
    state, after = s.pack(s.state), torch.empty_like(s.pack(s.state))
    d_update, d_after = like(s.flat[0], 6), s.pack(tree_map(lambda leaf: like(leaf, 7), s.state))
    result = s.kernel.step_gradient(s.weights, s.flat[0], state, d_update, d_after)
    counts = tree_map(lambda leaf: torch.full_like(leaf, leaf.shape != (3, 1)), s.state)
    for seed in range(5):
        directions = (
            like(s.weights, seed),
            like(s.flat[0], seed + 10),
            like(state, seed + 20) * s.pack(counts),
        )

        def value(step: float, directions: tuple[Tensor, Tensor, Tensor] = directions) -> float:
            moved = (x + step * d for x, d in zip((s.weights, s.flat[0], state), directions, strict=True))
            update = s.kernel.step(*moved, after)
            return float((update * d_update).sum() + (after * d_after).sum())

        slope = sum(float((d * x).sum()) for d, x in zip(directions, result, strict=True))
        difference = (8 * (value(1e-4) - value(-1e-4)) - (value(2e-4) - value(-2e-4))) / 12e-4
        assert abs(slope - difference) <= 1e-9 * (abs(slope) + 1)


def apply(s: Setting) -> list[Tensor]:
    """Everything per coordinate that the kernel computes, as (rows, M)."""
    state = s.pack(s.state)
    after, d_after = torch.empty_like(state), s.pack(tree_map(torch.Tensor.cos, s.state))
    update = s.kernel.step(s.weights, s.flat[0], state, after)
    result = s.kernel.step_gradient(s.weights, s.flat[0], state, s.flat[1].sin(), d_after)

    def rows(packed: Tensor) -> Tensor:
        return packed.transpose(0, 1).flatten(1)[:, : s.flat.shape[1]]

    return [update[None], rows(after), result.grad[None], rows(result.state)]


def chosen(s: Setting, coordinates: Tensor) -> Setting:
    """Some of the coordinates, in an order, all of one problem."""
    state = tree_map(
        lambda leaf: leaf.expand(3, 257, *leaf.shape[2:]).flatten(0, 1)[coordinates][None], s.state
    )
    return s._replace(grads=s.flat[:, None, coordinates], state=state)


@both_precisions
@pytest.mark.parametrize("count", [771, 65, 1])
def test_where_a_coordinate_lies_changes_no_bit(count: int, dtype: torch.dtype) -> None:
    s = setting(dtype, FEATURES["nested"](), TanhExp(), shape=(3, 257))
    order = torch.randperm(771, generator=torch.Generator().manual_seed(8))[:count]
    for whole, part in zip(apply(s), apply(chosen(s, order)), strict=True):
        assert torch.equal(whole[:, order], part)


@pytest.mark.parametrize("features", ["log-sign", "rnnprop", "nested"])
@pytest.mark.skipif(instruction_set() != BFLOAT16, reason="this CPU has no products of bfloat16")
def test_gradients_with_products_in_bfloat16_are_within_half_a_percent(features: str) -> None:
    s = setting(torch.float32, FEATURES[features](), shape=(4, 64), hidden_size=20, steps=20)
    arguments = s.weights, s.flat, torch.ones(20, 4), s.pack(s.state)
    exact = s.kernel.window_gradient(*arguments)
    rounded = NativeKernel(s.kernel.program, bf16=True).window_gradient(*arguments)
    assert 1e-5 < (rounded - exact).norm() / exact.norm() <= 5e-3


@both_precisions
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("features", FEATURES)
def test_a_bad_gradient_reaches_its_own_coordinate_only(
    features: str, poison: float, dtype: torch.dtype
) -> None:
    s = setting(dtype, FEATURES[features](), shape=(3, 21))
    before = apply(s)
    s.grads[0, 1, 19] = poison
    others = torch.arange(63) != 40
    after = apply(s)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, others], b[:, others])
    if math.isnan(poison):
        assert after[0][0, 40].isnan()
        assert after[1][-1, 40].isnan()  # its c


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@both_precisions
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    s = setting(dtype, shape=(3, 3000), steps=3)  # small problems have one thread anyhow
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        window = s.kernel.window_gradient(s.weights, s.flat, like(s.grads[1:, :, 0], 4), s.pack(s.state))
        results.append([*apply(s), window])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@both_precisions
def test_a_step_may_overwrite_its_state(dtype: torch.dtype) -> None:
    s = setting(dtype, FEATURES["nested"](), hidden_size=7, layers=3)
    state = s.pack(s.state)
    after = torch.empty_like(state)
    update = s.kernel.step(s.weights, s.flat[0], state, after)
    assert torch.equal(s.kernel.step(s.weights, s.flat[0], state, state), update)
    assert torch.equal(state, after)


def test_a_kernel_can_be_copied_and_pickled() -> None:
    s = setting(torch.float32)
    expected = apply(s)
    for kernel in (copy.deepcopy(s.kernel), pickle.loads(pickle.dumps(s.kernel))):
        for a, b in zip(apply(s._replace(kernel=kernel)), expected, strict=True):
            assert torch.equal(a, b)


def elementary(x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The kernel's own functions, seen through a rule of one unit with gates open or shut; and the truth."""

    def cell(bias: list[float], weight: list[float], output: float) -> tuple[Tensor, Tensor]:
        rule = CoordinatewiseLSTM(1, 1, Identity(), TanhExp(1.0, 1.0))
        with torch.no_grad():
            rule.network.cells[0].weight_input.copy_(torch.tensor(weight)[:, None])
            rule.network.cells[0].weight_hidden.zero_()
            rule.network.cells[0].bias.copy_(torch.tensor(bias))
            rule.output.weight.copy_(torch.tensor([[0.0], [output]]))
            rule.output.bias.copy_(torch.tensor([50.0, 0.0]))
        state = pack(rule.init_state(x), x.shape, 2)
        update = NativeKernel(program_of(rule)).step(flat_weights(rule).detach(), x, state, state)
        h, c = state.transpose(0, 1).flatten(1)[:, : len(x)].double()
        return (update, c) if output else (h, c)

    double = x.double()
    squashed = cell([50.0, -50.0, 50.0, 0.0], [0.0, 0.0, 0.0, 1.0], 80.0)
    return {
        "tanh": (squashed[1], double.tanh()),
        "sigmoid": (cell([0.0, -50.0, 0.0, 50.0], [1.0, 0.0, 0.0, 0.0], 0.0)[1], double.sigmoid()),
        "exp": (squashed[0], (80 * double.tanh().tanh()).exp()),
    }


@pytest.mark.parametrize(("function", "tolerance"), [("tanh", 4e-7), ("sigmoid", 2e-7), ("exp", 3e-5)])
def test_functions_of_single_precision_are_exact_to_a_few_last_places(
    function: str, tolerance: float
) -> None:
    sizes = torch.logspace(-30, 1.7, 20_000)
    x = torch.cat([-sizes, sizes, torch.linspace(-20, 20, 20_000)])
    value, truth = elementary(x)[function]
    condition = x.double().abs() + 1 if function == "sigmoid" else 1  # far out it is e^x
    assert ((value.double() - truth) / truth / condition).abs().max() <= tolerance
