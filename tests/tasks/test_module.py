"""ModuleTask: the documented example, equality with plain PyTorch, constants, impure modules."""

import inspect
import textwrap
from functools import partial
from itertools import takewhile

import numpy as np
import pytest
import torch
from torch import nn

from l2l_scale.estimators import TruncatedBPTT
from l2l_scale.optimizers import CoordinatewiseLSTM
from l2l_scale.rng import Channel, Split, stream
from l2l_scale.sampling import Schedule, WindowSampler
from l2l_scale.tasks import ModuleTask
from l2l_scale.tree import tree_detach
from l2l_scale.unroll import begin


def example():
    """The lines of the example in the docstring of ModuleTask."""
    after = inspect.getdoc(ModuleTask).split("::\n\n", 1)[1].splitlines()
    block = takewhile(lambda line: not line[:1].strip(), after)  # up to the first line not indented
    return textwrap.dedent("\n".join(block)).strip()


def sine_family():
    names = {}
    exec(example(), names)
    return names["family"]


def rng(counter=0):
    return stream(0, Split.TRAIN, Channel.TASK, counter)


def ones_objective(model, task, data):
    return model(torch.ones(4, 3, dtype=torch.float64)).square().mean()


def family_of(build, objective=ones_objective):
    return ModuleTask(build=build, objective=objective)


def thetas(family, slots=2):
    return torch.tensor(np.stack([family.sample_init(rng(slot), {}) for slot in range(slots)])).double()


def test_documented_example_takes_under_twenty_lines():
    assert len([line for line in example().splitlines() if line.strip()]) < 20


def test_documented_example_meta_trains():
    family = sine_family()
    sampler = WindowSampler(family, Schedule(horizon=10, window=5), seed=0, split=Split.TRAIN)
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size=4, layers=1)
    optimizer = torch.optim.Adam(rule.parameters(), lr=1e-2)
    estimator = TruncatedBPTT()
    carry, values = None, []
    for index in range(20):
        batch = sampler(index, range(4)).to_batch()
        estimate = estimator(rule, family, begin(rule, batch, carry), batch)
        optimizer.zero_grad()
        estimate.surrogate.backward()
        optimizer.step()
        values.append(estimate.surrogate.item())
        carry = tree_detach(estimate.rollout.carry)
    assert np.mean(values[-4:]) < 0.8 * np.mean(values[:4])


def test_losses_and_gradients_equal_the_module_itself():
    family = sine_family()
    task = family.sample_task(rng())
    data = family.sample_data(rng(1), task)
    theta = thetas(family).requires_grad_()
    tensors = {name: torch.tensor(value).expand(2, *value.shape) for name, value in data.items()}
    losses = family.losses(theta, {"phase": torch.tensor(task["phase"]).expand(2, 1)}, tensors)
    (grad,) = torch.autograd.grad(losses.sum(), theta)
    for slot in range(2):
        module = family.build().double()
        nn.utils.vector_to_parameters(theta[slot].detach(), module.parameters())
        loss = nn.functional.mse_loss(module(torch.tensor(data["x"])), torch.tensor(data["y"]))
        loss.backward()
        expected = nn.utils.parameters_to_vector(param.grad for param in module.parameters())
        torch.testing.assert_close(losses[slot], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad[slot], expected, rtol=1e-11, atol=1e-15)


def test_start_is_what_build_makes_under_a_seed_of_the_stream():
    family = sine_family()
    first, again, other = (family.sample_init(rng(counter), {}) for counter in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    torch.manual_seed(int(rng().integers(1 << 63)))
    assert np.array_equal(first, nn.utils.parameters_to_vector(family.build().parameters()).detach().numpy())


def test_sampling_leaves_torchs_generator_as_it_was():
    before = torch.random.get_rng_state()
    sine_family().sample_init(rng(), {})
    assert torch.equal(torch.random.get_rng_state(), before)


def test_coordinates_are_grouped_by_kind():
    family = family_of(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False))
    )
    assert {
        name: sum(part.stop - part.start for part in parts) for name, parts in family.spec.groups.items()
    } == {
        "conv": 18,
        "bias": 2,
        "norm": 4,
    }


