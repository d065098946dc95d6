"""What all rules keep whose coordinates hear of each other: averaging cells, NTM-BFGS, steered memory."""

import pickle

import pytest
import torch
from conftest import Regression, draw_windows, phi_gradient
from torch.func import functional_call

from l2l_scale.deploy import LearnedOptimizer, load_rule, save_rule
from l2l_scale.estimators import TruncatedBPTT
from l2l_scale.flat import FlatSpec, Segment
from l2l_scale.optimizers import (
    CoordinatewiseLSTM,
    ExponentialSchedule,
    GlobalAveraging,
    LogSign,
    RNNprop,
    Scheduled,
    SharedMemory,
    SteeredMemory,
    TanhExp,
)
from l2l_scale.optimizers.backend import accelerate
from l2l_scale.rng import Split
from l2l_scale.sampling import Schedule, WindowSampler
from l2l_scale.tasks import Quadratic
from l2l_scale.tree import tree_leaves, tree_map
from l2l_scale.unroll import InnerGradient, begin, unroll

SLOTS, SIZE = 3, 6
EVERY_OPTION = {
    "features": RNNprop(log_scale=True),
    "head": TanhExp(0.05, 1.0),
    "read_heads": 2,
    "decay": 0.9,
    "normalization": "unit",
    "write_gate": True,
    "gradient_read": True,
    "direct": 0.1,
}
RULES = {
    "LSTM+GAC": lambda: CoordinatewiseLSTM(5, 2, LogSign(), sharing=GlobalAveraging(2), output_scale=1.0),
    "cell state": lambda: CoordinatewiseLSTM(5, 2, sharing=GlobalAveraging(1, "cell"), output_scale=1.0),
    "NTM-BFGS": lambda: SharedMemory(5, 2, output_scale=1.0),
    "NTM-L-BFGS": lambda: SharedMemory(5, 1, storage="window", window=3, output_scale=1.0, **EVERY_OPTION),
    "mean": lambda: SharedMemory(5, 1, normalization="mean", initial_memory=0.0, output_scale=1.0),
    "steered": lambda: SteeredMemory(5, output_scale=1.0),
    "steered window": lambda: SteeredMemory(5, 2, storage="window", window=4, output_scale=1.0),
    "chunks": lambda: SharedMemory(5, 2, output_scale=1.0, chunk=2),
    "steered chunks": lambda: SteeredMemory(5, 2, output_scale=1.0, chunk=4),
}
every_rule = pytest.mark.parametrize("name", RULES)
vmappable = pytest.mark.parametrize("name", [name for name in RULES if "chunks" not in name])


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    return RULES[name]().to(dtype)


