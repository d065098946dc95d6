"""RandomScaling: f(c θ) with its derivatives, the family's own draws, in training only."""

import json
import pickle

import numpy as np
import pytest
import torch
from conftest import Regression, draw_windows, small_lstm
from jsonargparse import auto_cli
from scipy.stats import kstest
from torch import nn

from l2l_scale.estimators import TruncatedBPTT
from l2l_scale.rng import Channel, Split, stream
from l2l_scale.sampling import Schedule
from l2l_scale.tasks import (
    CompiledFamily,
    ImageClassifier,
    ModuleTask,
    Quadratic,
    RandomScaling,
    TaskFamily,
    TestFunction,
)
from l2l_scale.unroll import begin

KEY = "random_scaling"
SCHEDULE = Schedule(horizon=4, window=2)
FAMILIES = {
    "formula": Quadratic(dimension=4),
    "autograd": TestFunction(function="rastrigin", dimension=3),
    "minibatches": Regression(),
    "images": ImageClassifier(hidden=(5,), batch_size=4, initialisation="torch"),
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def rng(channel=Channel.TASK, counter=0):
    return stream(0, Split.TRAIN, channel, counter)


def problem(family, k=0):
    """θ, constants and one minibatch of three slots."""
    batch = draw_windows(family, SCHEDULE, 1, range(3))[0]
    return batch.theta0, batch.task, {name: leaf[k] for name, leaf in batch.data.items()}


@each_family
@pytest.mark.parametrize("create_graph", [False, True])
def test_losses_and_gradients_are_those_of_the_scaled_function(family, create_graph):
    theta, task, data = problem(RandomScaling(family))
    theta = theta + 0.1
    own = {name: value for name, value in task.items() if name != KEY}
    point = theta.clone().requires_grad_()
    expected = TaskFamily.losses(family, task[KEY] * point, own, data)
    (gradient,) = torch.autograd.grad(expected.sum(), point, create_graph=True)
    theta.requires_grad_(create_graph)
    losses, grads = RandomScaling(family).losses_and_gradients(theta, task, data, create_graph)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads, gradient, rtol=1e-11, atol=1e-12)
    assert losses.requires_grad == grads.requires_grad == create_graph
    if create_graph:
        seed = torch.linspace(-1, 1, theta.numel(), dtype=torch.float64).view_as(theta)
        (got,) = torch.autograd.grad(grads, theta, seed)
        (want,) = torch.autograd.grad(gradient, point, seed)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@each_family
def test_batched_losses_equal_mapped_losses(family):
    scaled = RandomScaling(family)
    theta, task, data = problem(scaled)
    mapped = TaskFamily.losses(scaled, theta, task, data)
    torch.testing.assert_close(scaled.losses(theta, task, data), mapped, rtol=1e-12, atol=0)


@each_family
def test_first_losses_are_the_familys_own(family):
    scaled, bare = problem(RandomScaling(family)), problem(family)
    assert (scaled[0] - bare[0]).abs().max() > 0.01 * bare[0].abs().max()
    losses = RandomScaling(family).losses(*scaled)
    torch.testing.assert_close(losses, family.losses(*bare), rtol=1e-11, atol=1e-12)


@each_family
def test_the_familys_draws_are_unchanged(family):
    (scaled,), (bare,) = (draw_windows(one, SCHEDULE, 1) for one in (RandomScaling(family), family))
    assert scaled.task.keys() == {*bare.task, KEY}
    assert all(torch.equal(scaled.task[name], bare.task[name]) for name in bare.task)
    assert scaled.data.keys() == bare.data.keys()
    assert all(torch.equal(scaled.data[name], bare.data[name]) for name in bare.data)
    torch.testing.assert_close(scaled.theta0 * scaled.task[KEY], bare.theta0, rtol=1e-14, atol=0)


@each_family
def test_layout_and_minibatches_are_the_familys(family):
    assert RandomScaling(family).spec == family.spec
    assert RandomScaling(family).has_data == family.has_data


