"""Augmentation: every crop and flip is one of those allowed, all alike often, from the stream alone."""

import numpy as np
import pytest

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.tasks import Augmentation


def rng(counter=0):
    return stream(0, Split.TRAIN, Channel.DATA, counter)


def images(count=500, channels=3, height=5, width=4):
    """Pixels that are all different in an image, and never 0, so that padding shows."""
    one = np.arange(1, 1 + channels * height * width, dtype=np.uint8).reshape(1, channels, height, width)
    return np.repeat(one, count, axis=0)


def crops(image, padding):
    """Every crop of one image (C, H, W), by its place."""
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    height, width = image.shape[1:]
    places = [(top, left) for top in range(2 * padding + 1) for left in range(2 * padding + 1)]
    return {padded[:, top : top + height, left : left + width].tobytes(): (top, left) for top, left in places}


def test_nothing_is_changed_or_drawn_by_default():
    generator = rng()
    pixels = images()
    assert np.array_equal(Augmentation()(generator, pixels), pixels)
    assert generator.random() == rng().random()


def test_crops_are_all_those_of_the_padded_image_alike_often():
    pixels, places = images(9000), crops(images()[0], 1)
    assert len(places) == 9
    found = [places[image.tobytes()] for image in Augmentation(padding=1)(rng(), pixels)]
    counts = np.array([found.count(place) for place in places.values()])
    assert abs(counts - 1000).max() < 4 * np.sqrt(1000 * 8 / 9)  # four standard errors


def test_half_the_images_are_mirrored_left_for_right():
    pixels = images(1000)
    flipped = Augmentation(flip=True)(rng(), pixels)
    same = (flipped == pixels).all((1, 2, 3))
    mirrored = (flipped == pixels[..., ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum() - 500) < 4 * np.sqrt(250)


def test_crops_are_drawn_before_flips_and_images_are_left_alone():
    pixels = images(50)
    before, generator = pixels.copy(), rng()
    cropped = Augmentation(padding=2)(generator, pixels)
    expected = Augmentation(flip=True)(generator, cropped)
    assert np.array_equal(Augmentation(padding=2, flip=True)(rng(), pixels), expected)
    assert np.array_equal(pixels, before)
    assert (expected.shape, expected.dtype) == (pixels.shape, np.uint8)
    assert not np.array_equal(Augmentation(padding=2, flip=True)(rng(1), pixels), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding": -1}, r"padding \(-1\) must be a whole number >= 0"),
        ({"padding": 1.5}, r"padding \(1.5\) must be a whole number"),
        ({"flip": 1}, r"flip \(1\) must be True or False"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)
