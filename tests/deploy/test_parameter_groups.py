"""Grouped rules in use: kinds said, named or guessed; equal to a rollout; state dicts and added groups."""

import copy
import io

import pytest
import torch
from torch import nn

from l2l_scale.deploy import LearnedOptimizer, load_rule, parameter_groups, save_rule
from l2l_scale.deploy.kinds import spec_of
from l2l_scale.flat import FlatSpec
from l2l_scale.optimizers import (
    SGD,
    CoordinatewiseLSTM,
    ExponentialSchedule,
    Grouped,
    LogSign,
    RNNprop,
    Scheduled,
)
from l2l_scale.optimizers.backend import accelerate

CPU = torch.device("cpu")
GROUPS = {"conv": ["conv"], "linear": ["linear", "bias"], "rest": ["*"]}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.PReLU(), nn.Flatten(), nn.Linear(3 * 36, 4)),
        *(nn.LayerNorm(4), nn.Linear(4, 2)),
    )


def grouped(groups=GROUPS):
    torch.manual_seed(1)
    features = {"conv": LogSign, "linear": RNNprop}
    rules = {
        name: CoordinatewiseLSTM(4, 1, features.get(name, RNNprop)(), output_scale=1.0) for name in groups
    }
    return Grouped(rules, groups)


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 1, 8, 8, generator=generator)
    return model(x).square().mean()