def test_data_exists_only_if_it_is_drawn():
    assert sine_family().has_data
    deterministic = family_of(lambda: nn.Linear(3, 1))
    assert not deterministic.has_data
    assert deterministic.sample_task(rng()) == deterministic.sample_data(rng(), {}) == {}


def test_family_is_a_key():
    def build():
        return nn.Linear(3, 1)

    assert hash(family_of(build)) == hash(family_of(build))
    assert family_of(build) == family_of(build) != family_of(lambda: nn.Linear(3, 1))


def linear():
    return nn.Linear(3, 1)


def test_a_family_prints_names_and_no_addresses():
    """A checkpoint holds the text: with addresses no run of such a family could be resumed."""
    family = ModuleTask(build=linear, objective=partial(ones_objective), draw_task=sine_family().draw_task)
    names = f"build={__name__}.linear, objective=functools.partial"
    assert repr(family).startswith(f"ModuleTask({names}, draw_task=")
    assert "draw_data" not in repr(family)
    assert "0x" not in repr(family)


def test_frozen_parameters_and_buffers_are_constants():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.frozen = nn.Linear(3, 1), nn.Linear(1, 1).requires_grad_(False)
            self.register_buffer("shift", torch.tensor([5.0]))

        def forward(self, x):
            return self.frozen(self.linear(x)) + self.shift

    family = family_of(Shifted)
    assert [segment.name for segment in family.spec.segments] == ["linear.weight", "linear.bias"]
    theta = thetas(family)
    frozen = family.module.frozen.double()
    expected = frozen(theta.sum(1, keepdim=True)) + 5  # the input is all ones
    torch.testing.assert_close(family.losses(theta, {}, {}), expected.square().squeeze(1), rtol=1e-6, atol=0)


def test_shared_parameters_are_one_set_of_coordinates():
    def build():
        network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        network[1].weight = network[0].weight
        return network

    family = family_of(build)
    assert family.spec.size == 9 + 3 + 3
    theta = thetas(family)
    weight, first, second = theta[0, :9].view(3, 3), theta[0, 9:12], theta[0, 12:]
    out = weight @ (weight @ torch.ones(3, dtype=torch.float64) + first) + second
    torch.testing.assert_close(family.losses(theta, {}, {})[0], out.square().mean(), rtol=1e-12, atol=0)


def test_batch_norm_without_running_statistics_works():
    def build():
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False))

    def objective(model, task, data):
        return model(data["x"]).square().mean()

    family = ModuleTask(
        build=build, objective=objective, draw_data=lambda rng, task: {"x": rng.standard_normal((8, 3))}
    )
    x = torch.tensor(np.stack([family.sample_data(rng(slot), {})["x"] for slot in range(2)]))
    torch.testing.assert_close(
        family.losses(thetas(family), {}, {"x": x}), torch.ones(2, dtype=torch.float64), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
            r"'1' \(BatchNorm1d\).*track_running_stats=False",
        ),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)), r"'1' \(Dropout\).*random.*p=0"),
        (lambda: nn.ReLU(), "at least one parameter"),
        (lambda: 3, "build must return an nn.Module, but it returned 3"),
    ],
)
def test_modules_that_cannot_be_a_pure_loss_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        family_of(build)


def test_switched_off_dropout_is_allowed():
    assert family_of(lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)).eval()).spec.size == 8


def test_objective_must_return_a_scalar():
    family = family_of(
        lambda: nn.Linear(3, 1).double(),
        lambda model, task, data: model(torch.ones(4, 3, dtype=torch.float64)),
    )
    with pytest.raises(ValueError, match=r"objective must return a scalar, but its shape is \(4, 1\)"):
        family.losses(thetas(family), {}, {})
