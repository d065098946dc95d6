"""Coordinatewise networks: what it must not see, and how it starts."""

import pytest
import torch
from torch.func import functional_call

from l2l_scale.optimizers import (
    Concatenate,
    CoordinatewiseGRU,
    CoordinatewiseLSTM,
    CoordinatewiseRNN,
    Identity,
    LogMagnitude,
    LogSign,
    RNNprop,
    ScaledLinear,
    TanhExp,
)
from l2l_scale.optimizers.heads import Head
from l2l_scale.tree import tree_leaves, tree_map

SLOTS, SIZE = 3, 6
RULES = {
    "paper": lambda: CoordinatewiseLSTM(hidden_size=7, features=LogSign()),
    "default": lambda: CoordinatewiseLSTM(),
    "wide": lambda: CoordinatewiseLSTM(hidden_size=33, layers=1, features=RNNprop(log_scale=True)),
    "GRU": lambda: CoordinatewiseGRU(hidden_size=7, features=LogSign()),
    "RNN": lambda: CoordinatewiseRNN(hidden_size=7, layers=1, features=RNNprop(log_scale=True)),
    "narrow": lambda: CoordinatewiseLSTM(hidden_size=1, layers=3),
    "rnnprop": lambda: CoordinatewiseLSTM(
        hidden_size=5, features=Concatenate([RNNprop(log_scale=True), LogMagnitude()]), head=TanhExp()
    ),
}

every_rule = pytest.mark.parametrize("name", RULES)


def make(name):
    torch.manual_seed(0)
    return RULES[name]().double()


def gradients(*leading, size=SIZE, inner_steps=5):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(inner_steps, *leading, size, generator=generator, dtype=torch.float64)


def updates(rule, grads):
    """The updates (K, *, N) for a fixed sequence of gradients (K, *, N)."""
    state, results = rule.init_state(grads[0]), []
    for grad in grads:
        update, state = rule(grad, grads[0], state)
        results.append(update)
    return torch.stack(results)


def largest_difference(a, b):
    return (a - b).abs().max().item()


@every_rule
def test_permuting_coordinates_permutes_updates(name):
    rule, grads = make(name), gradients(SLOTS)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert largest_difference(updates(rule, grads)[..., order], updates(rule, grads[..., order])) <= 1e-12


@every_rule
def test_problems_and_coordinates_do_not_influence_each_other(name):
    rule, grads = make(name), gradients(SLOTS)
    other = grads.clone()
    other[:, 1:] = 100 * grads[:, 1:] + 1
    other[:, 0, 1:] = -grads[:, 0, 1:]
    plain, changed = updates(rule, grads), updates(rule, other)
    assert largest_difference(plain[:, 0, 0], changed[:, 0, 0]) <= 1e-12
    assert largest_difference(plain[-1, 1:], changed[-1, 1:]) > 1e-6  # the others have changed


@every_rule
def test_equal_gradients_get_equal_updates(name):
    grads = gradients(SLOTS, size=1).expand(-1, -1, SIZE)
    result = updates(make(name), grads)
    assert largest_difference(result, result[..., :1].expand_as(result)) <= 1e-12


@every_rule
@pytest.mark.parametrize("leading", [(), (SLOTS,), (2, SLOTS)])
@pytest.mark.parametrize("size", [1, SIZE])
def test_shapes_with_any_leading_axes(name, leading, size):
    rule, grads = make(name), gradients(*leading, size=size)
    state = rule.init_state(grads[0])
    update, new = rule(grads[0], grads[0], state)
    assert update.shape == (*leading, size)
    for tree in (state, new):
        assert all(leaf.shape[: len(leading)] == leading for leaf in tree_leaves(tree))
    flat = updates(rule, grads.reshape(len(grads), -1, size))
    assert largest_difference(updates(rule, grads).reshape(flat.shape), flat) <= 1e-12


@every_rule
def test_weights_per_slot_equal_a_loop_over_slots(name):
    rule, grads = make(name), gradients(SLOTS)
    generator = torch.Generator().manual_seed(2)
    perturb = lambda p: 0.1 * torch.randn(SLOTS, *p.shape, generator=generator, dtype=p.dtype)  # noqa: E731
    weights = {key: p.detach() + perturb(p) for key, p in rule.named_parameters()}

    def one(own, theta, grads):
        state, results = rule.init_state(theta), []
        for grad in grads:
            update, state = functional_call(rule, own, (grad, theta, state))
            results.append(update)
        return torch.stack(results)

    together = torch.vmap(one, in_dims=(0, 0, 1), out_dims=1)(weights, grads[0], grads)
    for s in range(SLOTS):
        alone = one({key: value[s] for key, value in weights.items()}, grads[0, s], grads[:, s])
        assert largest_difference(together[:, s], alone) <= 1e-12
    assert largest_difference(together, updates(rule, grads)) > 1e-4  # the weights do differ


