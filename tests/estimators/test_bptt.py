from __future__ import annotations

import pytest
import torch
from conftest import Regression, draw_windows, phi_gradient, small_lstm
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from l2l_scale.estimators import Estimate, LogLoss, MetaLoss, NormalizedLoss, SumLoss, TruncatedBPTT
from l2l_scale.optimizers import (
    CoordinatewiseLSTM,
    Identity,
    LogMagnitude,
    LogSign,
    LogSignClamp,
    RNNprop,
    TanhExp,
    UpdateRule,
)
from l2l_scale.optimizers.features import Feature
from l2l_scale.sampling import Schedule
from l2l_scale.tasks import Quadratic, TaskFamily
from l2l_scale.tree import Tree, tree_detach, tree_map
from l2l_scale.unroll import Carry, WindowBatch, begin

WEIGHTS = [0.5, 0.0, 2.0, 1.0, 3.0, 0.25, 1.0, 0.0, 1.0, 4.0, 0.0, 1.0]
META_LOSSES: list[MetaLoss] = [
    SumLoss(),
    LogLoss(),
    NormalizedLoss(),
    SumLoss(WEIGHTS),
    LogLoss(WEIGHTS, 0.1),
]
FAMILIES = [Quadratic(dimension=4, theta0_scale=1.0), Regression()]


