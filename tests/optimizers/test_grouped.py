"""Grouped: each rule on its own parameters, to the bit; meta-gradients of every backend; saved, loaded."""

import pickle

import pytest
import torch
from conftest import Regression, draw_windows, phi_gradient, small_lstm
from torch import nn

from l2l_scale.deploy import describe_rule, load_rule, save_rule
from l2l_scale.estimators import LogLoss, TruncatedBPTT
from l2l_scale.estimators.coordinates import draw_coordinates
from l2l_scale.flat import FlatSpec, Segment
from l2l_scale.optimizers import (
    SGD,
    Adam,
    CoordinatewiseLSTM,
    ExponentialSchedule,
    GlobalAveraging,
    Grouped,
    Scheduled,
    UpdateRule,
)
from l2l_scale.optimizers.backend import accelerate, check_fusable
from l2l_scale.optimizers.base import TwoPhaseRule
from l2l_scale.optimizers.grouped import BoundGroups
from l2l_scale.sampling import Schedule
from l2l_scale.tasks import ConvClassifier, Quadratic
from l2l_scale.tree import tree_leaves
from l2l_scale.unroll import InnerGradient, begin, unroll

CPU = torch.device("cpu")
SPEC = FlatSpec(
    (
        Segment("conv.0.weight", (2, 1, 3, 3), "conv"),
        Segment("norm.0.weight", (2,), "norm"),
        Segment("norm.0.bias", (2,), "norm"),
        Segment("conv.1.weight", (1, 2, 3, 3), "conv"),
        Segment("linear.weight", (3, 4), "linear"),
        Segment("linear.bias", (3,), "bias"),
    )
)
REST = {"weights": ["linear"], "rest": ["*"]}
IMAGES = ConvClassifier(channels=(2,), kernel=3, hidden=(), batch_size=8, initialisation="torch")
FAMILIES = [Regression(), IMAGES]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)


def two_rules(groups=REST, seeds=(0, 1)) -> Grouped:
    return Grouped({name: small_lstm(seed) for name, seed in zip(groups, seeds, strict=True)}, groups)


def taken(groups, spec=SPEC):
    """Which coordinates each rule takes."""
    bound = Grouped({name: SGD(1.0) for name in groups}, groups).for_spec(spec)
    return {name: bound.take(name, torch.arange(spec.size)).tolist() for name in bound.parts}


def test_patterns_are_of_kinds_and_names_and_the_first_that_fits_counts():
    by_kind = taken({"conv": ["conv"], "linear": ["linear", "bias", "norm"]})
    assert by_kind["conv"] == [*range(18), *range(22, 40)]
    assert by_kind["linear"] == [*range(18, 22), *range(40, 55)]
    by_name = taken({"last": ["linear.*"], "first": ["conv.0.?eight"], "rest": ["*"]})
    assert by_name == {"last": [*range(40, 55)], "first": [*range(18)], "rest": [*range(18, 40)]}
    assert taken({"all": ["*"], "none": ["*"]}) == {"all": [*range(55)]}


def test_ranges_that_touch_are_one():
    bound = Grouped({"a": SGD(1.0), "b": SGD(1.0)}, {"a": ["conv"], "b": ["*"]}).for_spec(SPEC)
    assert bound.places == {"a": (slice(0, 18), slice(22, 40)), "b": (slice(18, 22), slice(40, 55))}


@pytest.mark.parametrize(
    ("rules", "groups", "words"),
    [
        (["a"], {"b": ["*"]}, r"groups \(b\) must have a list of patterns for every one of the rules \(a\)"),
        ([], {}, "must have a list"),
        (["a.b"], {"a.b": ["*"]}, "names that are words, but 'a.b'"),
        (["keys"], {"keys": ["*"]}, "names that are words, but 'keys'"),
        (["a"], {"a": "conv"}, r"groups: a \('conv'\) must be a list of patterns"),
        (["a"], {"a": []}, r"groups: a \(\[\]\) must be a list of patterns"),
    ],
)
def test_bad_settings_are_refused(rules, groups, words):
    with pytest.raises(ValueError, match=words):
        Grouped({name: SGD(1.0) for name in rules}, groups)