def train(model, optimizer, steps=range(4)):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def by_hand(model, rule, spec, backend="eager", steps=range(4)):
    """The rollout of the rule on the model's coordinates, one slot."""
    bound = accelerate(rule.for_spec(spec), backend, CPU, torch.float32).rule
    theta = nn.utils.parameters_to_vector(model.parameters()).detach().unsqueeze(0)
    state = bound.init_state(theta)
    for step in steps:
        nn.utils.vector_to_parameters(theta.squeeze(0), model.parameters())
        grads = torch.autograd.grad(loss_of(model, step), list(model.parameters()))
        with torch.no_grad():
            update, state = bound(torch.cat([grad.flatten() for grad in grads]).unsqueeze(0), theta, state)
            theta = theta + update
    nn.utils.vector_to_parameters(theta.squeeze(0), model.parameters())
    return [param.detach().clone() for param in model.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def kinds(params):
    return [
        segment.group for segment in spec_of(LearnedOptimizer(params, grouped()).param_groups[0]).segments
    ]


EXACT = ["conv", "bias", "norm", "norm", "bias", "linear", "bias", "norm", "norm", "linear", "bias"]


def test_kinds_are_said_or_found_by_name_or_by_dimensions():
    model = network()
    assert kinds(parameter_groups(model)) == EXACT
    by_name = EXACT.copy()
    by_name[4] = "norm"  # PReLU's weight looks like one
    assert kinds(model.named_parameters()) == by_name
    by_size = [kind.replace("norm", "bias") for kind in EXACT]
    assert kinds(model.parameters()) == by_size
    assert kinds([nn.Parameter(torch.zeros(shape)) for shape in ((), (2, 2), (1, 1, 1))]) == [
        *("bias", "linear", "conv")
    ]


def test_groups_of_a_model_are_as_in_meta_training():
    model = network()
    model[0].bias.requires_grad_(False)
    (group,) = parameter_groups(model)
    every = FlatSpec.of_module(network()).segments
    optimizer = LearnedOptimizer([group], grouped())
    assert spec_of(optimizer.param_groups[0]).segments == every[:1] + every[2:]


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_steps_are_those_of_a_rollout(backend):
    rule, model = grouped(), network()
    expected = by_hand(network(), rule, FlatSpec.of_module(model), backend)
    trained = train(model, LearnedOptimizer(parameter_groups(model), rule, backend=backend))
    assert equal(trained, expected)
    assert not equal(trained, list(network().parameters()))


def test_names_reach_patterns():
    groups = {"first": ["0.*"], "others": ["*"]}
    model = network()
    optimizer = LearnedOptimizer(model.named_parameters(), grouped(groups), backend="eager")
    expected = by_hand(network(), grouped(groups), FlatSpec.of_module(model))
    assert equal(train(model, optimizer), expected)


def test_each_kind_has_its_own_rule():
    rates = {"conv": 0.0, "linear": 0.5, "rest": 0.25}
    rule = Grouped({name: SGD(rate) for name, rate in rates.items()}, {**GROUPS, "linear": ["linear"]})
    model = network()
    before = [param.detach().clone() for param in model.parameters()]
    trained = train(model, LearnedOptimizer(parameter_groups(model), rule), range(1))
    for kind, old, new, param in zip(EXACT, before, trained, model.parameters(), strict=True):
        assert torch.equal(new, old - rates.get(kind, 0.25) * param.grad)


def test_state_dict_round_trip_goes_on_to_the_bit():
    model = network()
    optimizer = LearnedOptimizer(parameter_groups(model), grouped())
    train(model, optimizer)
    other = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = LearnedOptimizer(parameter_groups(other), grouped())
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.param_groups[0]["kinds"] == EXACT
    assert equal(train(model, optimizer), train(other, loaded))
    again, copied = copy.deepcopy((model, optimizer))
    assert equal(train(model, optimizer), train(again, copied))


def test_kinds_of_a_state_dict_count():
    """What the saved state belongs to is not guessed anew, and not overruled."""
    model, other = network(), network()
    optimizer = LearnedOptimizer(model.parameters(), grouped())
    train(model, optimizer)
    train(other, LearnedOptimizer(other.parameters(), grouped()))
    loaded = LearnedOptimizer(parameter_groups(other), grouped())
    loaded.load_state_dict(optimizer.state_dict())
    assert equal(train(model, optimizer), train(other, loaded))


def test_added_groups_are_problems_of_their_own():
    model, other = network(), network()
    rule = grouped()
    optimizer = LearnedOptimizer(model[:4].parameters(), rule)
    optimizer.add_param_group({"params": list(model[4:].parameters()), "kinds": EXACT[5:]})
    train(model, optimizer)
    two = [
        LearnedOptimizer(other[:4].parameters(), rule),
        LearnedOptimizer([{"params": list(other[4:].parameters()), "kinds": EXACT[5:]}], rule),
    ]
    for step in range(4):
        other.zero_grad()
        loss_of(other, step).backward()
        for one in two:
            one.step()
    assert equal(list(model.parameters()), list(other.parameters()))


def test_groups_that_do_not_fit_are_refused_and_leave_the_optimizer_as_it_was():
    model = network()
    rule = grouped({"conv": ["conv"], "linear": ["linear"]})
    with pytest.raises(ValueError, match=r"none fits '1' of kind 'bias'; .* pattern '\*'"):
        LearnedOptimizer(model.parameters(), rule)
    optimizer = LearnedOptimizer([model[0].weight], rule)
    with pytest.raises(ValueError, match=r"kinds \(\['conv'\]\) must be as many as the 2 parameters"):
        optimizer.add_param_group({"params": list(model[4].parameters()), "kinds": ["conv"]})
    assert len(optimizer.param_groups) == 1


def test_from_a_file_and_inside_a_schedule(tmp_path):
    rule = Scheduled(grouped(), ExponentialSchedule(0.9))
    path = save_rule(rule, tmp_path / "rule.safetensors")
    assert isinstance(load_rule(path), Scheduled)
    model, other = network(), network()
    one, two = (
        LearnedOptimizer(parameter_groups(model), path),
        LearnedOptimizer(parameter_groups(other), rule),
    )
    assert equal(train(model, one), train(other, two))


def test_rules_without_groups_are_left_alone():
    model = network()
    optimizer = LearnedOptimizer(model.parameters(), CoordinatewiseLSTM(4, 1))
    assert "kinds" not in optimizer.param_groups[0]
    other = network()
    with_kinds = LearnedOptimizer(parameter_groups(other), CoordinatewiseLSTM(4, 1))
    with_kinds.rule.load_state_dict(optimizer.rule.state_dict())
    assert equal(train(model, optimizer), train(other, with_kinds))
