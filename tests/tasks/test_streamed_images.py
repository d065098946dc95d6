"""Streamed images: equal to resident ones bit for bit, kept nowhere, augmented in training only."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import shared_data
from jsonargparse import auto_cli

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.sampling import Schedule, WindowSampler
from l2l_scale.tasks import Augmentation, CompiledFamily, ImageClassifier, TaskFamily, datasets
from l2l_scale.tasks.datasets import decode_images, load_images
from l2l_scale.tasks.resident import resident_images

MOVED = Augmentation(padding=2, flip=True)


def rng(counter=0):
    return stream(0, Split.TRAIN, Channel.DATA, counter)


def streamed(**settings):
    return ImageClassifier(source="streamed", batch_size=8, initialisation="torch", **settings)


def first_step(family, dtype=torch.float32):
    """θ and the first minibatch of a window."""
    sampler = WindowSampler(family, Schedule(horizon=2, window=2), seed=0, split=family.split)
    batch = sampler(0, range(3)).to_batch(dtype)
    return batch.theta0, {name: leaf[0] for name, leaf in batch.data.items()}


@pytest.mark.parametrize("dataset", ["digits", "mnist"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_equal_those_of_resident_images_bit_for_bit(dataset, dtype):
    place = dataset if dataset == "digits" else shared_data(dataset)
    family = streamed(dataset=place, split=Split.VALID)
    results = []
    for one in (family, replace(family, source="resident")):
        theta, data = first_step(one, dtype)
        mapped = TaskFamily.losses(one, theta, {}, data)
        results.append(
            (*one.losses_and_gradients(theta, {}, data, False), one.losses(theta, {}, data), mapped)
        )
    assert all(map(torch.equal, *results))
    assert results[0][1].abs().max() > 0


def test_compiled_losses_are_those_of_the_family():
    family = streamed()
    theta, data = first_step(family, torch.float64)
    compiled = CompiledFamily(family).losses_and_gradients(theta, {}, data, False)
    for got, want in zip(compiled, family.losses_and_gradients(theta, {}, data, False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_pixels_and_labels_are_those_of_the_drawn_indices():
    data = streamed().sample_data(rng(), {})
    index = replace(streamed(), source="resident").sample_data(rng(), {})["index"]
    images = load_images("digits", Split.TRAIN)
    assert np.array_equal(data["pixels"], images.pixels[index].reshape(8, 64))
    assert np.array_equal(data["label"], images.labels[index])
    assert (data["pixels"].dtype, data["label"].dtype) == (np.uint8, np.int64)


def test_pixels_travel_as_bytes():
    theta, data = first_step(streamed(), torch.float64)
    assert (data["pixels"].dtype, data["pixels"].shape) == (torch.uint8, (3, 8, 64))
    assert theta.dtype == torch.float64


def test_nothing_is_put_on_the_device_or_decoded_as_a_whole():
    def whole_splits():
        return resident_images.cache_info().misses, datasets._load.cache_info().misses

    family = streamed(split=Split.TUNE)
    before = whole_splits()
    family.prepare(torch.device("cpu"))
    theta, data = first_step(family)
    family.losses_and_gradients(theta, {}, data, create_graph=False)
    assert whole_splits() == before


def test_augmentation_is_drawn_after_the_indices_and_leaves_labels_alone():
    augmented = streamed(augmentation=MOVED).sample_data(rng(), {})
    plain = streamed().sample_data(rng(), {})
    generator = rng()
    index = generator.integers(0, 1152, 8)
    expected = MOVED(generator, decode_images("digits", Split.TRAIN, index).pixels)
    assert np.array_equal(augmented["pixels"], expected.reshape(8, 64))
    assert not np.array_equal(augmented["pixels"], plain["pixels"])
    assert np.array_equal(augmented["label"], plain["label"])


@pytest.mark.parametrize("split", [split for split in Split if split is not Split.TRAIN])
def test_only_training_images_are_augmented(split):
    family = streamed(augmentation=MOVED).for_split(split)
    assert np.array_equal(
        family.sample_data(rng(), {})["pixels"],
        streamed(split=split).sample_data(rng(), {})["pixels"],
    )
    assert family.for_split(Split.TRAIN) == streamed(augmentation=MOVED)


def test_family_is_a_key_and_travels_between_processes():
    family = streamed(augmentation=MOVED)
    family.sample_data(rng(), {})
    again = pickle.loads(pickle.dumps(family))
    assert again == family
    assert hash(again) == hash(family)
    assert len(pickle.dumps(family)) < 10_000  # no images


def test_jsonargparse_builds_it_from_class_path_and_init_args():
    def job(family: TaskFamily) -> TaskFamily:
        return family

    settings = {"source": "streamed", "augmentation": {"padding": 2, "flip": True}}
    config = {"class_path": "l2l_scale.tasks.ImageClassifier", "init_args": settings}
    family = auto_cli(job, args=[f"--family={json.dumps(config)}"], as_positional=False)
    assert family == ImageClassifier(source="streamed", augmentation=MOVED)


def test_bad_settings_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"source \('disk'\) must be 'resident' or 'streamed'"):
        ImageClassifier(source="disk")
    with pytest.raises(
        ValueError, match=r"augmentation \(.*padding=2.*\) must be None .*source to 'streamed'"
    ):
        ImageClassifier(augmentation=MOVED)


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("source", ["resident", "streamed"])
def test_some_labels_only_become_the_classes_in_their_order(split, source):
    family = ImageClassifier(labels=(7, 2, 5), split=split, source=source, batch_size=500)
    every = load_images("digits", split)
    chosen = np.isin(every.labels, (7, 2, 5))
    expected = np.select([every.labels == 7, every.labels == 2], [0, 1], 2)[chosen]
    assert family.images == (chosen.sum(), (1, 8, 8), 3, 16)
    assert family.spec.segments[-1].shape == (3,)
    data = {name: torch.tensor(leaf) for name, leaf in family.sample_data(rng(), {}).items()}
    pixels, labels = family.minibatch(data, torch.float32)
    index = rng().integers(0, chosen.sum(), 500)
    assert torch.equal(labels, torch.tensor(expected[index]))
    assert torch.equal(pixels, torch.tensor(every.pixels[chosen][index]).flatten(1).float() / 16)
    assert family.for_split(Split.TUNE).labels == (7, 2, 5)


def test_labels_that_are_none_are_refused():
    for labels, words in (((3,), r"\[3\]\) must be two or more"), ((1, 1), "different"), ((-1, 2), "whole")):
        with pytest.raises(ValueError, match=rf"labels.*{words}"):
            ImageClassifier(labels=labels)
    with pytest.raises(ValueError, match=r"labels \(\[2, 10\]\) must be labels of dataset digits, 0 … 9"):
        _ = ImageClassifier(labels=(2, 10)).spec
