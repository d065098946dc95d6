"""The guard: silent while all is well, and a way back when a rule runs away."""

import copy
import io
import math
import warnings

import pytest
import torch
from torch import nn

from l2l_scale.deploy import Guard, LearnedOptimizer
from l2l_scale.optimizers import SGD, CoordinatewiseLSTM, SteeredMemory, TanhExp, UpdateRule


class Climber(UpdateRule):
    """Gradient descent in the wrong direction: θ grows by ``factor`` per step on f = ½ ‖θ‖²."""

    def __init__(self, factor: float = 3.0):
        super().__init__()
        self.factor = factor
        self.rate = nn.Parameter(torch.tensor(factor - 1))

    def init_state(self, theta):
        return torch.zeros_like(theta[..., :1])

    def forward(self, grad, theta, state):
        return self.rate * grad, state + 1


class TooLong(Climber):
    """Gradient descent with a rate above 2: diverges, but not with a tenth of it."""

    def forward(self, grad, theta, state):
        return -self.rate * grad, state + 1


def descend(rule, steps, guard, start=1.0, **kwargs):
    """f = ½ ‖θ‖² from (start, start), without a closure; losses, the point and the optimizer."""
    theta = nn.Parameter(torch.full((2,), start))
    optimizer = LearnedOptimizer([theta], rule, guard=guard, **kwargs)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = theta.square().sum() / 2
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, theta, optimizer


def lstm() -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    return CoordinatewiseLSTM(6, 2, head=TanhExp(0.1, 1.0), output_scale=1.0)


def test_nothing_changes_while_all_is_well():
    guarded, plain = (descend(TooLong(factor=1.5), 60, guard) for guard in (Guard(), False))
    assert torch.equal(guarded[1], plain[1])
    assert guarded[2].alarms == 0
    assert "guard" not in plain[2].state["group 0"]


def test_a_rule_that_runs_away_is_brought_back():
    with pytest.warns(RuntimeWarning, match="went back"):
        losses, theta, optimizer = descend(Climber(), 200, True)
    assert optimizer.alarms >= 1
    assert theta.isfinite().all()
    assert max(losses) < 1e10
    unguarded = descend(Climber(), 200, False)[0]
    assert math.isinf(unguarded[-1]) or math.isnan(unguarded[-1])


def test_it_recovers_where_smaller_steps_do():
    with pytest.warns(RuntimeWarning):
        losses, _, optimizer = descend(TooLong(factor=5.0), 40, Guard(growth=1.0001))
    assert losses[-1] < 1e-6 < losses[0]
    assert optimizer.alarms == 1


def test_the_scale_grows_back():
    theta = nn.Parameter(torch.ones(1))
    optimizer = LearnedOptimizer([theta], lstm(), guard=Guard(growth=1.5, backoff=0.25))
    scales = []

    def step(gradient):
        theta.grad = torch.full((1,), gradient)
        optimizer.step()
        scales.append(optimizer.state["group 0"]["guard"]["scale"])

    step(1.0)
    with pytest.warns(RuntimeWarning, match="gradient is not finite"):
        step(math.inf)
    for _ in range(5):
        step(1.0)
    assert scales == pytest.approx([1, 0.25, 0.375, 0.5625, 0.84375, 1, 1])


def test_it_returns_to_a_point_where_all_was_well_for_long_enough():
    theta = nn.Parameter(torch.zeros(1))
    optimizer = LearnedOptimizer([theta], Counter(), guard=Guard(every=3, overshoot=1.0))
    theta.grad = torch.ones(1)
    for _ in range(10):
        optimizer.step()
    theta.grad = torch.full((1,), math.nan)
    with pytest.warns(RuntimeWarning):
        optimizer.step()
    # θ is 0, 1, …, 10 where the gradients of steps 1 … 11 are measured; points are kept of 3, 6, 9 (θ after
    # so many steps); of 9 it is not known yet whether all goes well.
    assert theta.item() == 6
    assert optimizer.state_dict()["state"]["group 0"]["leaves"][0].item() == 0  # the rule began anew


class Counter(Climber):
    """Walks by 1."""

    def forward(self, grad, theta, state):
        return torch.ones_like(grad), state + 1


