"""Backward through sampled coordinates: on average, the gradient through all of them.

S slots, N coordinates each, M = S · N; J drawn coordinates, K inner steps.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Regression, draw_windows, phi_gradient, small_lstm
from torch import Tensor

from l2l_scale.estimators import LogLoss, MetaLoss, SumLoss, TruncatedBPTT
from l2l_scale.estimators.coordinates import draw_coordinates, probabilities
from l2l_scale.optimizers import UpdateRule
from l2l_scale.optimizers.base import Draw
from l2l_scale.optimizers.fused import FusedRule
from l2l_scale.optimizers.kernels import make_kernel
from l2l_scale.optimizers.kernels.subset import sizes
from l2l_scale.sampling import Schedule
from l2l_scale.tasks import Quadratic, TaskFamily
from l2l_scale.unroll import Carry, InnerGradient, WindowBatch, begin, unroll

FAMILIES = [Quadratic(dimension=4, theta0_scale=1.0), Quadratic(dimension=1), Regression()]

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{type(f).__name__}-{f.spec.size}")


def fused_lstm() -> FusedRule:
    rule = small_lstm()
    return FusedRule(rule, make_kernel(rule, torch.device("cpu")))


def window(
    rule: UpdateRule, family: TaskFamily, dtype: torch.dtype = torch.float64
) -> tuple[Carry, WindowBatch]:
    """A staggered window of trajectories under way in three slots."""
    first, second = draw_windows(family, Schedule(horizon=12, window=4), 2, range(3), dtype)
    rollout = unroll(rule, family, begin(rule, first, None), first, InnerGradient.NONE)
    return begin(rule, second, rollout.carry), second


def gradient(
    rule: UpdateRule,
    family: TaskFamily,
    carry: Carry,
    batch: WindowBatch,
    meta_loss: MetaLoss,
    draw: Draw | None,
) -> Tensor:
    rollout = unroll(rule, family, carry, batch, InnerGradient.FIRST_ORDER, draw=draw)
    values = meta_loss(rollout.losses, rollout.carry.start_loss, batch)
    return phi_gradient(rule, values.sum())


@every_family
@pytest.mark.parametrize("meta_loss", [SumLoss(), LogLoss()], ids=lambda m: type(m).__name__)
def test_the_expectation_over_draws_is_the_full_gradient(
    meta_loss: MetaLoss, family: TaskFamily, double: torch.dtype
) -> None:
    rule = fused_lstm()
    carry, batch = window(rule, family)
    full = gradient(rule, family, carry, batch, meta_loss, None)
    seen: list[Tensor] = []

    def only(j: int) -> Draw:
        def draw(sizes: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(sizes)
            return torch.tensor([j]), 1 / probabilities(sizes)[[j]]

        return draw

    total = len(carry.theta) * family.spec.size
    parts = [gradient(rule, family, carry, batch, meta_loss, only(j)) for j in range(total)]
    chances = probabilities(seen[0])
    assert chances.shape == (total,)
    expectation = sum(p * part for p, part in zip(chances, parts, strict=True))
    assert (expectation - full).norm() <= 1e-10 * full.norm()
    if total > 3:
        assert (parts[0] - full).norm() > 1e-3 * full.norm()


@pytest.mark.parametrize("count", [2, 5])
def test_several_drawn_coordinates_add_up(count: int, double: torch.dtype) -> None:
    rule, family = fused_lstm(), FAMILIES[0]
    carry, batch = window(rule, family)
    chosen = torch.tensor([11, 3, 3, 0, 7])[:count]  # with repetition, in any order
    weights = torch.linspace(0.5, 2, count)
    together = gradient(rule, family, carry, batch, SumLoss(), lambda sizes: (chosen, weights))
    parts = [
        gradient(rule, family, carry, batch, SumLoss(), lambda sizes, i=i: (chosen[[i]], weights[[i]]))
        for i in range(count)
    ]
    assert (together - sum(parts)).norm() <= 1e-12 * together.norm()


def test_sizes_are_the_sums_of_the_derivatives_in_the_updates(double: torch.dtype) -> None:
    numbers = torch.Generator().manual_seed(0)
    d_losses, grads = torch.randn(4, 2, generator=numbers), torch.randn(5, 2, 3, generator=numbers)
    expected = torch.zeros(2, 3)
    for k in range(4):
        d_update = sum(d_losses[j][:, None] * grads[j + 1] for j in range(k, 4))
        expected += d_update.abs()
    assert (sizes(d_losses, grads) - expected.flatten()).abs().max() <= 1e-14


def test_probabilities_are_those_of_the_formula(double: torch.dtype) -> None:
    importance = torch.tensor([0.0, 1.0, 3.0, 1e-3, 20.0])
    expected = 0.9 * importance / importance.sum() + 0.1 / 5
    assert (probabilities(importance) - expected).abs().max() <= 1e-15
    assert abs(float(probabilities(importance).sum()) - 1) <= 1e-15
    assert probabilities(importance.float()).dtype == torch.float64


@pytest.mark.parametrize("size", [0.0, torch.inf, torch.nan])
def test_sizes_that_say_nothing_are_drawn_uniformly(size: float) -> None:
    importance = torch.ones(50)
    importance[:] = 0.0 if size == 0 else 1.0
    importance[7] = size
    assert torch.equal(probabilities(importance), torch.full((50,), 1 / 50, dtype=torch.float64))
    chosen, weights = draw_coordinates(10, 0)(importance)
    assert ((chosen >= 0) & (chosen < 50)).all()
    assert torch.equal(weights, torch.full((10,), 5.0))


def test_draws_have_their_probabilities_and_weights(double: torch.dtype) -> None:
    importance = torch.arange(20.0) ** 3
    count = 19
    shares, counts = probabilities(importance), torch.zeros(20)
    for index in range(2000):
        chosen, weights = draw_coordinates(count, index)(importance)
        assert (weights * count * shares[chosen] - 1).abs().max() <= 1e-14
        counts += chosen.bincount(minlength=20)
    draws = 2000 * count
    assert ((counts - draws * shares) / (draws * shares * (1 - shares)).sqrt()).abs().max() <= 4


def test_draws_are_a_function_of_the_window() -> None:
    importance = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    first, again, other = (draw_coordinates(100, index)(importance) for index in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@every_family
@pytest.mark.parametrize("more", [0, 1, 1000])
def test_as_many_as_there_are_is_the_full_gradient(
    more: int, family: TaskFamily, double: torch.dtype
) -> None:
    rule = fused_lstm()
    carry, batch = window(rule, family)
    full = phi_gradient(rule, TruncatedBPTT()(rule, family, carry, batch).surrogate)
    estimator = TruncatedBPTT(coordinates=3 * family.spec.size + more)
    sampled = phi_gradient(rule, estimator(rule, family, carry, batch).surrogate)
    assert (sampled - full).norm() <= 1e-13 * full.norm()


def test_a_sampled_estimate_changes_the_gradient_and_nothing_else() -> None:
    rule, family = fused_lstm(), FAMILIES[0]
    carry, batch = window(rule, family, torch.float32)
    full, sampled, again = (
        TruncatedBPTT(coordinates=count)(rule, family, carry, batch) for count in (None, 4, 4)
    )
    assert torch.equal(sampled.surrogate, full.surrogate)
    assert torch.equal(sampled.rollout.losses, full.rollout.losses)
    assert torch.equal(sampled.rollout.carry.theta, full.rollout.carry.theta)
    gradients = [phi_gradient(rule, estimate.surrogate) for estimate in (full, sampled, again)]
    assert not torch.equal(gradients[1], gradients[0])
    assert torch.equal(gradients[1], gradients[2])
    assert gradients[1].isfinite().all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e25])
def test_a_diverged_slot_is_drawn_but_contributes_nothing(poison: float) -> None:
    rule, family = fused_lstm(), FAMILIES[0]
    carry, batch = window(rule, family, torch.float32)
    task = {name: leaf.clone() for name, leaf in batch.task.items()}
    task["w"][1] = poison
    batch = batch._replace(task=task)
    estimate = TruncatedBPTT(coordinates=6)(rule, family, carry, batch)
    assert estimate.rollout.carry.diverged.tolist() == [False, True, False]
    gradient = phi_gradient(rule, estimate.surrogate)
    assert gradient.isfinite().all()
    assert gradient.norm() > 0


def test_no_gradient_at_all_is_zero_and_not_nan() -> None:
    rule, family = fused_lstm(), Quadratic(dimension=40)
    carry, batch = window(rule, family, torch.float32)
    estimate = TruncatedBPTT(coordinates=5)(rule, family, carry, batch)
    assert not phi_gradient(rule, 0 * estimate.surrogate).any()


def test_sampling_needs_the_fused_backend_and_first_order() -> None:
    rule = fused_lstm()
    TruncatedBPTT(coordinates=5).check_rule(rule)
    with pytest.raises(ValueError, match=r"coordinates \(5\) needs a fused backend"):
        TruncatedBPTT(coordinates=5).check_rule(rule.rule)
    with pytest.raises(ValueError, match=r"coordinates \(5\) must not be given with second_order"):
        TruncatedBPTT(second_order=True, coordinates=5)
    for bad in (0, -1, 2.5):
        with pytest.raises(ValueError, match="coordinates"):
            TruncatedBPTT(coordinates=bad)
