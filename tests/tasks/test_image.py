"""ImageClassifier: equal to nn.Sequential, batched equal to mapped, layout, start points, settings."""

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import shared_data
from jsonargparse import auto_cli
from torch import nn

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.sampling import Schedule, WindowSampler
from l2l_scale.tasks import ImageClassifier, TaskFamily
from l2l_scale.tasks.datasets import load_images
from l2l_scale.tasks.resident import resident_images

CPU = torch.device("cpu")
MODULES = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}


def rng(counter=0):
    return stream(0, Split.TRAIN, Channel.DATA, counter)


def batch(family, slots=3):
    theta = np.stack([family.sample_init(rng(slot), {}) for slot in range(slots)])
    index = np.stack([family.sample_data(rng(slot), {})["index"] for slot in range(slots)])
    return torch.tensor(theta), {"index": torch.tensor(index)}


def sequential(family, theta):
    """The same network as PyTorch's users would write it."""
    modules = []
    for inputs, outputs in family.layers:
        modules += [nn.Linear(inputs, outputs, dtype=torch.float64), MODULES[family.activation]()]
    network = nn.Sequential(*modules[:-1])
    nn.utils.vector_to_parameters(theta, network.parameters())
    return network


@pytest.mark.parametrize("hidden", [(), (20,), (7, 5)])
@pytest.mark.parametrize("activation", list(MODULES))
def test_losses_and_gradients_equal_a_sequential_network(hidden, activation):
    family = ImageClassifier(hidden=hidden, activation=activation, batch_size=32, initialisation="torch")
    theta, data = batch(family)
    images = load_images("digits", Split.TRAIN)
    theta.requires_grad_()
    losses = family.losses(theta, {}, data)
    (grad,) = torch.autograd.grad(losses.sum(), theta)
    for slot, index in enumerate(data["index"].numpy()):
        network = sequential(family, theta[slot].detach())
        pixels = torch.tensor(images.pixels[index] / 16).flatten(1)
        loss = nn.functional.cross_entropy(network(pixels), torch.tensor(images.labels[index]))
        loss.backward()
        expected = nn.utils.parameters_to_vector(param.grad for param in network.parameters())
        torch.testing.assert_close(losses[slot], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad[slot], expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("hidden", [(), (20,), (7, 5)])
def test_batched_losses_equal_mapped_losses(hidden):
    family = ImageClassifier(hidden=hidden, batch_size=16, initialisation="torch")
    theta, data = batch(family)
    mapped = TaskFamily.losses(family, theta, {}, data)
    torch.testing.assert_close(family.losses(theta, {}, data), mapped, rtol=1e-12, atol=0)


@pytest.mark.parametrize("hidden", [(), (20,), (7, 5)])
@pytest.mark.parametrize("activation", list(MODULES))
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_by_formula_equal_those_of_mapped_losses(hidden, activation, create_graph):
    family = ImageClassifier(hidden=hidden, activation=activation, batch_size=16, initialisation="torch")
    theta, data = batch(family)
    theta.requires_grad_(create_graph)
    point = theta.detach().requires_grad_()
    mapped = TaskFamily.losses(family, point, {}, data)
    (expected,) = torch.autograd.grad(mapped.sum(), point, create_graph=True)
    losses, grads = family.losses_and_gradients(theta, {}, data, create_graph)
    torch.testing.assert_close(losses, mapped, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-13)
    assert losses.requires_grad == grads.requires_grad == create_graph
    if create_graph:
        seeds = (
            torch.linspace(-1, 1, theta.numel()).double().view_as(theta),
            torch.tensor([1.0, -2, 3]).double(),
        )
        for (one, other), seed in zip(((grads, expected), (losses, mapped)), seeds, strict=True):
            got, want = (
                torch.autograd.grad(*args, seed, retain_graph=True) for args in ((one, theta), (other, point))
            )
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_right():
    family = ImageClassifier(hidden=(3,), batch_size=2, initialisation="torch")
    theta, data = batch(family, slots=1)
    last = theta[:, -10:].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda free: family.losses(torch.cat([theta[:, :-10], free], -1), {}, data), last
    )


def test_coordinates_lie_as_in_linear_layers():
    spec = ImageClassifier(hidden=(20, 5)).spec
    assert [tuple(segment) for segment in spec.segments] == [
        ("layers.0.weight", (20, 64), "linear"),
        ("layers.0.bias", (20,), "bias"),
        ("layers.1.weight", (5, 20), "linear"),
        ("layers.1.bias", (5,), "bias"),
        ("layers.2.weight", (10, 5), "linear"),
        ("layers.2.bias", (10,), "bias"),
    ]


def test_the_papers_network_on_mnist_has_15910_coordinates():
    assert ImageClassifier(dataset=shared_data("mnist")).spec.size == 784 * 20 + 20 + 20 * 10 + 10 == 15_910


def test_minibatches_are_uniform_over_the_split():
    family = ImageClassifier(batch_size=100_000, split=Split.VALID)
    index = family.sample_data(rng(), {})["index"]
    assert index.dtype == np.int64
    counts = np.bincount(index, minlength=143)
    assert len(counts) == 143
    assert abs(counts - counts.mean()).max() < 5 * math.sqrt(counts.mean())