def test_scales_are_log_uniform_and_drawn_anew_for_every_task():
    family = RandomScaling(Quadratic(dimension=100), log_range=2.0)
    logs = np.log([family.sample_task(rng(counter=counter))[KEY] for counter in range(20)])
    assert logs.shape == (20, 100)
    assert kstest(logs.ravel(), "uniform", args=(-2, 4)).pvalue > 1e-3
    assert len(np.unique(logs)) == 2000


def test_scales_stay_for_the_whole_trajectory():
    first, second = draw_windows(RandomScaling(Quadratic(dimension=4)), Schedule(horizon=4, window=2), 2)
    stays = ~second.reset
    assert stays.any()
    assert torch.equal(first.task[KEY][stays], second.task[KEY][stays])


def test_only_training_is_scaled():
    family = ImageClassifier(split=Split.TUNE)
    scaled = RandomScaling(family, log_range=1.0)
    assert scaled.for_split(Split.TRAIN) == RandomScaling(family.for_split(Split.TRAIN), log_range=1.0)
    for split in (Split.VALID, Split.TUNE, Split.TEST):
        assert scaled.for_split(split) == family.for_split(split)


def test_meta_gradient_of_second_order_is_that_of_the_scaled_function(double):
    class Scaled(Quadratic):
        """The same function, written by hand; its derivatives are torch's."""

        def losses(self, theta, task, data):
            return super().losses(theta * task[KEY], task, data)

    rule = small_lstm()
    (batch,) = draw_windows(RandomScaling(Quadratic(dimension=4)), SCHEDULE, 1)
    gradients = []
    for family in (RandomScaling(Quadratic(dimension=4)), Scaled(dimension=4)):
        estimate = TruncatedBPTT(second_order=True)(rule, family, begin(rule, batch, None), batch)
        gradients.append(torch.autograd.grad(estimate.surrogate, list(rule.parameters())))
    for got, want in zip(*gradients, strict=True):
        assert (got - want).norm() <= 1e-10 * want.norm()


@pytest.mark.parametrize("name", ["formula", "minibatches"])
def test_scaled_tasks_compile(name):
    family = RandomScaling(FAMILIES[name])
    theta, task, data = problem(family)
    results = CompiledFamily(family).losses_and_gradients(theta, task, data, create_graph=False)
    for got, want in zip(results, family.losses_and_gradients(theta, task, data, False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_gradients_are_by_formula_where_the_familys_are():
    assert RandomScaling(Quadratic()).has_gradient_formula
    assert not RandomScaling(Regression()).has_gradient_formula
    assert not RandomScaling(RandomScaling(Regression())).has_gradient_formula


def test_family_is_a_key_and_travels_between_processes():
    family = RandomScaling(Quadratic(dimension=3))
    assert hash(family) == hash(RandomScaling(Quadratic(dimension=3), 3.0))
    assert pickle.loads(pickle.dumps(family)) == family != RandomScaling(Quadratic(dimension=3), 2.0)


def test_jsonargparse_builds_it_around_a_family():
    def job(family: TaskFamily) -> TaskFamily:
        return family

    inner = {"class_path": "l2l_scale.tasks.Quadratic", "init_args": {"dimension": 3}}
    settings = {"family": inner, "log_range": 1.0}
    config = {"class_path": "l2l_scale.tasks.RandomScaling", "init_args": settings}
    family = auto_cli(job, args=[f"--family={json.dumps(config)}"], as_positional=False)
    assert family == RandomScaling(Quadratic(dimension=3), log_range=1.0)


@pytest.mark.parametrize("value", [-1.0, 21.0, float("nan")])
def test_ranges_that_cannot_be_are_refused(value):
    with pytest.raises(ValueError, match=rf"log_range \({value}\) must be in \[0, 20\]"):
        RandomScaling(Quadratic(), log_range=value)


def test_a_constant_of_the_same_name_is_refused():
    with pytest.raises(ValueError, match=r"must not have a constant named 'random_scaling'.*log_range"):
        RandomScaling(RandomScaling(Quadratic())).sample_task(rng())
    mine = ModuleTask(
        build=lambda: nn.Linear(2, 1),
        objective=lambda model, task, data: model(task[KEY]).sum(),
        draw_task=lambda rng: {KEY: rng.random(2)},
    )
    with pytest.raises(ValueError, match="else rename the constant"):
        RandomScaling(mine).sample_task(rng())
