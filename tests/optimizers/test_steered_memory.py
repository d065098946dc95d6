"""Steered memory: what it does before training, what the network may change, and what it may not."""

import math

import numpy as np
import pytest
import torch

from l2l_scale.deploy import LearnedOptimizer
from l2l_scale.evaluation import HeldOut, loss_curves
from l2l_scale.optimizers import SteeredMemory
from l2l_scale.optimizers.cells import Computing, GlobalAveraging
from l2l_scale.optimizers.quasi_newton import norm
from l2l_scale.optimizers.safeguards import correction, has_curvature, judge
from l2l_scale.optimizers.steering import Observations, SteeringNetwork
from l2l_scale.rng import Split
from l2l_scale.tasks import Quadratic, TestFunction
from l2l_scale.tree import tree_leaves


def untrained(**options):
    """The hand-designed method that training starts from."""
    torch.manual_seed(0)
    return SteeredMemory(output_scale=0.0, **options)


def quadratic(size, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((size, size))
    return w.T @ w + 0.1 * np.eye(size), rng.standard_normal(size)


def conjugate_gradients(hessian, target, x, steps):
    """The textbook (Nocedal and Wright 2006, algorithm 5.2); the iterates x_0 … x_k."""
    r = hessian @ x - target
    p, iterates = -r, [x]
    for _ in range(steps):
        alpha = r @ r / (p @ hessian @ p)
        x, new = x + alpha * p, r + alpha * hessian @ p
        p, r = -new + (new @ new / (r @ r)) * p, new
        iterates.append(x)
    return iterates


def run(rule, hessian, target, x, steps):
    """States and points of a rule on ½ xᵀHx − bᵀx."""
    h, b = torch.from_numpy(hessian), torch.from_numpy(target)
    theta = torch.from_numpy(x).unsqueeze(0)
    state, states, points = rule.init_state(theta), [], [theta]
    with torch.no_grad():
        for _ in range(steps):
            update, state = rule(theta @ h - b, theta, state)
            theta = theta + update
            states.append(state)
            points.append(theta)
    return states, points


@pytest.mark.parametrize("storage", ["dense", "window"])
def test_its_newton_points_in_known_directions_are_the_iterates_of_conjugate_gradients(storage):
    hessian, target = quadratic(7)
    rule = untrained(storage=storage, newness=0.0, first_step=0.02).double()
    states, points = run(rule, hessian, target, np.zeros(7), 9)
    memory = rule.memory_of(7)
    truth = conjugate_gradients(hessian, target, np.zeros(7), 7)
    for k in range(1, 8):  # after the k-th gradient beyond the first, k directions are known
        state = states[k]
        assert state.directions.item() == k
        newton = state.anchor - memory.known(state.memory, state.gradient)
        assert np.abs(newton[0].numpy() - truth[k]).max() <= 1e-8 * np.abs(truth[7]).max()
    assert np.abs(points[-1][0].numpy() - np.linalg.solve(hessian, target)).max() <= 1e-8


def test_dimension_plus_a_few_gradients_solve_a_quadratic():
    for size in (2, 5, 12):
        hessian, target = quadratic(size, seed=size)
        _, points = run(untrained(newness=0.0).double(), hessian, target, np.ones(size), size + 3)
        residual = hessian @ points[-1][0].numpy() - target
        assert np.abs(residual).max() <= 1e-6


def test_the_path_does_not_depend_on_the_unit_of_the_loss_once_the_first_step_is_scaled():
    hessian, target = quadratic(5)
    _, plain = run(untrained().double(), hessian, target, np.ones(5), 6)
    _, scaled = run(untrained(first_step=0.01 / 64).double(), 64 * hessian, 64 * target, np.ones(5), 6)
    for a, b in zip(plain, scaled, strict=True):
        assert (a - b).abs().max() <= 1e-5  # the first step's logarithm is kept in float32


def held_out(family, tasks, inner_steps):
    return HeldOut(family=family, seed=1, split=Split.TUNE, num_tasks=tasks, inner_steps=inner_steps)


@pytest.mark.parametrize(
    "family", [Quadratic(), Quadratic(w_scale=1.5), Quadratic(theta0_scale=1.0), Quadratic(dimension=20)]
)
def test_untrained_it_solves_random_quadratics_in_float32_and_stays_there(family):
    losses = loss_curves(untrained(), held_out(family, 64, 300))
    assert losses.isfinite().all()
    assert losses[50].median() <= 1e-9
    assert losses[50].mean() <= 1e-4
    assert losses[-1].max() <= 1e-5
    assert (losses[100:].max(0).values <= losses[0] + 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_no_weights_let_the_anchor_get_worse(seed):
    torch.manual_seed(seed)
    rule, family = SteeredMemory(output_scale=1.0), Quadratic()
    with torch.no_grad():
        for parameter in rule.network.parameters():
            parameter.normal_(std=1.0)
    ho = held_out(family, 64, 100)
    batch = next(ho.windows(ho.sampler(), range(64)))
    theta = batch.theta0
    state, anchors = rule.init_state(theta), []
    with torch.no_grad():
        for _ in range(100):
            update, state = rule(family.losses_and_gradients(theta, batch.task, {}, False)[1], theta, state)
            theta = theta + update
            anchors.append(family.losses(state.anchor.float(), batch.task, {}))
    losses = torch.stack(anchors)
    assert (losses[1:] <= 1.001 * losses[:-1] + 1e-5).all()
    assert losses[-1].median() <= 0.3 * losses[0].median()


def test_rosenbrock_in_float32():
    losses = loss_curves(untrained(first_step=1e-3, newness=0.1), held_out(TestFunction(), 64, 200))
    assert losses.isfinite().all()
    assert losses[-1].median() <= 1e-10


def test_a_gradient_that_is_not_finite_sends_it_back_to_the_anchor():
    hessian, target = quadratic(4)
    rule = untrained().double()
    states, points = run(rule, hessian, target, np.ones(4), 3)
    bad = torch.full((1, 4), math.nan).double()
    update, state = rule(bad, points[-1], states[-1])
    assert update.isfinite().all()
    assert torch.equal(state.anchor, states[-1].anchor)
    assert all(leaf.isfinite().all() for leaf in tree_leaves(state))
    assert state.lengths.failures.item() == 1


def test_a_first_gradient_that_is_not_finite_is_waited_out():
    hessian, target = quadratic(4)
    rule, theta = untrained().double(), torch.ones(1, 4).double()
    bad = torch.tensor([[1.0, math.nan, 0.0, 0.0]]).double()
    update, state = rule(bad, theta, rule.init_state(theta))
    assert not update.any()
    h, b = torch.from_numpy(hessian), torch.from_numpy(target)
    first, _ = rule(theta @ h - b, theta, rule.init_state(theta))
    second, _ = rule(theta @ h - b, theta, state)
    assert second.isfinite().all()
    assert torch.nn.functional.cosine_similarity(first, second) > 0.999


def test_a_window_shorter_than_the_problem_never_takes_everything_for_known():
    rng, size = np.random.default_rng(0), 40
    q, _ = np.linalg.qr(rng.standard_normal((size, size)))
    hessian, start = (q * np.logspace(0, -4, size)) @ q.T, rng.standard_normal(size)
    rule = untrained(storage="window", window=10, first_step=0.3).double()
    _, points = run(rule, hessian, np.zeros(size), start, 300)
    loss = [float(p @ torch.from_numpy(hessian) @ p.T) for p in points]
    assert min(loss[200:]) <= 1e-8 * loss[0]


def test_beyond_convergence_float32_memory_stays_finite():
    torch.manual_seed(0)
    rule, theta = untrained(precision="same"), torch.randn(40, 8)
    hessian = torch.logspace(0, -2, 8)
    theta.requires_grad_()
    state, point = rule.init_state(theta), theta
    for _ in range(60):
        update, state = rule(hessian * point, point, state)
        point = point + update
    assert point.isfinite().all()
    assert (hessian * point.detach().square()).sum(-1).max() <= 1e-10
    (slope,) = torch.autograd.grad(point.square().sum(), theta)
    assert slope.isfinite().all()


def test_the_memory_is_cleared_after_so_many_failures_in_a_row():
    hessian, target = quadratic(4)
    rule = untrained(patience=3).double()
    states, points = run(rule, hessian, target, np.ones(4), 4)
    theta, state = points[-1], states[-1]
    assert state.directions.item() > 0
    for failure in range(1, 4):
        update, state = rule(torch.full((1, 4), math.inf).double(), theta, state)
        theta = theta + update + 0.1  # every trial is another point
        assert state.lengths.failures.item() == failure % 3
    assert state.directions.item() == 0
    assert not rule.memory_of(4).known(state.memory, torch.ones(1, 4).double()).any()


def test_judgement_of_a_trial():
    anchor, s = torch.zeros(1, 2).double(), torch.tensor([[1.0, 0.0]]).double()
    zero = torch.zeros(1, 1).double()

    def improved(before, after):
        grads = (torch.tensor([[value, 0.0]]).double() for value in (after, before))
        after_, before_ = grads
        return judge(s, after_, anchor, before_, zero, 1e-16).improved.item()

    assert improved(-1.0, -0.5)  # downhill still
    assert improved(-1.0, 0.9)  # beyond the minimum, but less far beyond than before it
    assert not improved(-1.0, 1.1)
    assert not improved(1.0, -2.0)  # uphill at first: two gradients cannot tell
    before, after = torch.tensor([[-1.0, 1.0]]).double(), torch.tensor([[3.0, 4.0]]).double()
    trial = judge(s, after, anchor, before, zero, 0.0)
    assert trial.y.tolist() == [[4.0, 3.0]]
    assert trial.moved.item()
    assert judge(s, s * math.inf, anchor, s, zero, 0.0).s.tolist() == [[0.0, 0.0]]


def test_the_steepness_is_the_largest_recent_curvature_of_steps_that_improved():
    anchor, s = torch.zeros(1, 2).double(), torch.tensor([[0.5, 0.0]]).double()
    before, after = torch.tensor([[-4.0, 0.0]]).double(), torch.tensor([[1.0, 0.0]]).double()
    low, high = (torch.full((1, 1), value).double() for value in (1.0, 100.0))
    assert judge(s, after, anchor, before, low, 1e-16).steepness.item() == pytest.approx(10.0)
    assert judge(s, after, anchor, before, high, 1e-16).steepness.item() == pytest.approx(95.0)


def test_curvature_within_rounding_is_none():
    s, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[1e-3, 0.0]])
    assert has_curvature(s, y, torch.tensor([[1e-4]])).item()
    assert not has_curvature(s, y, torch.tensor([[1e-3]])).item()
    assert not has_curvature(s, -y, torch.tensor([[0.0]])).item()


