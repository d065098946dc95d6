"""ConvClassifier: equal to torch's own layers, slot by slot; second derivatives; layout; settings."""

import pickle

import numpy as np
import pytest
import torch
from conftest import shared_data
from torch import nn

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.tasks import ConvClassifier, MixedPrecision, TaskFamily
from l2l_scale.tasks.datasets import load_images

MODULES = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}
SMALL = {"channels": (3, 5), "kernel": 3, "hidden": (6,), "batch_size": 12, "initialisation": "torch"}


def rng(counter=0):
    return stream(0, Split.TRAIN, Channel.DATA, counter)


def batch(family, slots=3):
    """Start points with scales and shifts of their own, and minibatches."""
    theta = np.stack([family.sample_init(rng(slot), {}) for slot in range(slots)])
    theta += 0.05 * rng(slots).standard_normal(theta.shape)
    index = np.stack([family.sample_data(rng(slot), {})["index"] for slot in range(slots)])
    return torch.tensor(theta), {"index": torch.tensor(index)}


def network(family, theta):
    """The same network as PyTorch's users would write it."""
    (inputs, height, width), layers = family.images.shape, []
    for channels in family.channels:
        conv = nn.Conv2d(inputs, channels, family.kernel, padding="same", bias=False)
        norm = nn.BatchNorm2d(channels, track_running_stats=False)
        layers += [conv, norm, MODULES[family.activation](), nn.MaxPool2d(2)]
        inputs, height, width = channels, height // 2, width // 2
    layers.append(nn.Flatten())
    units = inputs * height * width
    for hidden in family.hidden:
        layers += [nn.Linear(units, hidden), MODULES[family.activation]()]
        units = hidden
    module = nn.Sequential(*layers, nn.Linear(units, family.images.classes)).double()
    nn.utils.vector_to_parameters(theta, module.parameters())
    return module