@pytest.mark.parametrize("loss", [math.nan, 1e3])
def test_a_closure_tells_the_loss(loss):
    theta = nn.Parameter(torch.ones(2))
    optimizer = LearnedOptimizer([theta], Counter(), guard=True)
    values = iter([1.0, 2.0, 3.0, loss])

    def closure():
        theta.grad = torch.ones(2)
        return torch.tensor(next(values))

    for _ in range(3):
        optimizer.step(closure)
    with pytest.warns(RuntimeWarning, match="the loss"):
        optimizer.step(closure)
    assert theta.tolist() == [1, 1]
    assert optimizer.alarms == 1


class FixedLength(Climber):
    """Downhill by steps of one length: swings to and fro about the minimum."""

    def forward(self, grad, theta, state):
        return -self.rate * grad.sign(), state + 1


def test_steps_that_are_too_long_are_shortened():
    swinging, _, _ = descend(FixedLength(factor=3.0), 100, Guard(overshoot=1.0), start=1.1)
    assert swinging[-1] > 0.5
    losses, _, optimizer = descend(FixedLength(factor=3.0), 100, Guard(), start=1.1)
    assert losses[-1] < 0.05
    assert losses[:11] == swinging[:11]  # not before it has seen ten steps
    assert optimizer.alarms == 0


def test_the_cosine_is_that_of_a_step_and_the_gradient_at_its_end():
    theta = nn.Parameter(torch.zeros(2))
    optimizer = LearnedOptimizer([theta], Counter(), guard=Guard(every=4))
    cosines = []
    for gradient in ([1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 0.0], [3.0, 3.0]):
        theta.grad = torch.tensor(gradient)
        optimizer.step()
        cosines.append(optimizer.state["group 0"]["guard"]["cosine"])
    half = 0.5**0.5  # steps are along (1, 1); zero gradients do not count
    assert cosines == pytest.approx([0, half, 0, 0, 1 / 3])


def test_an_update_that_is_not_finite_is_not_taken():
    rule = lstm()
    with torch.no_grad():
        rule.output.weight[0, 0] = math.nan
    with pytest.warns(RuntimeWarning, match="update is not finite"):
        _, theta, _ = descend(rule, 3, True)
    assert theta.tolist() == [1, 1]


def test_small_gradients_may_grow_again():
    """As after a plateau, or where a loss has converged to rounding."""
    theta = nn.Parameter(torch.ones(1))
    optimizer = LearnedOptimizer([theta], lstm(), guard=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for gradient in [1.0] * 5 + [1e-9] * 30 + [0.0] * 5 + [0.9]:
            theta.grad = torch.full((1,), gradient)
            optimizer.step()
    assert optimizer.alarms == 0


def test_a_state_dict_keeps_the_watch():
    def steps(optimizer, theta, gradients):
        for gradient in gradients:
            theta.grad = torch.full((2,), gradient)
            optimizer.step()

    theta = nn.Parameter(torch.ones(2))
    optimizer = LearnedOptimizer([theta], lstm(), guard=Guard(every=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps(optimizer, theta, [1.0, 2.0, math.inf, 1.0, 1.0, 1.0])
        twin = nn.Parameter(theta.detach().clone())
        other = LearnedOptimizer([twin], lstm(), guard=Guard(every=2))
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        steps(optimizer, theta, [1.0, math.inf, 1.0])
        steps(other, twin, [1.0, math.inf, 1.0])
    assert torch.equal(theta, twin)
    assert optimizer.alarms == other.alarms == 2
    assert copy.deepcopy(optimizer).guard == Guard(every=2)


def test_a_state_without_a_watch_is_taken_up():
    _, theta, plain = descend(lstm(), 5, False)
    guarded = LearnedOptimizer([theta], lstm(), guard=True)
    guarded.load_state_dict(plain.state_dict())
    guarded.step()
    assert guarded.alarms == 0


@pytest.mark.parametrize(
    ("rule", "expected"), [(lstm, True), (lambda: SGD(0.1), False), (SteeredMemory, False)]
)
def test_who_has_a_guard_if_nothing_is_said(rule, expected):
    *_, optimizer = descend(rule(), 2, None)
    assert ("guard" in optimizer.state["group 0"]) is expected


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"limit": 1.0}, "limit"), ({"growth": 0.9}, "growth"), ({"every": 0}, "every"),
     ({"backoff": 0.0}, "backoff"), ({"backoff": 1.0}, "backoff"), ({"overshoot": 1.5}, "overshoot")],
)  # fmt: skip
def test_arguments_out_of_range(arguments, name):
    with pytest.raises(ValueError, match=name):
        Guard(**arguments)


def test_a_guard_must_be_one():
    with pytest.raises(ValueError, match=r"guard \('yes'\)"):
        descend(lstm(), 1, "yes")
