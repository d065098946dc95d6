"""Quadratic: the formula, the distributions, the batched loss, bad input."""

import numpy as np
import pytest
import torch

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.tasks import Quadratic, TaskFamily


def rng(counter=0):
    return stream(0, Split.TRAIN, Channel.TASK, counter)


def batch(family, slots=5):
    tasks = [family.sample_task(rng(slot)) for slot in range(slots)]
    theta = torch.tensor(np.stack([rng(slot).standard_normal(family.dimension) for slot in range(slots)]))
    return theta, {name: torch.tensor(np.stack([task[name] for task in tasks])) for name in tasks[0]}


def test_shapes_follow_the_dimension():
    family = Quadratic(dimension=7)
    task = family.sample_task(rng())
    assert (task["w"].shape, task["y"].shape) == ((7, 7), (7,))
    assert family.sample_init(rng(), task).shape == (family.spec.size,) == (7,)
    assert not family.has_data


def test_loss_is_the_squared_residual():
    theta, task = batch(Quadratic(dimension=4))
    expected = [np.linalg.norm(w @ t - y) ** 2 for w, t, y in zip(task["w"], theta, task["y"], strict=True)]
    torch.testing.assert_close(
        Quadratic(dimension=4).losses(theta, task, {}), torch.tensor(expected), rtol=1e-12, atol=0
    )


def test_batched_losses_equal_mapped_losses():
    family = Quadratic(dimension=6)
    theta, task = batch(family)
    mapped = TaskFamily.losses(family, theta, task, {})
    torch.testing.assert_close(family.losses(theta, task, {}), mapped, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dimension", "slots"), [(1, 1), (4, 3), (10, 128), (33, 2), (100, 1)])
def test_gradients_by_formula_equal_those_of_autograd_bit_for_bit(dimension, slots, dtype):
    family = Quadratic(dimension=dimension)
    theta, task = batch(family, slots)
    theta, task = theta.to(dtype), {name: value.to(dtype) for name, value in task.items()}
    formula = family.losses_and_gradients(theta, task, {}, create_graph=False)
    assert all(map(torch.equal, formula, TaskFamily.losses_and_gradients(family, theta, task, {}, False)))
    assert torch.equal(formula[0], family.losses(theta, task, {}))


def test_the_derivative_of_the_gradient_is_the_hessian():
    family = Quadratic(dimension=6)
    theta, task = batch(family)
    theta.requires_grad_()
    direction = torch.tensor(np.stack([rng(100 + slot).standard_normal(6) for slot in range(len(theta))]))
    losses, grads = family.losses_and_gradients(theta, task, {}, create_graph=True)
    (product,) = torch.autograd.grad(grads, theta, direction, retain_graph=True)
    hessian = 2 * task["w"].mT @ task["w"]
    torch.testing.assert_close(product, (hessian @ direction[..., None])[..., 0], rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(losses.sum(), theta)
    torch.testing.assert_close(gradient, grads.detach(), rtol=1e-12, atol=1e-12)


def test_normal_entries_have_the_moments_of_a_scaled_gaussian():
    task = Quadratic(dimension=100, w_scale=2.0, y_scale=3.0).sample_task(rng())
    assert abs(task["w"].mean()) < 3 * 2 / 100  # three standard errors
    assert abs(task["w"].std() - 2) < 3 * 2 / np.sqrt(2 * 100 * 100)
    assert abs(task["y"].std() - 3) < 3 * 3 / np.sqrt(2 * 100)


def test_uniform_entries_fill_the_unit_interval():
    w = Quadratic(dimension=100, distribution="uniform").sample_task(rng())["w"]
    assert 0 <= w.min() < 0.01
    assert 0.99 < w.max() < 1
    assert abs(w.mean() - 0.5) < 3 / np.sqrt(12) / 100
    assert abs(w.var() - 1 / 12) < 0.003


def test_start_has_the_scale_asked_for():
    family = Quadratic(dimension=10_000, theta0_scale=0.5)
    theta0 = family.sample_init(rng(), {})
    assert abs(theta0.std() - 0.5) < 3 * 0.5 / np.sqrt(2 * 10_000)
    assert not Quadratic(theta0_scale=0.0).sample_init(rng(), {}).any()


def test_equal_settings_are_one_key():
    assert hash(Quadratic(dimension=3)) == hash(Quadratic(dimension=3))
    assert Quadratic(dimension=3) == Quadratic(dimension=3) != Quadratic(dimension=4)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("dimension", 0),
        ("w_scale", 0.0),
        ("w_scale", float("nan")),
        ("y_scale", -1.0),
        ("theta0_scale", float("inf")),
        ("distribution", "cauchy"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} \('?{value}'?\) must be"):
        Quadratic(**{argument: value})


@pytest.mark.parametrize(("dimension", "decades"), [(1, 4.0), (20, 4.0), (100, 6.0), (5, 0.0)])
def test_decaying_eigenvalues_fall_geometrically_by_so_many_decades(dimension, decades):
    family = Quadratic(dimension=dimension, distribution="decaying", decades=decades, w_scale=3.0)
    w = family.sample_task(rng())["w"]
    eigenvalues = np.linalg.svd(w, compute_uv=False) ** 2
    assert eigenvalues[0] == pytest.approx(9.0, rel=1e-10)
    steps = np.diff(np.log10(eigenvalues))
    assert np.abs(steps + decades / max(dimension - 1, 1)).max(initial=0) <= 1e-6
    assert np.abs(family.sample_task(rng(1))["w"] - w).max() > 0.1


def test_decades_must_not_be_negative():
    with pytest.raises(ValueError, match=r"decades \(-1\) must be a finite number >= 0"):
        Quadratic(distribution="decaying", decades=-1)