def test_correction_is_exact_for_quadratics_and_zero_without_curvature():
    s = torch.tensor([[2.0, 0.0]])
    gradient, y = torch.tensor([[-3.0, 5.0]]), torch.tensor([[1.0, 0.0]])  # curvature ½ along s, minimum at 6
    assert correction(s, y, gradient).item() == 3.0
    assert correction(s, -y, gradient).item() == 0.0


def test_steering_is_neutral_at_zero_and_bounded_everywhere():
    torch.manual_seed(0)
    network = SteeringNetwork(2, 3, 4, 1, GlobalAveraging(1), 4.0, 1.0, 0.0)
    vectors = (torch.randn(3, 5), torch.zeros(3, 5))
    seen = Observations(
        vectors, (torch.tensor([[1e-20], [0.0], [1e20]]), torch.ones(3, 1)), (torch.ones(3, 1) > 0,)
    )
    steering, state = network(seen, network.init_state(vectors[0]), Computing())
    assert all(torch.equal(value, torch.ones_like(value)) for value in steering)
    with torch.no_grad():
        network.output.weight.normal_(std=100)
    steering, _ = network(seen, state, Computing())
    for value in steering[:3]:
        assert value.min() >= 0.25 - 1e-6
        assert value.max() <= 4.0 + 1e-6
    for value in steering[3:]:
        assert value.min() > 0
        assert value.max() <= 1
    assert norm(vectors[1]).max() == 0


def test_float32_keeps_its_memory_in_double_unless_told_otherwise():
    theta = torch.zeros(2, 3)
    assert untrained().init_state(theta).memory.known.dtype == torch.float64
    assert untrained(precision="same").init_state(theta).memory.known.dtype == torch.float32
    update, _ = untrained()(torch.ones(2, 3), theta, untrained().init_state(theta))
    assert update.dtype == torch.float32


def test_in_use_it_fits_a_small_network_on_all_of_its_data():
    torch.manual_seed(0)
    x = torch.randn(64, 10)
    y = (x @ torch.randn(10, 1) > 0).float()
    model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = LearnedOptimizer(model.parameters(), untrained())
    for _ in range(150):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() <= 1e-8  # Adam, rate 0.05, has 2e-6 after 150 steps