@every_rule
def test_first_updates_of_an_untrained_rule_are_small(name):
    result = updates(make(name), gradients(SLOTS))
    assert 0 < result.abs().max() < 0.02


def test_output_scale_zero_starts_with_no_update_but_learns():
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(output_scale=0.0)
    result = updates(rule.float(), gradients(SLOTS).float())
    assert not result.any()
    result.sum().backward()
    assert rule.output.weight.grad.abs().max() > 0


def test_output_scale_scales_the_first_updates():
    def first(scale):
        torch.manual_seed(0)
        return updates(CoordinatewiseLSTM(output_scale=scale).double(), gradients(SLOTS))

    assert largest_difference(first(0.1), 0.1 * first(1.0)) <= 1e-9  # the scale is applied in float32


@every_rule
def test_rules_are_pure(name):
    rule, grads = make(name), gradients(SLOTS)
    attributes = set(vars(rule))
    state = rule.init_state(grads[0])
    before = tree_map(torch.clone, (grads, state))
    first, _ = rule(grads[0], grads[0], state)
    second, _ = rule(grads[0], grads[0], state)
    assert torch.equal(first, second)
    for a, b in zip(tree_leaves((grads, state)), tree_leaves(before), strict=True):
        assert torch.equal(a, b)
    assert set(vars(rule)) == attributes


@every_rule
def test_every_weight_gets_a_finite_derivative(name):
    rule = make(name)
    updates(rule, gradients(SLOTS)).square().sum().backward()
    for key, parameter in rule.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


def test_state_dict_restores_the_rule_exactly():
    rule, other = make("paper"), make("paper")
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    grads = gradients(SLOTS)
    assert not torch.equal(updates(rule, grads), updates(other, grads))
    other.load_state_dict(rule.state_dict())
    assert torch.equal(updates(rule, grads), updates(other, grads))


def test_arguments_are_kept_as_attributes():
    features, head = RNNprop(0.9, 0.8, 1e-7, True), TanhExp(0.3, 1.5)
    arguments = {
        "hidden_size": 3,
        "layers": 1,
        "features": features,
        "head": head,
        "forget_bias": 0.5,
        "output_scale": 0.2,
    }
    rule = CoordinatewiseLSTM(**arguments)
    assert {key: getattr(rule, key) for key in arguments} == arguments
    assert (features.beta1, features.beta2, features.epsilon, features.log_scale) == (0.9, 0.8, 1e-7, True)
    assert (head.scale, head.exp_scale) == (0.3, 1.5)


def test_forget_bias_reaches_every_layer():
    for cell in CoordinatewiseLSTM(hidden_size=4, layers=2, forget_bias=2.0).network.cells:
        assert torch.equal(cell.bias[4:8], torch.full((4,), 2.0))


def test_heads_are_their_formulas():
    outputs = torch.tensor([[0.5, -1.0], [-2.0, 0.3]], dtype=torch.float64)
    assert torch.equal(ScaledLinear(0.1)(outputs[:, :1]), 0.1 * outputs[:, 0])
    expected = 0.05 * outputs[:, 0].tanh() * (2 * outputs[:, 1]).exp()
    assert torch.equal(TanhExp(0.05, 2.0)(outputs), expected)


def test_the_head_is_applied_to_the_output_layer():
    class Constant(Head):
        size = 3

        def __call__(self, outputs):
            return torch.full_like(outputs[..., 0], outputs.shape[-1])

    rule = CoordinatewiseLSTM(hidden_size=2, head=Constant())
    assert torch.equal(updates(rule, gradients(SLOTS).float()), torch.full((5, SLOTS, SIZE), 3.0))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"hidden_size": 0}, r"hidden_size \(0\) must be"),
        ({"hidden_size": -3}, r"hidden_size \(-3\) must be"),
        ({"layers": 0}, r"layers \(0\) must be"),
        ({"output_scale": -0.1}, r"output_scale \(-0.1\) must be"),
        ({"output_scale": float("nan")}, r"output_scale \(nan\) must be"),
    ],
)
def test_bad_arguments_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        CoordinatewiseLSTM(**bad)


@pytest.mark.parametrize(
    ("make_head", "message"),
    [
        (lambda: ScaledLinear(0.0), r"scale \(0.0\) must be"),
        (lambda: TanhExp(scale=-1.0), r"scale \(-1.0\) must be"),
        (lambda: TanhExp(exp_scale=-1.0), r"exp_scale \(-1.0\) must be"),
    ],
)
def test_bad_heads_are_refused_by_name(make_head, message):
    with pytest.raises(ValueError, match=message):
        make_head()


def test_features_see_the_gradient_and_not_theta():
    rule = CoordinatewiseLSTM(features=Identity(3.0)).double()
    grad = gradients(SLOTS)[0]
    state = rule.init_state(grad)
    assert torch.equal(rule(grad, grad, state)[0], rule(grad, 7 * grad, state)[0])
