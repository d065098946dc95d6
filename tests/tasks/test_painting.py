"""Painted pictures: form, purity, variety."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.tasks.painting import STYLES, scene

PAINTERS = {"scene": scene, **STYLES}


def rng(counter: int) -> np.random.Generator:
    return stream(0, Split.TRAIN, Channel.TASK, counter)


@pytest.mark.parametrize("paint", PAINTERS.values(), ids=PAINTERS)
@pytest.mark.parametrize("size", [9, 33])
def test_pictures_are_bytes_a_function_of_the_generator_and_never_the_same(
    paint: Callable[[np.random.Generator, int], np.ndarray], size: int
) -> None:
    pictures = [paint(rng(i), size) for i in range(10)]
    assert all(picture.shape == (size, size, 3) and picture.dtype == np.uint8 for picture in pictures)
    assert np.array_equal(paint(rng(0), size), pictures[0])
    assert len({picture.tobytes() for picture in pictures}) == 10


@pytest.mark.parametrize("paint", PAINTERS.values(), ids=PAINTERS)
def test_pictures_are_not_plain(paint: Callable[[np.random.Generator, int], np.ndarray]) -> None:
    deviations = [paint(rng(i), 64).std((0, 1)).max() for i in range(20)]
    assert min(deviations) > 5
    assert np.median(deviations) > 25


def test_a_scene_is_the_same_at_every_size() -> None:
    small, large = (scene(rng(3), size).astype(float) for size in (32, 128))
    reduced = large.reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert abs(small - reduced).mean() < 8  # the two differ at edges only