def tasks(*leading, size=SIZE, seed=1):
    """Positive definite quadratics (*, N, N) and start points (*, N): rules must meet real gradients."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(*leading, size, size, generator=generator, dtype=torch.float64)
    return w @ w.mT + torch.eye(size).double(), torch.randn(
        *leading, size, generator=generator, dtype=torch.float64
    )


def descend(rule, hessian, theta, steps=8):
    """The points (steps + 1, *, N) that a rule visits on ½ θᵀHθ."""
    state, points = rule.init_state(theta), [theta]
    for _ in range(steps):
        update, state = rule((hessian @ theta.unsqueeze(-1)).squeeze(-1), theta, state)
        theta = theta + update
        points.append(theta)
    return torch.stack(points)


def largest_difference(a, b):
    return (a - b).abs().max().item()


@every_rule
def test_permuting_coordinates_permutes_the_path(name):
    rule, (hessian, theta) = make(name), tasks(SLOTS)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    plain = descend(rule, hessian, theta)
    permuted = descend(rule, hessian[:, order][:, :, order], theta[:, order])
    assert largest_difference(plain[..., order], permuted) <= 1e-9
    assert largest_difference(plain[-1], plain[0]) > 1e-3


@every_rule
def test_problems_do_not_influence_each_other(name):
    rule, (hessian, theta) = make(name), tasks(SLOTS)
    together = descend(rule, hessian, theta)
    wild = theta.clone()
    wild[1:] = 100 * theta[1:] + 1
    assert largest_difference(descend(rule, hessian, wild)[:, 0], together[:, 0]) <= 1e-12
    assert largest_difference(descend(rule, hessian[0], theta[0]), together[:, 0]) <= 1e-9


@every_rule
def test_coordinates_do_influence_each_other(name):
    rule, (hessian, theta) = make(name), tasks(SLOTS)
    diagonal = torch.diag_embed(
        hessian.diagonal(dim1=-2, dim2=-1)
    )  # so they hear of each other by the rule only
    other = theta.clone()
    other[:, 1:] *= 3
    difference = descend(rule, diagonal, theta)[..., 0] - descend(rule, diagonal, other)[..., 0]
    assert difference.abs().max() > 1e-6


@every_rule
@pytest.mark.parametrize("leading", [(), (2, SLOTS)])
@pytest.mark.parametrize("size", [1, SIZE])
def test_any_leading_axes(name, leading, size):
    rule, (hessian, theta) = make(name), tasks(*leading, size=size)
    path = descend(rule, hessian, theta)
    flat = descend(rule, hessian.reshape(-1, size, size), theta.reshape(-1, size))
    assert largest_difference(path.reshape(flat.shape), flat) <= 1e-9
    for leaf in tree_leaves(rule.init_state(theta)):
        assert leaf.shape[: len(leading)] == leading


@vmappable
def test_weights_per_slot_equal_a_loop_over_slots(name):
    rule, (hessian, theta) = make(name), tasks(SLOTS)
    generator = torch.Generator().manual_seed(2)
    weights = {
        key: p.detach() + 0.1 * torch.randn(SLOTS, *p.shape, generator=generator, dtype=p.dtype)
        for key, p in rule.named_parameters()
    }

    def one(own, hessian, theta):
        state = rule.init_state(theta)
        for _ in range(4):
            update, state = functional_call(rule, own, (hessian @ theta, theta, state))
            theta = theta + update
        return theta

    together = torch.vmap(one)(weights, hessian, theta)
    for s in range(SLOTS):
        alone = one({key: value[s] for key, value in weights.items()}, hessian[s], theta[s])
        assert largest_difference(together[s], alone) <= 1e-9


@every_rule
def test_rules_are_pure(name):
    rule, (hessian, theta) = make(name), tasks(SLOTS)
    grad, attributes = (hessian @ theta.unsqueeze(-1)).squeeze(-1), set(vars(rule))
    state = rule(grad, theta, rule.init_state(theta))[1]
    before = tree_map(torch.clone, (grad, state))
    first, second = rule(grad, theta, state)[0], rule(grad, theta, state)[0]
    assert torch.equal(first, second)
    assert all(
        torch.equal(a, b) for a, b in zip(tree_leaves((grad, state)), tree_leaves(before), strict=True)
    )
    assert set(vars(rule)) == attributes


@every_rule
@pytest.mark.parametrize("second_order", [False, True])
def test_every_weight_gets_a_finite_derivative(name, second_order, double):
    rule, family = make(name), Quadratic(dimension=4)
    first, second = draw_windows(family, Schedule(horizon=12, window=6, staggered=False), 2)
    estimator = TruncatedBPTT(second_order)
    carry = estimator(rule, family, begin(rule, first, None), first).rollout.carry
    estimator(rule, family, begin(rule, second, carry), second).surrogate.backward()
    for key, parameter in rule.named_parameters():
        assert parameter.grad is not None or "log_first_step" in key, key
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().max() > 0 or "log_first_step" in key, key


@pytest.mark.parametrize("name", ["LSTM+GAC", "cell state", "NTM-BFGS", "NTM-L-BFGS", "mean", "chunks"])
def test_the_true_meta_gradient_is_that_of_finite_differences(name, double):
    rule, family = make(name), Quadratic(dimension=3)
    (batch,) = draw_windows(family, Schedule(horizon=5, window=5), 1)

    def meta_loss():
        return unroll(rule, family, begin(rule, batch, None), batch, InnerGradient.SECOND_ORDER).losses.sum()

    gradient, step = phi_gradient(rule, meta_loss()), 1e-6
    parameters = list(rule.parameters())
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    for i in range(0, len(start), max(1, len(start) // 25)):
        values = []
        for sign in (1, -1):
            shifted = start.clone()
            shifted[i] += sign * step
            torch.nn.utils.vector_to_parameters(shifted, parameters)
            values.append(meta_loss().item())
        torch.nn.utils.vector_to_parameters(start, parameters)
        assert abs((values[0] - values[1]) / (2 * step) - gradient[i].item()) <= 1e-6 * gradient.abs().max()


@every_rule
def test_windows_compose(name, double):
    rule, family = make(name), Quadratic(dimension=4)
    (long,) = draw_windows(family, Schedule(horizon=8, window=8, staggered=False), 1)
    short = draw_windows(family, Schedule(horizon=8, window=4, staggered=False), 2)
    whole = unroll(rule, family, begin(rule, long, None), long, InnerGradient.NONE).losses
    carry, parts = None, []
    for batch in short:
        rollout = unroll(rule, family, begin(rule, batch, carry), batch, InnerGradient.NONE)
        carry = rollout.carry
        parts.append(rollout.losses)
    assert torch.equal(torch.cat(parts), whole)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deployed_is_trained_bit_for_bit(name, dtype, tmp_path):
    rule, family = make(name, dtype), Quadratic(dimension=5)
    schedule = Schedule(horizon=15, window=15, staggered=False)
    batch = WindowSampler(family, schedule, 3, Split.TEST)(0, range(1)).to_batch(dtype)
    computed = accelerate(rule, "auto", torch.device("cpu"), dtype).rule
    end = unroll(computed, family, begin(rule, batch, None), batch, InnerGradient.NONE).carry.theta[0]
    path = save_rule(rule, tmp_path / "rule.safetensors")
    theta = torch.nn.Parameter(batch.theta0[0].clone())
    optimizer = LearnedOptimizer([theta], path, guard=False)
    for step in range(15):
        if step == 7:  # a checkpoint in between changes nothing
            state = optimizer.state_dict()
            optimizer = LearnedOptimizer([theta], load_rule(path), guard=False)
            optimizer.load_state_dict(state)
        _, grad = family.losses_and_gradients(theta.detach()[None], batch.task, {}, False)
        theta.grad = grad[0]
        optimizer.step()
    assert torch.equal(theta.detach(), end.detach())


def test_averaging_over_groups_in_training_is_a_parameter_group_each_in_use(double):
    spec = FlatSpec((Segment("weight", (3,), "linear"), Segment("bias", (), "bias")))
    rule = CoordinatewiseLSTM(5, 2, sharing=GlobalAveraging(2, over="group"), output_scale=1.0).double()
    bound = rule.for_spec(spec)
    generator = torch.Generator().manual_seed(5)
    grads = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    weight, bias = (torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 1))
    optimizer = LearnedOptimizer([{"params": [weight]}, {"params": [bias]}], rule, guard=False)
    theta = torch.zeros(1, 4, dtype=torch.float64)
    state = bound.init_state(theta)
    for grad in grads:
        update, state = bound(grad[None], theta, state)
        theta = theta + update
        weight.grad, bias.grad = grad[:3].clone(), grad[3:].clone()
        optimizer.step()
    used = torch.cat((weight, bias)).detach()
    assert largest_difference(used, theta[0].detach()) <= 1e-13
    whole = rule(grads[0][None], theta, rule.init_state(theta))[0]
    assert not torch.equal(whole, bound(grads[0][None], theta, bound.init_state(theta))[0])


def test_bound_rules_share_their_weights_with_the_rule(double):
    rule = SharedMemory(5, 1, sharing=GlobalAveraging(1, over="group"))
    bound = rule.for_spec(Regression().spec)
    assert bound is not rule
    assert all(a is b for a, b in zip(rule.parameters(), bound.parameters(), strict=True))
    rule.float()
    assert {p.dtype for p in bound.parameters()} == {torch.float32}


def test_storage_is_chosen_by_size_and_told():
    for rule in (SharedMemory(max_dense=10), SteeredMemory(max_dense=10)):
        assert "10 × 10" in rule.storage_for(10)
        assert "last 10 pairs" in rule.storage_for(11) or "window of 10 writes" in rule.storage_for(11)
    assert CoordinatewiseLSTM().storage_for(10) == ""


def test_a_dense_and_a_windowed_rule_agree_while_the_window_holds(double):
    family = Quadratic(dimension=4)
    (batch,) = draw_windows(family, Schedule(horizon=6, window=6), 1)
    for kind in (SharedMemory, SteeredMemory):
        losses = []
        for storage in ("dense", "window"):
            torch.manual_seed(0)
            rule = kind(5, 1, storage=storage, window=6, output_scale=1.0)
            rollout = unroll(rule, family, begin(rule, batch, None), batch, InnerGradient.NONE)
            losses.append(rollout.losses)
        assert largest_difference(*losses) <= 1e-10 * losses[0].max()


def test_bound_rules_can_be_pickled_wrapped_and_used():
    spec = FlatSpec((Segment("weight", (3,), "linear"), Segment("bias", (), "bias")))
    rule = CoordinatewiseLSTM(5, 2, sharing=GlobalAveraging(2, over="group"), output_scale=1.0)
    bound, grad = rule.for_spec(spec), torch.randn(1, 4)
    expected = bound(grad, grad, bound.init_state(grad))[0]
    again = pickle.loads(pickle.dumps(bound))
    assert torch.equal(again(grad, grad, again.init_state(grad))[0], expected)
    scheduled = Scheduled(rule, ExponentialSchedule(1.0)).for_spec(spec)
    assert torch.equal(scheduled(grad, grad, scheduled.init_state(grad))[0], expected)
    assert Scheduled(SharedMemory(), ExponentialSchedule(1.0)).storage_for(3) == SharedMemory().storage_for(3)
    used = []  # on other coordinates than those of the tasks that it was bound to
    for one in (bound, rule):
        theta = torch.nn.Parameter(torch.zeros(7))
        theta.grad = torch.linspace(1, 2, 7)
        LearnedOptimizer([theta], one).step()
        used.append(theta.detach())
    assert torch.equal(*used)


@pytest.mark.parametrize("kind", [SharedMemory, SteeredMemory])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"hidden_size": 0}, r"hidden_size \(0\) must be"),
        ({"window": 0}, r"window \(0\) must be"),
        ({"max_dense": -1}, r"max_dense \(-1\) must be"),
        ({"storage": "sparse"}, r"storage \('sparse'\) must be"),
        ({"output_scale": -1.0}, r"output_scale \(-1.0\) must be"),
        ({"chunk": 0}, r"chunk \(0\) must be"),
        ({"sharing": GlobalAveraging(21)}, r"units \(21\) must be <= hidden_size \(20\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(kind, bad, message):
    with pytest.raises(ValueError, match=message):
        kind(**bad)


@pytest.mark.parametrize(
    ("make_rule", "message"),
    [
        (lambda: SharedMemory(read_heads=0), r"read_heads \(0\) must be"),
        (lambda: SharedMemory(write_heads=0), r"write_heads \(0\) must be"),
        (lambda: SharedMemory(decay=1.1), r"decay \(1.1\) must be"),
        (lambda: SharedMemory(direct=-0.1), r"direct \(-0.1\) must be"),
        (lambda: SharedMemory(normalization="l2"), r"normalization \('l2'\) must be"),
        (lambda: SharedMemory(initial_memory=float("nan")), r"initial_memory \(nan\) must be"),
        (lambda: SteeredMemory(first_step=0.0), r"first_step \(0.0\) must be"),
        (lambda: SteeredMemory(newness=1.5), r"newness \(1.5\) must be"),
        (lambda: SteeredMemory(patience=0), r"patience \(0\) must be"),
        (lambda: SteeredMemory(freedom=0.5), r"freedom \(0.5\) must be"),
        (lambda: SteeredMemory(precision="half"), r"precision \('half'\) must be"),
    ],
)
def test_bad_arguments_of_one_rule_are_refused_by_name(make_rule, message):
    with pytest.raises(ValueError, match=message):
        make_rule()