def test_window_holds_a_minibatch_for_every_slot_and_inner_step():
    family = ImageClassifier(batch_size=8)
    window = WindowSampler(family, Schedule(horizon=6, window=3), seed=0, split=Split.TRAIN)(0, range(2))
    assert window.data["index"].shape == (3 + 1, 2, 8)
    assert len(np.unique(window.data["index"].reshape(8, 8), axis=0)) == 8
    assert window.theta0.shape == (2, family.spec.size)


def test_splits_look_at_different_images():
    family = ImageClassifier(batch_size=4, initialisation="torch")
    held_out = family.for_split(Split.TUNE)
    assert (held_out.split, held_out.hidden) == (Split.TUNE, family.hidden)
    theta, data = batch(held_out)
    assert not torch.equal(held_out.losses(theta, {}, data), family.losses(theta, {}, data))


def test_images_become_resident_once():
    family = ImageClassifier(split=Split.TUNE)
    family.prepare(CPU)
    before = resident_images.cache_info().misses
    theta, data = batch(family)
    family.losses(theta, {}, data)
    family.losses_and_gradients(theta, {}, data, create_graph=False)
    assert resident_images.cache_info().misses == before
    pixels, labels = resident_images("digits", Split.TUNE, CPU)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert labels.dtype == torch.int64


def layer_blocks(family):
    flat = torch.tensor(family.sample_init(rng(), {}))
    return {name: value.numpy() for name, value in family.spec.unflatten(flat).items()}


def test_normal_start_is_one_gaussian():
    theta0 = ImageClassifier(hidden=(200,), theta0_scale=0.3).sample_init(rng(), {})
    assert abs(theta0.std() - 0.3) < 3 * 0.3 / math.sqrt(2 * len(theta0))


def test_torch_start_is_that_of_linear_layers():
    blocks = layer_blocks(ImageClassifier(hidden=(400,), initialisation="torch"))
    torch.manual_seed(0)
    linear = nn.Linear(64, 400)
    for name, truth in (("weight", linear.weight), ("bias", linear.bias)):
        values = blocks[f"layers.0.{name}"]
        assert abs(values).max() <= 1 / 8
        assert abs(values.std() / truth.std().item() - 1) < 0.1
    assert abs(blocks["layers.1.weight"]).max() <= 1 / 20


@pytest.mark.parametrize(
    ("initialisation", "std"), [("xavier", math.sqrt(2 / (64 + 400))), ("he", math.sqrt(2 / 64))]
)
def test_scaled_starts_have_their_standard_deviation_and_no_bias(initialisation, std):
    blocks = layer_blocks(ImageClassifier(hidden=(400,), initialisation=initialisation))
    assert abs(blocks["layers.0.weight"].std() / std - 1) < 3 / math.sqrt(2 * 64 * 400)
    assert not blocks["layers.0.bias"].any()
    assert not blocks["layers.1.bias"].any()


def test_family_is_a_key_and_travels_between_processes():
    family = ImageClassifier(hidden=[20, 20])
    assert family.hidden == (20, 20)
    assert hash(family) == hash(ImageClassifier(hidden=(20, 20)))
    _ = family.spec
    assert pickle.loads(pickle.dumps(family)) == family


def test_jsonargparse_builds_it_from_class_path_and_init_args():
    def job(family: TaskFamily) -> TaskFamily:
        return family

    config = {
        "class_path": "l2l_scale.tasks.ImageClassifier",
        "init_args": {"dataset": "digits", "hidden": [20], "activation": "relu", "split": "TUNE"},
    }
    family = auto_cli(job, args=[f"--family={json.dumps(config)}"], as_positional=False)
    assert family == ImageClassifier(hidden=(20,), activation="relu", split=Split.TUNE)


@pytest.mark.parametrize(
    ("argument", "value", "name"),
    [
        ("hidden", (20, 0), r"hidden\[1\] \(0\)"),
        ("batch_size", 0, r"batch_size \(0\)"),
        ("theta0_scale", -1.0, r"theta0_scale \(-1.0\)"),
        ("theta0_scale", float("nan"), r"theta0_scale \(nan\)"),
        ("activation", "swish", r"activation \('swish'\)"),
        ("initialisation", "zeros", r"initialisation \('zeros'\)"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(argument, value, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        ImageClassifier(**{argument: value})


# ---- accuracy ----


def test_accuracy_counts_all_images_of_the_split():
    family = ImageClassifier(split=Split.TEST)
    theta = torch.from_numpy(family.sample_init(np.random.default_rng(0), {})).float()
    theta = torch.stack([theta, 300 * theta])
    images = load_images("digits", Split.TEST)
    x = torch.from_numpy(images.pixels).flatten(1).float() / 16
    expected = []
    for flat in theta:
        params = family.spec.unflatten(flat)
        hidden = (x @ params["layers.0.weight"].T + params["layers.0.bias"]).sigmoid()
        out = hidden @ params["layers.1.weight"].T + params["layers.1.bias"]
        expected.append((out.argmax(1).numpy() == images.labels).mean())
    for source in ("resident", "streamed"):
        found = replace(family, source=source).scores(theta, {})["accuracy"]
        np.testing.assert_allclose(found, expected, atol=1e-3)
