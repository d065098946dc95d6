"""TestFunction: SciPy and closed formulas as truth, minima, gradients, rotations, the batched loss."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar, rosen
from scipy.stats import kstest

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.tasks import TaskFamily, TestFunction
from l2l_scale.tasks.test_functions import STYBLINSKI_TANG_MINIMISER, haar_orthogonal


def textbook_ackley(z):
    wave = np.exp(np.cos(2 * np.pi * z).mean())
    return 20 + np.e - 20 * np.exp(-0.2 * np.sqrt((z**2).mean())) - wave


def textbook_beale(z):
    x, y = z
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def styblinski_tang_1d(z):
    return (z**4 - 16 * z**2 + 5 * z) / 2


ST_LOWEST = minimize_scalar(styblinski_tang_1d, bracket=(-3.5, -3, -2), tol=1e-14).fun

# function: (formula in z, minimiser in every coordinate, dimensions)
TEXTBOOK = {
    "rosenbrock": (rosen, 1.0, (2, 5)),
    "rastrigin": (lambda z: 10 * len(z) + (z**2 - 10 * np.cos(2 * np.pi * z)).sum(), 0.0, (1, 2, 5)),
    "ackley": (textbook_ackley, 0.0, (1, 2, 5)),
    "styblinski_tang": (
        lambda z: styblinski_tang_1d(z).sum() - len(z) * ST_LOWEST,
        STYBLINSKI_TANG_MINIMISER,
        (1, 2, 5),
    ),
    "beale": (textbook_beale, np.array([3.0, 0.5]), (2,)),
    "booth": (lambda z: (z[0] + 2 * z[1] - 7) ** 2 + (2 * z[0] + z[1] - 5) ** 2, np.array([1.0, 3.0]), (2,)),
}
CASES = [(name, dimension) for name, (_, _, dimensions) in TEXTBOOK.items() for dimension in dimensions]
each_function = pytest.mark.parametrize(("name", "dimension"), CASES)


def rng(counter=0):
    return stream(0, Split.TRAIN, Channel.TASK, counter)


def batch(family, slots=6):
    tasks = [family.sample_task(rng(slot)) for slot in range(slots)]
    theta = torch.tensor(np.stack([family.sample_init(rng(100 + slot), {}) for slot in range(slots)]))
    return theta, {name: torch.tensor(np.stack([task[name] for task in tasks])) for name in tasks[0]}


@each_function
@pytest.mark.parametrize("rotate", [True, False])
def test_loss_is_the_textbook_function_of_the_moved_point(name, dimension, rotate):
    family = TestFunction(function=name, dimension=dimension, rotate=rotate)
    formula, minimiser, _ = TEXTBOOK[name]
    theta, task = batch(family)
    losses = family.losses(theta, task, {})
    assert ("rotation" in task) == rotate
    for slot, loss in enumerate(losses):
        rotation = task["rotation"][slot].numpy() if rotate else np.eye(dimension)
        offset = rotation @ (theta[slot] - task["shift"][slot]).numpy()
        expected = formula(task["scale"][slot].item() * offset + minimiser)
        np.testing.assert_allclose(loss.item(), expected, rtol=1e-11, atol=1e-11)


@each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minimum_is_exactly_zero_with_zero_gradient(name, dimension, dtype):
    family = TestFunction(function=name, dimension=dimension)
    _, task = batch(family)
    task = {key: value.to(dtype) for key, value in task.items()}
    theta = task["shift"].clone().requires_grad_()
    losses = family.losses(theta, task, {})
    (grad,) = torch.autograd.grad(losses.sum(), theta, create_graph=True)
    assert torch.equal(losses, torch.zeros_like(losses))
    assert torch.equal(grad, torch.zeros_like(grad))
    (second,) = torch.autograd.grad(grad.sum(), theta)
    assert second.isfinite().all()


@each_function
def test_nothing_near_lies_below_the_minimum(name, dimension):
    family = TestFunction(function=name, dimension=dimension, theta0_scale=5.0)
    theta, task = batch(family, slots=500)
    assert (family.losses(theta, task, {}) > 0).all()
    near = task["shift"] + 1e-6 * theta
    assert (family.losses(near, task, {}) > 0).all()


@each_function
def test_batched_losses_equal_mapped_losses(name, dimension):
    family = TestFunction(function=name, dimension=dimension)
    theta, task = batch(family)
    mapped = TaskFamily.losses(family, theta, task, {})
    torch.testing.assert_close(family.losses(theta, task, {}), mapped, rtol=1e-12, atol=1e-12)


@each_function
def test_gradients_equal_finite_differences(name, dimension):
    family = TestFunction(function=name, dimension=dimension)
    theta, task = batch(family, slots=2)
    theta.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: family.losses(t, task, {}), theta)
    assert torch.autograd.gradgradcheck(lambda t: family.losses(t, task, {}), theta)


def test_styblinski_tang_minimiser_is_exact_to_float64():
    np.testing.assert_allclose(np.roots([4, 0, -32, 5]).min(), STYBLINSKI_TANG_MINIMISER, rtol=1e-15)
    assert pytest.approx(-39.16616570377142, rel=1e-14) == ST_LOWEST


def test_rotations_are_orthogonal_and_uniform():
    draw = [haar_orthogonal(rng(counter), 3) for counter in range(2000)]
    np.testing.assert_allclose(draw[0] @ draw[0].T, np.eye(3), atol=1e-14)
    # On the sphere in three dimensions every coordinate of a uniform point is uniform (Archimedes).
    entries = np.stack(draw).reshape(len(draw), 9)
    for entry in entries.T:
        assert kstest(entry, "uniform", args=(-1, 2)).pvalue > 1e-3
    assert abs(np.mean([np.linalg.det(matrix) for matrix in draw])) < 3 / np.sqrt(len(draw))


def test_shift_and_scale_have_the_distributions_asked_for():
    family = TestFunction(
        function="rastrigin", dimension=1000, rotate=False, shift_scale=3.0, scale_range=(0.1, 10)
    )
    tasks = [family.sample_task(rng(counter)) for counter in range(300)]
    assert abs(np.concatenate([task["shift"] for task in tasks[:10]]).std() - 3) < 3 * 3 / np.sqrt(2e4)
    assert kstest([np.log10(task["scale"]) for task in tasks], "uniform", args=(-1, 2)).pvalue > 1e-3
    assert abs(family.sample_init(rng(), {}).std() - 1) < 3 / np.sqrt(2e3)


def test_one_scale_is_a_range_too():
    family = TestFunction(scale_range=[2.0, 2.0])
    assert family.sample_task(rng())["scale"] == pytest.approx(2.0, rel=1e-15)
    assert hash(family) == hash(TestFunction(scale_range=(2.0, 2.0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"function": "sphere"}, r"function \('sphere'\) must be one of rosenbrock, .*booth"),
        ({"function": "beale", "dimension": 3}, r"dimension \(3\) must be 2: beale"),
        ({"function": "booth", "dimension": 1}, r"dimension \(1\) must be 2: booth"),
        ({"function": "rosenbrock", "dimension": 1}, r"dimension \(1\) must be at least 2"),
        ({"function": "ackley", "dimension": 0}, r"dimension \(0\) must be"),
        ({"shift_scale": -1.0}, r"shift_scale \(-1.0\) must be"),
        ({"theta0_scale": float("nan")}, r"theta0_scale \(nan\) must be"),
        ({"scale_range": (0.0, 1.0)}, r"scale_range \(0.0\) must be"),
        (
            {"scale_range": (2.0, 1.0)},
            r"scale_range \(\(2.0, 1.0\)\) must be two numbers, the lower one first",
        ),
        ({"scale_range": (2.0,)}, r"scale_range \(\(2.0,\)\) must be two numbers"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(settings, message):
    with pytest.raises(ValueError, match=message):
        TestFunction(**settings)
