"""MixedPrecision: bfloat16 in the tasks and nowhere else; close to float32, and never felt outside."""

import json
import pickle
from dataclasses import dataclass

import pytest
import torch
from conftest import Regression, draw_windows, phi_gradient, small_lstm
from jsonargparse import auto_cli
from torch import nn

from l2l_scale.estimators import TruncatedBPTT
from l2l_scale.flat import FlatSpec
from l2l_scale.rng import Split
from l2l_scale.sampling import Schedule
from l2l_scale.tasks import (
    ImageClassifier,
    MixedPrecision,
    ModuleTask,
    Quadratic,
    RandomScaling,
    TaskFamily,
    TestFunction,
)
from l2l_scale.unroll import begin

UNIT = 2.0**-8  # the largest relative error of rounding to bfloat16, with its 8 significant bits
# A product rounds its two factors and its result, and a gradient takes two or three products in a row; the
# errors of many entries partly cancel in the norm. That is at start points: where terms of a gradient cancel,
# as with all weights alike, its relative error is larger.
TOLERANCE = 8 * UNIT


def build():
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


def draw_data(rng, task):
    return {"x": rng.standard_normal((32, 4)), "y": rng.integers(3, size=32)}


def objective(model, task, data):
    return nn.functional.cross_entropy(model(data["x"]).float(), data["y"])


def images(**settings):
    return ImageClassifier(batch_size=64, initialisation="torch", **settings)


