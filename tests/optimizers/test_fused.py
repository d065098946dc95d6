"""The fused rule in windows, single steps and autograd, against the eager rule.

S slots, N coordinates each, M = S · N; K inner steps.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Regression, draw_windows, phi_gradient, small_lstm
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from l2l_scale.deploy import describe_rule
from l2l_scale.estimators import LastLoss, LogLoss, MetaLoss, NormalizedLoss, SumLoss, TruncatedBPTT
from l2l_scale.flat import FlatSpec
from l2l_scale.optimizers import CoordinatewiseLSTM, LogSign, RNNprop, UpdateRule
from l2l_scale.optimizers.fused import FusedRule
from l2l_scale.optimizers.kernels import make_kernel
from l2l_scale.sampling import Schedule
from l2l_scale.tasks import Arrays, Quadratic, TaskFamily, Tensors
from l2l_scale.tree import Tree, tree_detach, tree_leaves, tree_map
from l2l_scale.unroll import Carry, InnerGradient, Rollout, WindowBatch, begin, unroll

FAMILIES = [Quadratic(dimension=4, theta0_scale=1.0), Quadratic(dimension=37, w_scale=0.2), Regression()]
META_LOSSES: list[MetaLoss] = [
    SumLoss(),
    LastLoss(),
    LogLoss(),
    NormalizedLoss(),
    SumLoss([0.5, 0, 2, 3.0] * 3),
]
SCHEDULE = Schedule(horizon=12, window=4)

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{type(f).__name__}-{f.spec.size}")


def fused(rule: CoordinatewiseLSTM) -> FusedRule:
    return FusedRule(rule, make_kernel(rule, torch.device("cpu")))


def equal(a: Tree, b: Tree) -> bool:
    """Bit for bit; the first loss of a fresh trajectory is NaN."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x.nan_to_num(123.0), y.nan_to_num(123.0)) for x, y in pairs)


def assert_close(a: Tree, b: Tree, tolerance: float = 1e-12) -> None:
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        assert x.shape == y.shape
        assert (x - y).norm() <= tolerance * y.norm()


def middle(rule: UpdateRule, family: TaskFamily) -> tuple[Carry, WindowBatch]:
    """A staggered window of trajectories under way, and what it starts from."""
    first, second = draw_windows(family, SCHEDULE, 2, range(5), torch.get_default_dtype())
    rollout = unroll(rule, family, begin(rule, first, None), first, InnerGradient.NONE)
    return begin(rule, second, rollout.carry), second


def meta_gradient(
    rule: UpdateRule, family: TaskFamily, estimator: TruncatedBPTT, carry: Carry, batch: WindowBatch
) -> tuple[Rollout, Tensor]:
    """The window, and the estimate as it arrives in ``.grad``."""
    estimate = estimator(rule, family, carry, batch)
    rule.zero_grad()
    estimate.surrogate.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in rule.parameters()])
    return tree_detach(estimate.rollout), gradient


@every_family
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("meta_loss", META_LOSSES, ids=lambda m: f"{type(m).__name__}-{len(m.weights or ())}")
def test_windows_equal_those_of_the_eager_rule(
    meta_loss: MetaLoss, second_order: bool, family: TaskFamily, double: torch.dtype
) -> None:
    rule = small_lstm()
    carry, batch = middle(rule, family)
    estimator = TruncatedBPTT(second_order, meta_loss)
    rollout, gradient = meta_gradient(rule, family, estimator, carry, batch)
    assert gradient.norm() > 0
    again, other = meta_gradient(fused(rule), family, estimator, carry, batch)
    assert_close((again.losses, again.carry.theta, again.carry.state), (rollout.losses, *rollout.carry[:2]))
    assert_close(other, gradient)
    assert torch.equal(again.carry.diverged, rollout.carry.diverged)


