"""Reference methods: what they reach, and that every evaluation is counted."""

import numpy as np
import pytest
import scipy.optimize
import torch

from l2l_scale.evaluation import references
from l2l_scale.evaluation.references import ReferenceMethod, reference_curves
from l2l_scale.rng import Split
from l2l_scale.sampling import Schedule, WindowSampler
from l2l_scale.tasks import Quadratic

every_method = pytest.mark.parametrize("method", ReferenceMethod)


class Minibatches(Quadratic):
    """A family whose losses are noisy."""

    def sample_data(self, rng, task):
        return {"noise": rng.standard_normal(1)}


def windows(family, tasks, dtype=torch.float64):
    sampler = WindowSampler(family, Schedule(horizon=2, window=2, staggered=False), 0, Split.TEST)
    return sampler(0, range(tasks)).to_batch(dtype)


@pytest.fixture
def solver_results(monkeypatch):
    """What SciPy said about each run."""
    results = []

    def spy(*args, **kwargs):
        results.append(scipy.optimize.minimize(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(references, "minimize", spy)
    return results


@every_method
def test_quadratics_are_solved_within_60_evaluations(method):
    family = Quadratic()
    curves = reference_curves(method, family, windows(family, 40), 60)
    assert curves.shape == (61, 40)
    assert curves.dtype == torch.float64
    assert (curves[60] / curves[0]).median() <= 1e-8
    assert (curves[60] <= curves[0]).all()


@every_method
def test_curves_start_at_the_start_point_and_never_rise(method):
    family = Quadratic(theta0_scale=1.0)
    batch = windows(family, 10)
    curves = reference_curves(method, family, batch, 30)
    assert (curves[0] - family.losses(batch.theta0, batch.task, {})).abs().max() <= 1e-12
    assert (curves.diff(dim=0) <= 0).all()


@every_method
def test_every_evaluation_that_scipy_counts_is_counted(method, solver_results):
    family, asked = Quadratic(dimension=4), []

    class Counting(Quadratic):
        def losses(self, theta, task, data):
            asked.append(theta)
            return family.losses(theta, task, data)

    batch = windows(family, 1)
    curve = reference_curves(method, Counting(dimension=4), batch, 1000)[:, 0]
    assert solver_results[0].nfev == len(asked) < 1000
    best = np.minimum.accumulate([family.losses(x, batch.task, {}).item() for x in asked])
    assert np.array_equal(curve[: len(best)].numpy(), best)
    assert torch.equal(curve[len(best) :], curve[-1].expand(1001 - len(best)))
    assert curve[-1].item() <= solver_results[0].fun


@every_method
@pytest.mark.parametrize("evaluations", [1, 7])
def test_no_more_evaluations_than_allowed_are_made(method, evaluations):
    asked = []

    class Counting(Quadratic):
        def losses(self, theta, task, data):
            asked.append(theta)
            return super().losses(theta, task, data)

    family = Counting()
    assert len(reference_curves(method, family, windows(family, 1), evaluations)) == evaluations + 1
    assert len(asked) == evaluations + 1  # and one at the start point


@every_method
def test_a_smaller_budget_gives_the_start_of_a_longer_curve(method):
    family = Quadratic()
    batch = windows(family, 5)
    short, long = (reference_curves(method, family, batch, budget) for budget in (10, 40))
    assert torch.equal(short, long[:11])


@every_method
def test_curves_equal_scipys_on_a_hand_written_gradient(method):
    family = Quadratic(dimension=6)
    batch = windows(family, 3)
    curves = reference_curves(method, family, batch, 15).numpy()
    for s in range(3):
        w, y, seen = batch.task["w"][s].numpy(), batch.task["y"][s].numpy(), []

        def objective(x, w=w, y=y, seen=seen):
            residual = w @ x - y
            seen.append(residual @ residual)
            return seen[-1], 2 * w.T @ residual

        options = references._OPTIONS[method]
        scipy.optimize.minimize(
            objective, batch.theta0[s].numpy(), jac=True, method=method.value, options=options
        )
        best = np.minimum.accumulate(seen)[:16]
        assert np.abs(curves[: len(best), s] - best).max() <= 1e-8 * best[0]


@every_method
def test_tasks_do_not_influence_each_other(method):
    family = Quadratic()
    few, many = (reference_curves(method, family, windows(family, tasks), 20) for tasks in (2, 5))
    assert torch.equal(few, many[:, :2])


def test_float32_batches_are_solved_in_float64():
    family = Quadratic()
    curves = reference_curves(ReferenceMethod.LBFGS, family, windows(family, 5, torch.float32), 100)
    assert curves.dtype == torch.float64
    assert curves[-1].median() <= 1e-20


@every_method
def test_losses_that_overflow_do_not_spoil_the_best(method):
    class Cliff(Quadratic):
        def losses(self, theta, task, data):
            loss = super().losses(theta, task, data)
            return torch.where(theta.square().sum(-1) > 1.0, loss * torch.nan, loss)

    family = Cliff()
    curves = reference_curves(method, family, windows(family, 10), 30)
    assert curves.isfinite().all()
    assert (curves.diff(dim=0) <= 0).all()


def test_families_with_minibatches_are_refused_with_the_reason():
    family = Minibatches()
    with pytest.raises(ValueError, match=r"needs a deterministic loss, but Minibatches draws a minibatch"):
        reference_curves(ReferenceMethod.LBFGS, family, windows(family, 2), 10)


def test_a_budget_below_one_is_refused():
    family = Quadratic()
    with pytest.raises(ValueError, match=r"evaluations \(0\) must be"):
        reference_curves(ReferenceMethod.LBFGS, family, windows(family, 2), 0)


def test_titles_name_the_method_and_the_line_search():
    titles = [method.title for method in ReferenceMethod]
    assert len(set(titles)) == len(titles)
    assert all("strong Wolfe" in title and "SciPy" in title for title in titles)