@pytest.mark.parametrize("activation", list(MODULES))
@pytest.mark.parametrize(
    "shape", [{}, {"channels": (4,), "hidden": ()}, SMALL], ids=["full", "flat", "small"]
)
def test_losses_and_gradients_equal_a_module_of_torchs_layers(shape, activation):
    family = ConvClassifier(
        **{**shape, "activation": activation, "initialisation": "torch", "batch_size": 12}
    )
    theta, data = batch(family)
    losses, grads = family.losses_and_gradients(theta, {}, data, create_graph=False)
    images = load_images("digits", Split.TRAIN)
    for slot, index in enumerate(data["index"].numpy()):
        module = network(family, theta[slot])
        pixels, labels = torch.tensor(images.pixels[index] / 16), torch.tensor(images.labels[index])
        loss = nn.functional.cross_entropy(module(pixels), labels)
        loss.backward()
        expected = nn.utils.parameters_to_vector(param.grad for param in module.parameters())
        torch.testing.assert_close(losses[slot], loss.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(grads[slot], expected, rtol=1e-10, atol=1e-10)


def test_slots_are_problems_of_their_own_and_equal_to_mapped_ones():
    family = ConvClassifier(**SMALL)
    theta, data = batch(family)
    losses = family.losses(theta, {}, data)
    torch.testing.assert_close(TaskFamily.losses(family, theta, {}, data), losses, rtol=1e-12, atol=0)
    alone = family.losses(theta[1:2], {}, {"index": data["index"][1:2]})
    assert torch.equal(alone, losses[1:2])


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_second_derivatives_are_right(activation):
    family = ConvClassifier(**{**SMALL, "channels": (2,), "hidden": (3,)}, activation=activation)
    theta, data = batch(family, slots=1)
    free = torch.randperm(theta.shape[1], generator=torch.Generator().manual_seed(0))[:12]

    def losses(values):
        return family.losses(theta.index_copy(1, free, values), {}, data)

    assert torch.autograd.gradgradcheck(losses, theta[:, free].clone().requires_grad_())


def test_second_derivatives_reach_every_parameter():
    family = ConvClassifier(**SMALL)
    theta, data = batch(family)
    _, grads = family.losses_and_gradients(theta.requires_grad_(), {}, data, create_graph=True)
    (second,) = torch.autograd.grad(grads.square().sum(), theta)
    assert all(block.abs().max() > 0 for block in family.spec.unflatten(second).values())


def test_other_ways_to_compute_it_agree():
    family = ConvClassifier(**SMALL)
    theta, data = batch(family)
    theta = theta.float()
    losses, grads = family.losses_and_gradients(theta, {}, data, False)
    half, half_grads = MixedPrecision(family).losses_and_gradients(theta, {}, data, False)
    assert half.dtype == half_grads.dtype == torch.float32
    torch.testing.assert_close(half, losses, rtol=0.02, atol=0)
    assert (half_grads - grads).norm() < 0.1 * grads.norm()
    streamed = ConvClassifier(**SMALL, source="streamed")
    drawn = [streamed.sample_data(rng(slot), {}) for slot in range(3)]
    stacked = {name: torch.tensor(np.stack([one[name] for one in drawn])) for name in drawn[0]}
    assert torch.equal(streamed.losses(theta, {}, stacked), losses)


def test_parameters_are_named_and_grouped():
    spec = ConvClassifier().spec
    assert [tuple(segment) for segment in spec.segments] == [
        ("conv.0.weight", (16, 1, 5, 5), "conv"),
        ("norm.0.weight", (16,), "norm"),
        ("norm.0.bias", (16,), "norm"),
        ("conv.1.weight", (16, 16, 5, 5), "conv"),
        ("norm.1.weight", (16,), "norm"),
        ("norm.1.bias", (16,), "norm"),
        ("conv.2.weight", (16, 16, 5, 5), "conv"),
        ("norm.2.weight", (16,), "norm"),
        ("norm.2.bias", (16,), "norm"),
        ("linear.0.weight", (32, 16), "linear"),
        ("linear.0.bias", (32,), "bias"),
        ("linear.1.weight", (10, 32), "linear"),
        ("linear.1.bias", (10,), "bias"),
    ]


def test_the_papers_networks_on_cifar():
    family = ConvClassifier(dataset=shared_data("cifar10"))
    assert family.spec.size == 1200 + 2 * 6400 + 3 * 32 + (256 + 1) * 32 + (32 + 1) * 10 == 22_650
    assert ConvClassifier(dataset=shared_data("cifar10"), labels=(0, 1)).spec.size == 22_650 - 8 * 33


@pytest.mark.parametrize("initialisation", ["normal", "torch", "xavier", "he"])
def test_start_points(initialisation):
    family = ConvClassifier(channels=(64, 64), initialisation=initialisation)
    blocks = family.spec.unflatten(torch.tensor(family.sample_init(rng(), {})))
    assert (blocks["norm.1.weight"] == 1).all()
    assert (blocks["norm.1.bias"] == 0).all()
    std = {
        "normal": 0.01,
        "torch": (1 / 1600 / 3) ** 0.5,
        "xavier": (2 / 3200) ** 0.5,
        "he": (2 / 1600) ** 0.5,
    }
    assert abs(blocks["conv.1.weight"].std() / std[initialisation] - 1) < 0.02
    assert (blocks["linear.0.bias"].abs().max() > 0) == (initialisation in ("normal", "torch"))


def test_family_is_a_key_and_travels_between_processes():
    family = ConvClassifier(channels=[4, 4], labels=[1, 2])
    assert hash(family) == hash(ConvClassifier(channels=(4, 4), labels=(1, 2)))
    _ = family.spec
    assert pickle.loads(pickle.dumps(family)) == family


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("channels", (16, 0), r"channels\[1\] \(0\) must be a whole number"),
        ("channels", (), r"channels .* must name at least one"),
        ("kernel", 4, r"kernel \(4\) must be odd"),
        ("hidden", (0,), r"hidden\[0\] \(0\) must be a whole number"),
        ("activation", "swish", r"activation \('swish'\) must be one of"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(argument, value, words):
    with pytest.raises(ValueError, match=words):
        ConvClassifier(**{argument: value})


def test_images_that_are_too_small_are_refused():
    with pytest.raises(
        ValueError, match=r"channels \(\(4, 4, 4, 4\)\) must be at most 3 .* 8 pixels.* leave out 1"
    ):
        _ = ConvClassifier(channels=(4, 4, 4, 4)).spec