@every_family
def test_all_modes_run_the_same_window(family: TaskFamily) -> None:
    rule = small_lstm()
    carry, batch = middle(rule, family)
    start = tree_map(torch.clone, carry)
    rollouts = [unroll(fused(rule), family, carry, batch, mode) for mode in InnerGradient]
    assert equal(carry, start)
    for rollout in rollouts[1:]:
        assert equal(rollout, rollouts[0])


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_windows_compose(family: TaskFamily, dtype: torch.dtype) -> None:
    rule = fused(small_lstm().to(dtype))

    def run(window: int) -> Rollout:
        schedule, carry, losses = Schedule(horizon=20, window=window, staggered=False), None, []
        for batch in draw_windows(family, schedule, 20 // window, dtype=dtype):
            rollout = unroll(rule, family, begin(rule, batch, carry), batch, InnerGradient.NONE)
            losses.append(rollout.losses)
            carry = rollout.carry
        return rollout._replace(losses=torch.cat(losses))

    whole, halves, steps = run(20), run(10), run(1)
    assert equal(halves.losses, whole.losses)
    assert equal(steps.losses, whole.losses)
    for rollout in (halves, steps):
        assert equal((rollout.carry.theta, rollout.carry.state), (whole.carry.theta, whole.carry.state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_steps_equal_those_of_a_window(dtype: torch.dtype) -> None:
    rule = fused(small_lstm().to(dtype))
    grads = torch.randn(6, 3, 15, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        state = rule.init_state(grads[0])
        opened = rule.open_window(grads[0], state)
        for grad in grads:
            expected, opened = rule(grad, grad, opened)
            update, state = rule(grad, grad, state)
            assert torch.equal(update, expected)
        assert equal(state, rule.close_window(grads[0], opened))


def strided(tensor: Tensor) -> Tensor:
    """The same numbers in another order in memory."""
    wide = torch.empty(*tensor.shape[::-1], 2, dtype=tensor.dtype)[..., 0].permute(*range(tensor.dim())[::-1])
    return wide.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_of_any_strides_give_the_same_bits(dtype: torch.dtype) -> None:
    rule = fused(small_lstm().to(dtype))
    grad = torch.randn(3, 15, dtype=dtype, generator=torch.Generator().manual_seed(0))
    state = rule(grad, grad, rule.init_state(grad))[1]
    other_grad, other_state = strided(grad), tree_map(strided, state)
    assert not other_grad.is_contiguous()
    assert equal(rule(other_grad, strided(grad), other_state), rule(grad, grad, state))
    family = FAMILIES[0]
    carry, batch = middle(rule, family) if dtype == torch.float32 else (None, None)
    if batch is not None:
        other = Carry(strided(carry.theta), tree_map(strided, carry.state), *carry[2:])
        for mode in InnerGradient:
            results = [unroll(rule, family, c, batch, mode) for c in (carry, other)]
            assert equal(*results)


def test_a_step_in_a_graph_has_the_derivatives_of_the_eager_step(double: torch.dtype) -> None:
    rule = small_lstm()
    grads = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.rand(2, 7, generator=torch.Generator().manual_seed(1))

    def derivatives(rule: UpdateRule) -> Any:
        state, total = rule.init_state(grads[0]), torch.zeros(())
        for grad in grads:
            update, state = rule(grad, grad, state)
            total = total + (weights * update).sum()
        total = total + sum(leaf.sin().sum() for leaf in tree_leaves(state))
        return torch.autograd.grad(total, [grads, *rule.parameters()])

    assert_close(derivatives(fused(rule)), derivatives(rule))


def test_a_double_backward_is_refused() -> None:
    rule = fused(small_lstm())
    grad = torch.ones(1, 3, requires_grad=True)
    update, _ = rule(grad, grad, rule.init_state(grad))
    (slope,) = torch.autograd.grad(update.square().sum(), grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def poisoned(batch: WindowBatch, slot: int, value: float) -> WindowBatch:
    """The window with a task in one slot that goes astray."""
    task = {name: leaf.clone() for name, leaf in batch.task.items()}
    task["w"][slot] = value
    return batch._replace(task=task)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize(
    "meta_loss", [SumLoss(), LogLoss(), NormalizedLoss()], ids=lambda m: type(m).__name__
)
def test_a_diverged_slot_contributes_nothing_and_disturbs_no_other(
    meta_loss: MetaLoss, value: float, second_order: bool, double: torch.dtype
) -> None:
    rule, family, estimator = small_lstm(), FAMILIES[0], TruncatedBPTT(second_order, meta_loss)
    carry, clean = middle(rule, family)
    batch = poisoned(clean, 2, value)
    _, gradient = meta_gradient(rule, family, estimator, carry, batch)
    again, other = meta_gradient(fused(rule), family, estimator, carry, batch)
    assert torch.equal(again.carry.diverged, torch.arange(5) == 2)
    assert gradient.isfinite().all()
    assert_close(other, gradient)
    alive = [0, 1, 3, 4]
    undisturbed = unroll(fused(rule), family, carry, clean, InnerGradient.FIRST_ORDER)
    assert torch.equal(again.losses[:, alive], undisturbed.losses[:, alive])
    values = meta_loss(undisturbed.losses, undisturbed.carry.start_loss, batch)
    expected = phi_gradient(fused(rule), values[alive].sum() / 5)
    if not second_order:
        assert_close(other, expected)


@pytest.mark.parametrize("mode", InnerGradient)
def test_frozen_slots_stay_where_they_are(mode: InnerGradient, double: torch.dtype) -> None:
    rule, family = small_lstm(), FAMILIES[0]
    carry, batch = middle(rule, family)
    frozen = torch.tensor([True, False, False, True, False])
    eager, other = (unroll(r, family, carry, batch, mode, frozen) for r in (rule, fused(rule)))
    assert torch.equal(other.carry.theta[frozen], carry.theta[frozen])
    assert_close((other.losses, other.carry.theta, other.carry.state), (eager.losses, *eager.carry[:2]))
    if mode is not InnerGradient.NONE:
        weights = torch.rand(eager.losses.shape, generator=torch.Generator().manual_seed(0))
        gradients = [
            phi_gradient(r, (weights * rollout.losses).sum()) for r, rollout in ((rule, eager), (rule, other))
        ]
        assert_close(gradients[1], gradients[0])


def test_a_gradient_that_is_no_number_harms_its_own_coordinate_only() -> None:
    rule = fused(small_lstm())
    grad = torch.randn(4, 19, generator=torch.Generator().manual_seed(0))
    clean, _ = rule(grad, grad, rule.init_state(grad))
    grad[2, 5] = torch.nan
    update, _ = rule(grad, grad, rule.init_state(grad))
    bad = torch.zeros(4, 19, dtype=torch.bool)
    bad[2, 5] = True
    assert torch.equal(update.isnan(), bad)
    assert torch.equal(update[~bad], clean[~bad])


def test_two_threads_give_the_bits_of_one() -> None:
    rule, family = fused(small_lstm()), Quadratic(dimension=200, w_scale=0.1)
    carry, batch = middle(rule, family)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(meta_gradient(rule, family, TruncatedBPTT(), carry, batch))
    finally:
        torch.set_num_threads(before)
    assert equal(*results)


def test_the_parameters_are_those_of_the_original() -> None:
    rule, family = small_lstm(), FAMILIES[0]
    other = fused(rule)
    assert [*other.parameters()] == [*rule.parameters()]
    carry, batch = middle(rule, family)
    first, gradient = meta_gradient(other, family, TruncatedBPTT(), carry, batch)
    assert all(parameter.grad is not None for parameter in rule.parameters())
    assert gradient.abs().max() > 0
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter -= 0.01 * parameter.grad
    second = unroll(other, family, carry, batch, InnerGradient.NONE)
    assert not torch.equal(second.losses, first.losses)  # the change of φ is seen at once
    assert_close(second.losses, unroll(rule, family, carry, batch, InnerGradient.NONE).losses, 1e-5)


def test_frozen_parameters_get_no_gradient() -> None:
    rule, family = small_lstm(), FAMILIES[0]
    rule.network.requires_grad_(False)
    carry, batch = middle(rule, family)
    TruncatedBPTT()(fused(rule), family, carry, batch).surrogate.backward()
    assert rule.output.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in rule.network.parameters())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda rule: pickle.loads(pickle.dumps(rule))])
def test_a_copy_computes_the_same_with_parameters_of_its_own(clone: Any) -> None:
    rule, family = fused(small_lstm()), FAMILIES[0]
    carry, batch = middle(rule, family)
    expected = meta_gradient(rule, family, TruncatedBPTT(), carry, batch)
    other = clone(rule)
    assert equal(meta_gradient(other, family, TruncatedBPTT(), carry, batch), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert equal(meta_gradient(rule, family, TruncatedBPTT(), carry, batch), expected)


def test_a_rule_in_use_is_described_as_before() -> None:
    rule = small_lstm()
    description, state = describe_rule(rule), rule.state_dict()
    other = fused(rule)
    carry, batch = middle(other, FAMILIES[0])
    meta_gradient(other, FAMILIES[0], TruncatedBPTT(), carry, batch)
    assert describe_rule(rule) == description
    assert rule.state_dict().keys() == state.keys()


@dataclass(frozen=True)
class Bowl(TaskFamily):
    """Σ a θ²: any number of coordinates, and nothing else in memory."""

    size: int

    @property
    def spec(self) -> FlatSpec:
        return FlatSpec.single("theta", self.size)

    def sample_task(self, rng: np.random.Generator) -> Arrays:
        return {"a": rng.random(self.size)}

    def sample_init(self, rng: np.random.Generator, task: Arrays) -> np.ndarray:
        return rng.standard_normal(self.size)

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        return (task["a"] * params["theta"].square()).sum()


class Allocations(TorchDispatchMode):
    """Remembers what every operation allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = (reference, storage.nbytes())
        return result

    def alive(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def bytes_held(rule: UpdateRule, size: int, inner_steps: int = 20) -> float:
    """Bytes between forward and backward, per coordinate-step."""
    family = Bowl(size)
    (batch,) = draw_windows(
        family, Schedule(horizon=inner_steps, window=inner_steps), 1, range(2), torch.float32
    )
    carry = begin(rule, batch, None)
    with Allocations() as allocations:
        carry = tree_map(torch.clone, carry)  # phase 2 needs the start of the window: it counts
        estimate = TruncatedBPTT()(rule, family, carry, batch)
        held = allocations.alive()
    assert estimate.surrogate.requires_grad
    return held / (2 * size * inner_steps)


def test_a_window_holds_few_bytes() -> None:
    rule = CoordinatewiseLSTM(features=LogSign())  # two layers of 20, as in the paper
    small, large = bytes_held(fused(rule), 4000), bytes_held(fused(rule), 16_000)
    assert small <= 60
    assert abs(large - small) <= 0.02 * small
    assert bytes_held(rule, 1000) > 10 * small  # that the count is one


@dataclass(frozen=True, kw_only=True)
class Cliff(Quadratic):
    """Quadratics, one of which has a finite loss and a gradient of any size."""

    steepness: float = float("inf")

    def losses_and_gradients(
        self, theta: Tensor, task: Tensors, data: Tensors, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        losses, grads = super().losses_and_gradients(theta, task, data, create_graph)
        jump = torch.zeros_like(grads)
        jump[1, 0] = self.steepness
        return losses, grads + jump


@pytest.mark.parametrize("steepness", [float("inf"), float("nan"), -3e38, 1e30])
@pytest.mark.parametrize("second_order", [False, True])
def test_a_gradient_that_overflows_costs_its_slot_only(steepness: float, second_order: bool) -> None:
    torch.manual_seed(0)
    rule, family = small_lstm().float(), Cliff(dimension=4, steepness=steepness)
    (batch,) = draw_windows(family, SCHEDULE, 1, range(3), torch.float32)
    for computed in (rule, fused(rule)):
        carry = begin(computed, batch, None)
        rollout, gradient = meta_gradient(computed, family, TruncatedBPTT(second_order), carry, batch)
        assert rollout.carry.diverged.tolist() == [False, True, False]
        assert gradient.isfinite().all()
        assert gradient.norm() > 0


class Linear(Quadratic):
    """Σθ: autograd's gradient of it has one number in memory."""

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        return theta.sum(-1)


def test_a_gradient_without_memory_of_its_own_is_taken() -> None:
    rule, family = small_lstm().double(), Linear(dimension=5)
    (batch,) = draw_windows(family, SCHEDULE, 1, range(3), torch.float64)
    results = [
        meta_gradient(computed, family, TruncatedBPTT(second_order=True), begin(computed, batch, None), batch)
        for computed in (rule, fused(rule))
    ]
    assert_close(results[1][0].losses, results[0][0].losses)
    assert_close(results[1][1], results[0][1])


def test_no_coordinates_are_taken() -> None:
    rule = fused(small_lstm().double())
    theta = torch.zeros(1, 0, dtype=torch.float64)
    with torch.no_grad():
        update, state = rule(theta, theta, rule.init_state(theta))
    assert update.shape == theta.shape
    assert [leaf.shape for leaf in tree_leaves(state)] == [
        leaf.shape for leaf in tree_leaves(rule.init_state(theta))
    ]


@pytest.mark.parametrize("shape", [(3, 50), (1, 5)])
def test_a_state_holds_no_more_memory_than_its_numbers(shape: tuple[int, int]) -> None:
    rule = fused(CoordinatewiseLSTM(4, features=RNNprop()))
    theta = torch.zeros(shape)
    with torch.no_grad():
        _, state = rule(torch.ones(shape), theta, rule.init_state(theta))
    for leaf in tree_leaves(state):
        assert leaf.is_contiguous()
        assert leaf.untyped_storage().nbytes() <= 2 * leaf.numel() * 4