def test_a_parameter_without_a_rule_is_named_with_the_way_out():
    with pytest.raises(ValueError, match=r"none fits 'norm.0.weight' of kind 'norm'; .* the pattern '\*'"):
        taken({"conv": ["conv"], "linear": ["linear"]})


def test_a_rule_that_is_not_bound_says_so():
    rule, theta = two_rules(), torch.zeros(1, 55)
    for use in (lambda: rule.init_state(theta), lambda: rule(theta, theta, None)):
        with pytest.raises(ValueError, match=r"rule.for_spec\(family.spec\)"):
            use()


def test_updates_are_those_of_each_rule_on_its_own_slice(double):
    grouped = two_rules({"conv": ["conv"], "other": ["*"]})
    bound = grouped.for_spec(SPEC)
    theta = torch.randn(3, SPEC.size)
    state, own = bound.init_state(theta), {}
    places = {"conv": [*range(18), *range(22, 40)], "other": [*range(18, 22), *range(40, 55)]}
    for step in range(3):
        grad = torch.randn(3, SPEC.size)
        update, state = bound(grad, theta, state)
        for name, index in places.items():
            rule = grouped.rules[name]
            own[name] = rule.init_state(theta[:, index]) if step == 0 else own[name]
            expected, own[name] = rule(grad[:, index], theta[:, index], own[name])
            assert torch.equal(update[:, index], expected)
            pairs = zip(tree_leaves(state[name]), tree_leaves(own[name]), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        theta = theta + update


@every_family
def test_the_same_phi_in_both_is_the_single_rule(family, double):
    (window,) = draw_windows(family, Schedule(horizon=8, window=8), 1)
    single, grouped = small_lstm(), two_rules(seeds=(0, 0)).for_spec(family.spec)
    one, two = (
        unroll(rule, family, begin(rule, window, None), window, InnerGradient.FIRST_ORDER).losses
        for rule in (single, grouped)
    )
    torch.testing.assert_close(one, two, rtol=1e-9, atol=0)
    gradients = phi_gradient(single, one.sum()), phi_gradient(grouped, two.sum()).view(2, -1).sum(0)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def meta_gradient(rule: Grouped, family, backend, windows, **settings):
    """Of every window of a trajectory, each with the state that the one before left."""
    computed = accelerate(rule.for_spec(family.spec), backend, CPU, torch.float64).rule
    estimator, carry, found = TruncatedBPTT(meta_loss=LogLoss(), **settings), None, []
    estimator.check_rule(computed)
    for window in windows:
        estimate = estimator(computed, family, begin(computed, window, carry), window)
        carry = estimate.rollout.carry
        found.append((estimate.surrogate.detach(), phi_gradient(rule, estimate.surrogate)))
    return found


@every_family
@pytest.mark.parametrize("second_order", [False, True])
def test_fused_meta_gradients_are_the_eager_ones(family, second_order, double):
    windows = draw_windows(family, Schedule(horizon=8, window=4), 2)
    rule = two_rules()
    assert isinstance(accelerate(rule.for_spec(family.spec), "fused", CPU, torch.float64).rule, TwoPhaseRule)
    results = (
        meta_gradient(rule, family, backend, windows, second_order=second_order)
        for backend in ("eager", "fused")
    )
    for (loss, gradient), (fused_loss, fused_gradient) in zip(*results, strict=True):
        torch.testing.assert_close(fused_loss, loss, rtol=1e-9, atol=0)
        for one, other in zip(gradient.chunk(2), fused_gradient.chunk(2), strict=True):  # of either rule
            assert one.norm() > 0
            assert (one - other).norm() <= 1e-7 * one.norm()


def test_second_order_meta_gradient_is_that_of_finite_differences(double):
    family, rule = Regression(), two_rules()
    windows = draw_windows(family, Schedule(horizon=4, window=4), 1)
    ((_, gradient),) = meta_gradient(rule, family, "eager", windows, second_order=True)
    direction = torch.randn(len(gradient), generator=torch.Generator().manual_seed(0))
    phi = nn.utils.parameters_to_vector(rule.parameters()).detach()
    values = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(phi + sign * 1e-5 * direction, rule.parameters())
        ((value, _),) = meta_gradient(rule, family, "eager", windows, second_order=True)
        values.append(value)
    assert abs((values[0] - values[1]) / 2e-5 - gradient @ direction) < 1e-6 * gradient.norm()


def test_slots_that_diverge_do_not_spoil_the_others(double):
    family, rule = Regression(), two_rules()
    (window,) = draw_windows(family, Schedule(horizon=4, window=4), 1)
    window.theta0[1] = 1e200
    for backend in ("eager", "fused"):
        ((loss, gradient),) = meta_gradient(rule, family, backend, [window])
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert gradient.norm() > 0


def test_drawn_coordinates_give_the_whole_gradient_in_the_mean(double):
    family = Quadratic(dimension=6, theta0_scale=1.0)
    spec = FlatSpec(tuple(Segment(name, (3,), name) for name in ("weights", "rest")))
    rule = two_rules({"weights": ["weights"], "rest": ["*"]})
    bound = accelerate(rule.for_spec(spec), "fused", CPU, torch.float64).rule
    (window,) = draw_windows(family, Schedule(horizon=4, window=4), 1)

    def gradient(draw):
        carry = begin(bound, window, None)
        rollout = unroll(bound, family, carry, window, InnerGradient.FIRST_ORDER, draw=draw)
        return phi_gradient(rule, rollout.losses.sum())

    whole = gradient(None)
    assert torch.equal(gradient(draw_coordinates(100, 0)), whole)
    drawn = torch.stack([gradient(draw_coordinates(4, index)) for index in range(300)])
    error = (drawn.mean(0) - whole).norm() / (drawn.std(0).norm() / 300**0.5)
    assert error < 3


def test_kernels_are_asked_for_by_every_rule():
    odd = Grouped({"a": small_lstm(), "b": Adam(0.1)}, {"a": ["linear"], "b": ["*"]})
    with pytest.raises(ValueError, match="Adam has no fused kernel"):
        check_fusable(odd)
    check_fusable(two_rules())
    mixed = accelerate(odd.for_spec(SPEC), "auto", CPU, torch.float32)
    assert type(mixed.rule) is BoundGroups
    assert mixed.description.startswith("a: fused (")
    assert "b: eager (Adam" in mixed.description
    with pytest.raises(ValueError, match="coordinates"):
        TruncatedBPTT(coordinates=3).check_rule(mixed.rule)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scheduled(two_rules(), ExponentialSchedule(0.9)),
        lambda: two_rules({"weights": ["linear", "conv*"], "rest": ["*"]}),
        lambda: Grouped({"a": CoordinatewiseLSTM(4, 1, sharing=GlobalAveraging(1))}, {"a": ["*"]}),
        lambda: Grouped({"a": SGD(0.1), "b": Adam(0.2)}, {"a": ["linear"], "b": ["*"]}),
    ],
    ids=["scheduled", "two", "sharing", "classic"],
)
def test_saved_and_loaded_it_does_the_same(make, tmp_path):
    rule: UpdateRule = make()
    loaded = load_rule(save_rule(rule, tmp_path / "rule.safetensors"))
    assert describe_rule(loaded) == describe_rule(rule)
    theta = torch.randn(2, SPEC.size)
    updates = []
    for one in (rule, loaded, pickle.loads(pickle.dumps(rule))):
        bound = one.for_spec(SPEC)
        update, _ = bound(theta, theta, bound.init_state(theta))
        updates.append(update)
    assert torch.equal(updates[0], updates[1])
    assert torch.equal(updates[0], updates[2])
