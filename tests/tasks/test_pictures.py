"""Pictures decoded by number: those of the whole split, wherever they lie in the table on disk."""

import numpy as np
import pytest
from conftest import shared_data

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.tasks.datasets import decode_images, describe_images, load_images


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
@pytest.mark.parametrize("split", [Split.VALID, Split.TEST])
def test_images_decoded_by_number_are_those_of_the_split(name, split):
    place = name if name == "digits" else shared_data(name)
    images, size = load_images(place, split), describe_images(place, split).size
    index = np.array([size - 1, 0, 101, 100, 99, 0])  # out of order, repeated, on both sides of a chunk's end
    some = decode_images(place, split, index)
    assert np.array_equal(some.pixels, images.pixels[index])
    assert np.array_equal(some.labels, images.labels[index])
    assert (some.pixels.dtype, some.labels.dtype, some.white) == (np.uint8, np.int64, images.white)


def test_pictures_may_lie_in_files_of_their_own(tmp_path, monkeypatch):
    import datasets
    from PIL import Image

    rng = stream(0, Split.TRAIN, Channel.DATA)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    values = rng.integers(0, 256, (10, 4, 4), dtype=np.uint8)
    for number, value in enumerate(values):
        folder = tmp_path / "files" / "train" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(value).save(folder / f"{number}.png")
    place = str(tmp_path / "files")
    truth = {value.tobytes(): number % 2 for number, value in enumerate(values)}
    images = decode_images(place, Split.TRAIN, np.arange(8)[::-1])
    assert [truth[image.tobytes()] for image in images.pixels] == images.labels.tolist()
    assert np.array_equal(images.pixels[::-1], load_images(place, Split.TRAIN).pixels)