class Preconditioned(UpdateRule):
    """A rule whose update depends on θ itself, and whose start state on φ."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.pull = torch.nn.Parameter(torch.tensor(0.01)), torch.nn.Parameter(torch.tensor(0.1))

    def init_state(self, theta: Tensor) -> Tree:
        return self.pull.square() * torch.ones_like(theta)

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        state = 0.9 * state + 0.1 * grad
        return -self.rate * state - self.pull * theta * grad.tanh(), state


def lstm(feature: Feature) -> CoordinatewiseLSTM:
    torch.manual_seed(1)
    return CoordinatewiseLSTM(hidden_size=4, layers=1, features=feature, head=TanhExp(), output_scale=1.0)


def second_window(rule: UpdateRule, family: TaskFamily) -> tuple[Carry, WindowBatch]:
    """A staggered window of a trajectory under way, with the carry of the window before as constants."""
    first, second = draw_windows(family, Schedule(horizon=12, window=4), 2, range(5))
    estimate = TruncatedBPTT()(rule, family, begin(rule, first, None), first)
    return tree_detach(estimate.rollout.carry), second


def estimate_at(
    phi: Tensor,
    rule: UpdateRule,
    family: TaskFamily,
    estimator: TruncatedBPTT,
    carry: Carry,
    batch: WindowBatch,
) -> Estimate:
    vector_to_parameters(phi, rule.parameters())
    return estimator(rule, family, begin(rule, batch, carry), batch)


def assert_equals_finite_differences(rule: UpdateRule, family: TaskFamily, meta_loss: MetaLoss) -> None:
    carry, batch = second_window(rule, family)
    assert batch.reset.any()
    assert not batch.reset.all()
    estimator = TruncatedBPTT(second_order=True, meta_loss=meta_loss)
    phi = parameters_to_vector(rule.parameters()).detach().clone()
    gradient = phi_gradient(rule, estimate_at(phi, rule, family, estimator, carry, batch).surrogate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(len(phi), generator=generator)
        direction = direction / direction.norm() + gradient / gradient.norm()  # never nearly orthogonal
        step = 1e-5
        ahead, behind = (
            float(estimate_at(phi + s * direction, rule, family, estimator, carry, batch).surrogate.detach())
            for s in (step, -step)
        )
        slope, expected = float(gradient @ direction), (ahead - behind) / (2 * step)
        assert abs(slope - expected) <= 1e-6 * abs(expected)


@pytest.mark.parametrize("meta_loss", META_LOSSES, ids=lambda m: f"{type(m).__name__}-{bool(m.weights)}")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_second_order_equals_finite_differences(
    family: TaskFamily, meta_loss: MetaLoss, double: torch.dtype
) -> None:
    assert_equals_finite_differences(small_lstm(), family, meta_loss)


@pytest.mark.parametrize(
    "feature",
    [Identity(), LogSign(), LogSignClamp(), LogMagnitude(), RNNprop()],
    ids=lambda f: type(f).__name__,
)
def test_second_order_equals_finite_differences_with_every_feature(
    feature: Feature, double: torch.dtype
) -> None:
    assert_equals_finite_differences(lstm(feature), FAMILIES[0], SumLoss())


def test_second_order_equals_finite_differences_with_a_rule_that_sees_theta(double: torch.dtype) -> None:
    assert_equals_finite_differences(Preconditioned(), FAMILIES[0], SumLoss())


def textbook_gradient(
    rule: UpdateRule, family: TaskFamily, carry: Carry, batch: WindowBatch, meta_loss: MetaLoss, detach: bool
) -> tuple[Tensor, Tensor]:
    """Value and φ-gradient of the mean meta-loss, problem by problem, with the real losses in the graph."""
    total = torch.zeros(())
    start = begin(rule, batch, carry)
    slots = len(start.theta)
    for slot in range(slots):
        theta, state = start.theta[slot : slot + 1], _slot_state(start.state, slot)
        task = {name: leaf[slot] for name, leaf in batch.task.items()}
        losses = []
        for k in range(batch.window_length + 1):
            data = {name: leaf[k, slot] for name, leaf in batch.data.items()}
            theta = theta if theta.requires_grad else theta.clone().requires_grad_()
            loss = family.loss(family.spec.unflatten(theta[0]), task, data)
            losses.append(loss)
            (grad,) = torch.autograd.grad(loss, theta, create_graph=True)
            update, state = rule(grad.detach() if detach else grad, theta, state)
            theta = theta + update
        begun = losses[0].detach() if start.start_loss[slot].isnan() else start.start_loss[slot]
        window = batch._replace(inner_step=batch.inner_step[slot : slot + 1])
        values = meta_loss(torch.stack(losses[1:])[:, None], begun[None], window)
        total = total + values.sum() / slots
    return total.detach(), phi_gradient(rule, total)


def _slot_state(state: Tree, slot: int) -> Tree:
    return tree_map(lambda leaf: leaf[slot : slot + 1], state)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("meta_loss", META_LOSSES, ids=lambda m: f"{type(m).__name__}-{bool(m.weights)}")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("make", [small_lstm, Preconditioned], ids=lambda m: m.__name__)
def test_both_orders_equal_the_textbook_graph_with_real_losses(
    make: type[UpdateRule], family: TaskFamily, meta_loss: MetaLoss, second_order: bool, double: torch.dtype
) -> None:
    rule = make()
    carry, batch = second_window(rule, family)
    estimate = TruncatedBPTT(second_order, meta_loss)(rule, family, begin(rule, batch, carry), batch)
    value, expected = textbook_gradient(rule, family, carry, batch, meta_loss, detach=not second_order)
    assert abs(float(estimate.surrogate.detach() - value)) <= 1e-12 * abs(float(value))
    assert (phi_gradient(rule, estimate.surrogate) - expected).norm() <= 1e-12 * expected.norm()


def test_the_two_orders_differ(double: torch.dtype) -> None:
    rule = small_lstm()
    carry, batch = second_window(rule, FAMILIES[0])
    first, second = (
        phi_gradient(
            rule, TruncatedBPTT(order)(rule, FAMILIES[0], begin(rule, batch, carry), batch).surrogate
        )
        for order in (False, True)
    )
    assert (first - second).norm() > 1e-3 * second.norm()


@pytest.mark.parametrize("second_order", [False, True])
def test_full_bptt_is_one_window_of_the_horizon(second_order: bool, double: torch.dtype) -> None:
    rule, family = small_lstm(), FAMILIES[0]
    (batch,) = draw_windows(family, Schedule(horizon=12, window=12), 1)
    estimate = TruncatedBPTT(second_order)(rule, family, begin(rule, batch, None), batch)
    start = begin(rule, batch, None)
    _, expected = textbook_gradient(rule, family, start, batch, SumLoss(), detach=not second_order)
    assert (phi_gradient(rule, estimate.surrogate) - expected).norm() <= 1e-12 * expected.norm()


def test_the_surrogate_is_a_scalar_worth_the_mean_meta_loss(double: torch.dtype) -> None:
    rule, family = small_lstm(), FAMILIES[0]
    carry, batch = second_window(rule, family)
    estimate = TruncatedBPTT()(rule, family, begin(rule, batch, carry), batch)
    assert estimate.surrogate.shape == ()
    value = estimate.rollout.losses.detach().sum(0).mean()
    assert abs(float(estimate.surrogate.detach() - value)) <= 1e-14 * float(value)


def test_the_sum_of_losses_is_the_default() -> None:
    assert type(TruncatedBPTT().meta_loss) is SumLoss
    assert TruncatedBPTT().meta_loss.weights is None