FAMILIES = {
    "quadratic": Quadratic(dimension=10, theta0_scale=1.0),
    "rosenbrock": TestFunction(function="rosenbrock", dimension=5),
    "styblinski_tang": TestFunction(function="styblinski_tang", dimension=5),
    "regression": Regression(8),
    "module": ModuleTask(build=build, objective=objective, draw_data=draw_data),
    "linear": images(hidden=()),
    "sigmoid": images(hidden=(20,)),
    "tanh": images(hidden=(20, 10), activation="tanh"),
    "elu": images(hidden=(20, 10), activation="elu"),
    "relu": images(hidden=(20, 10), activation="relu"),
    "streamed": images(source="streamed"),
    "scaled": RandomScaling(Quadratic(dimension=10, theta0_scale=1.0)),
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
one_of_each_kind = pytest.mark.parametrize("name", ["quadratic", "rosenbrock", "module", "sigmoid"])


def problem(family, dtype=torch.float32):
    """θ, constants and the first minibatch of four slots."""
    (batch,) = draw_windows(family, Schedule(horizon=1, window=1), 1, dtype=dtype)
    return batch.theta0, batch.task, {name: leaf[0] for name, leaf in batch.data.items()}


def both(family, create_graph=False, dtype=torch.float32):
    """Losses and gradients of the family itself, and in mixed precision."""
    results = []
    for one in (family, MixedPrecision(family)):
        theta, task, data = problem(family, dtype)
        theta.requires_grad_(create_graph)
        results.append((theta, *one.losses_and_gradients(theta, task, data, create_graph)))
    return results


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


@each_family
def test_results_are_float32_and_those_of_float32_within_the_rounding(family):
    (_, losses, grads), (_, mixed_losses, mixed_grads) = both(family)
    assert mixed_losses.dtype == mixed_grads.dtype == torch.float32
    assert not mixed_losses.requires_grad
    assert not mixed_grads.requires_grad
    assert error(mixed_losses, losses) <= TOLERANCE
    assert UNIT / 16 <= error(mixed_grads, grads) <= TOLERANCE  # it was bfloat16 indeed


@each_family
def test_second_derivatives_are_those_of_float32_within_the_rounding(family):
    products = []
    for theta, losses, grads in both(family, create_graph=True):
        assert losses.requires_grad
        direction = torch.linspace(-30, 30, theta.numel()).view_as(theta).sin()
        (product,) = torch.autograd.grad((grads * direction).sum() + losses.sum(), theta)
        assert product.dtype == torch.float32
        products.append(product)
    assert error(products[1], products[0]) <= TOLERANCE


@each_family
def test_a_graph_changes_no_value(family):
    for without, graph in zip(both(family), both(family, create_graph=True), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(without[1:], graph[1:], strict=True))


@each_family
def test_losses_alone_are_the_same(family):
    theta, task, data = problem(family)
    mixed = MixedPrecision(family)
    losses = mixed.losses_and_gradients(theta, task, data, create_graph=False)[0]
    assert torch.equal(mixed.losses(theta, task, data), losses)
    mapped = TaskFamily.losses(mixed, theta, task, data)
    assert mapped.dtype == torch.float32
    assert error(mapped, losses) <= UNIT


@each_family
def test_losses_are_summed_in_float32(family):
    theta, task, data = problem(family)
    losses = MixedPrecision(family).losses(theta, task, data)
    assert not torch.equal(losses.bfloat16().float(), losses)


def test_gradients_of_biases_are_summed_in_float32():
    family = FAMILIES["tanh"]
    _, _, grads = both(family)[1]
    for name, grad in family.spec.unflatten(grads).items():
        assert torch.equal(grad.bfloat16().float(), grad) == name.endswith("weight")  # as products give them


@each_family
@pytest.mark.parametrize("outer", [torch.bfloat16, torch.float16])
def test_an_outer_autocast_changes_nothing_and_is_left_as_it_was(family, outer):
    expected = both(family)[1]
    with torch.autocast("cpu", outer):
        results = both(family)[1]
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == outer
        assert torch.is_autocast_cache_enabled()
    assert all(map(torch.equal, results, expected))


@each_family
def test_the_family_itself_stays_in_float32(family):
    theta, task, data = problem(family)
    before = family.losses_and_gradients(theta, task, data, create_graph=False)
    MixedPrecision(family).losses_and_gradients(theta, task, data, create_graph=False)
    assert not torch.is_autocast_enabled("cpu")
    after = family.losses_and_gradients(theta, task, data, create_graph=False)
    assert all(map(torch.equal, before, after))


@one_of_each_kind
def test_float64_stays_as_it_is(name):
    bare, mixed = both(FAMILIES[name], dtype=torch.float64)
    assert all(map(torch.equal, bare, mixed))


@dataclass(frozen=True)
class Leaf(TaskFamily):
    """A product with θ itself, not with a view of it: what autocast would remember."""

    spec = FlatSpec.single("theta", 3)

    def sample_task(self, rng):
        return {"w": rng.standard_normal(3)}

    def sample_init(self, rng, task):
        return rng.standard_normal(3)

    def loss(self, params, task, data):
        return (params["theta"] @ task["w"]).square()

    def losses(self, theta, task, data):
        return (theta @ task["w"].mT).square().sum(-1)


def test_values_of_theta_are_not_remembered():
    family = MixedPrecision(Leaf())
    theta, task, data = problem(Leaf())
    theta.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        before = family.losses(theta, task, data)
        with torch.no_grad():
            theta.add_(1.0)
        after = family.losses(theta, task, data)
    assert torch.equal(after, family.losses(theta.detach(), task, data))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("second_order", [False, True])
def test_meta_gradient_is_close_to_that_of_float32(second_order):
    rule, family = small_lstm(), images(hidden=(20,))
    (batch,) = draw_windows(family, Schedule(horizon=5, window=5), 1, dtype=torch.float32)
    gradients = []
    for one in (family, MixedPrecision(family)):
        estimate = TruncatedBPTT(second_order=second_order)(rule, one, begin(rule, batch, None), batch)
        gradients.append(phi_gradient(rule, estimate.surrogate))
    assert gradients[1].dtype == torch.float32
    # Five steps, each with the errors of all before it.
    assert 0 < error(gradients[1], gradients[0]) <= 5 * TOLERANCE


def test_tasks_and_splits_are_the_familys():
    family = images()
    mixed = MixedPrecision(family)
    assert (mixed.spec, mixed.has_data) == (family.spec, True)
    assert not MixedPrecision(Quadratic()).has_data
    for split in Split:
        assert mixed.for_split(split) == MixedPrecision(family.for_split(split))
    theta, _, data = problem(family)
    mixed_theta, _, mixed_data = problem(mixed)
    assert torch.equal(theta, mixed_theta)
    assert torch.equal(data["index"], mixed_data["index"])


def test_sizes_are_known_without_a_device():
    family = MixedPrecision(Quadratic(dimension=3))
    theta, task, data = problem(family)
    task = {name: value.to("meta") for name, value in task.items()}
    losses, grads = family.losses_and_gradients(theta.to("meta"), task, data, create_graph=False)
    assert (losses.shape, grads.shape) == ((4,), (4, 3))


def test_family_is_a_key_and_travels_between_processes():
    family = MixedPrecision(images())
    assert hash(family) == hash(MixedPrecision(images(), torch.bfloat16))
    assert pickle.loads(pickle.dumps(family)) == family


def test_jsonargparse_builds_it_around_a_family():
    def job(family: TaskFamily) -> TaskFamily:
        return family

    inner = {"class_path": "l2l_scale.tasks.Quadratic", "init_args": {"dimension": 3}}
    for settings in ({"family": inner}, {"family": inner, "dtype": "torch.bfloat16"}):
        config = {"class_path": "l2l_scale.tasks.MixedPrecision", "init_args": settings}
        family = auto_cli(job, args=[f"--family={json.dumps(config)}"], as_positional=False)
        assert family == MixedPrecision(Quadratic(dimension=3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_precisions_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"dtype \({dtype}\) must be torch.bfloat16: .*float16"):
        MixedPrecision(Quadratic(), dtype)
