"""Image data sets: splits, local folders, the way names are resolved, and what goes wrong."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import shared_data
from sklearn.datasets import load_digits

from l2l_scale.rng import Split
from l2l_scale.tasks import hub
from l2l_scale.tasks.datasets import describe_images, load_images, split_rows


def image_bytes(images):
    return [image.tobytes() for image in images.pixels]


@pytest.fixture
def picture_folder(tmp_path, monkeypatch):
    """Writes a folder that `datasets` reads; its caches stay in the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(columns, name="pictures", split="train"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
        return str(folder)

    return write


def pictures(count, size=4, dtype=np.uint8):
    import datasets

    rng = np.random.Generator(np.random.Philox(0))
    values = [rng.integers(0, 256, (size, size)).astype(dtype) for _ in range(count)]
    return values, [datasets.Image().encode_example(value) for value in values]


def test_digits_are_those_of_scikit_learn_each_in_one_split():
    truth = load_digits()
    parts = [load_images("digits", split) for split in Split]
    assert [len(part.labels) for part in parts] == [1152, 143, 143, 359]
    pixels = np.concatenate([part.pixels for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    rows = np.concatenate([split_rows(split, 1797, has_test=False) for split in Split])
    assert np.array_equal(np.sort(rows), np.arange(1797))
    assert np.array_equal(pixels[:, 0], truth.images[rows])
    assert np.array_equal(labels, truth.target[rows])


def test_images_are_bytes_with_a_channel_axis_and_a_white():
    images = load_images("digits", Split.VALID)
    assert (images.pixels.dtype, images.labels.dtype) == (np.uint8, np.int64)
    assert images.pixels.shape[1:] == (1, 8, 8)
    assert images.pixels.max() == images.white == 16


def test_description_agrees_with_the_images():
    for split in Split:
        info, images = describe_images("digits", split), load_images("digits", split)
        assert (info.size, *info.shape) == images.pixels.shape
        assert info.classes == 10
        assert info.white == images.white


def test_every_class_is_in_every_split_of_digits():
    for split in Split:
        share = (
            np.bincount(load_images("digits", split).labels, minlength=10)
            / describe_images("digits", split).size
        )
        assert (share > 0.04).all()


@pytest.mark.parametrize(
    ("size", "has_test", "sizes"),
    [(60_000, True, [48_000, 6_000, 6_000, 0]), (50_000, True, [40_000, 5_000, 5_000, 0])],
)
def test_splits_have_the_documented_sizes_and_cover_every_row_once(size, has_test, sizes):
    parts = [split_rows(split, size, has_test) for split in Split]
    assert [len(part) for part in parts] == sizes
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(size))


def test_splits_never_change():
    rows = np.concatenate([split_rows(split, 60_000, has_test=True) for split in Split])
    digest = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "ace0ac1fc42d484e"


def test_mnist_is_read_from_a_local_folder():
    name = shared_data("mnist")
    sizes = [describe_images(name, split) for split in Split]
    assert sizes == [(size, (1, 28, 28), 10, 255) for size in (48_000, 6_000, 6_000, 10_000)]
    test = load_images(name, Split.TEST)
    assert test.labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]  # as everyone knows them
    assert (test.pixels.min(), test.pixels.max(), test.white) == (0, 255, 255)
    # The mean pixel of the 10,000 test images, as the literature has it (0.1325).
    assert test.pixels.mean() / 255 == pytest.approx(0.1325, abs=1e-4)


def test_mnist_splits_share_no_image():
    name = shared_data("mnist")
    valid, tune, test = (
        set(image_bytes(load_images(name, s))) for s in (Split.VALID, Split.TUNE, Split.TEST)
    )
    assert not valid & tune
    assert not (valid | tune) & test


def test_cifar10_has_three_channels_first():
    name = shared_data("cifar10")
    assert describe_images(name, Split.TRAIN) == (40_000, (3, 32, 32), 10, 255)
    valid = load_images(name, Split.VALID)
    assert valid.pixels.shape == (5_000, 3, 32, 32)
    means = valid.pixels.mean((0, 2, 3)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=0.01)  # the well-known channel means


def test_a_folder_without_test_images_gives_a_fifth_to_test(picture_folder):
    values, encoded = pictures(20)
    folder = picture_folder({"image": encoded, "label": list(range(20))})
    parts = [load_images(folder, split) for split in Split]
    assert [len(part.labels) for part in parts] == [14, 1, 1, 4]
    for part in parts:
        for label, pixels in zip(part.labels, part.pixels, strict=True):
            assert np.array_equal(pixels[0], values[label])
    assert describe_images(folder, Split.TRAIN).classes == 20


def test_data_variable_goes_before_the_hub(picture_folder, tmp_path, monkeypatch):
    _, encoded = pictures(20)
    folder = picture_folder({"img": encoded, "label": [0] * 20}, name="mnist")
    monkeypatch.setenv("L2L_SCALE_DATA", str(tmp_path))
    assert hub.locate("mnist") == hub.locate("ylecun/mnist") == folder
    assert hub.locate("cifar10") == "uoft-cs/cifar10"
    assert describe_images("mnist", Split.TRAIN).shape == (1, 4, 4)


def test_names_are_folders_or_hub_names(tmp_path, monkeypatch):
    monkeypatch.delenv("L2L_SCALE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    assert hub.locate("data/mine") == str(tmp_path / "data" / "mine")
    assert hub.locate("data/yours") == "data/yours"
    assert hub.locate("mnist") == "ylecun/mnist"


def test_missing_folder_is_named_with_the_way_out():
    with pytest.raises(ValueError, match="nowhere/mnist") as caught:
        load_images("./nowhere/mnist", Split.TRAIN)
    message = str(caught.value)
    assert str(Path("nowhere/mnist").resolve()) in message
    for way_out in ("hf download ylecun/mnist", "L2L_SCALE_DATA", "'digits'"):
        assert way_out in message


def test_data_variable_must_name_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("L2L_SCALE_DATA", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"L2L_SCALE_DATA \(.*gone\) must name an existing folder"):
        load_images("mnist", Split.TRAIN)
    assert describe_images("digits", Split.TRAIN).size  # which needs no folder


def test_folder_without_the_columns_is_refused(picture_folder):
    folder = picture_folder({"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(
        ValueError, match=r"column 'label' and one named 'image' or 'img'; it has text, label"
    ):
        load_images(folder, Split.TRAIN)


def test_folder_without_training_images_is_refused(picture_folder):
    folder = picture_folder({"image": pictures(2)[1], "label": [0, 1]}, split="test")
    with pytest.raises(ValueError, match="must have a split named train; it has test"):
        load_images(folder, Split.TRAIN)


def test_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder that `datasets` cannot read"):
        load_images(str(tmp_path), Split.TRAIN)


def test_images_of_several_sizes_are_refused(picture_folder):
    folder = picture_folder({"image": pictures(20)[1] + pictures(20, size=5)[1], "label": [0] * 40})
    with pytest.raises(ValueError, match="images of one size and mode"):
        load_images(folder, Split.TRAIN)


OFFLINE = """
from l2l_scale.rng import Split
from l2l_scale.tasks.datasets import load_images
try:
    load_images("mnist", Split.TRAIN)
except ValueError as error:
    print(error)
"""


def test_hub_name_without_network_fails_soon_with_the_way_out(tmp_path):
    # A closed port in place of the Hub, and an empty cache: as on a machine without network.
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    env.pop("L2L_SCALE_DATA", None)
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=env, capture_output=True, text=True, timeout=60
    )
    assert time.monotonic() - start < 20  # mostly imports; left to itself, `datasets` retries for 23 s
    assert result.returncode == 0, result.stderr
    for part in ("'ylecun/mnist'", "cannot be reached", "hf download", "L2L_SCALE_DATA", "'digits'"):
        assert part in result.stdout


def test_hub_name_without_network_is_served_from_the_cache(picture_folder, tmp_path, monkeypatch):
    import datasets

    folder = picture_folder({"image": pictures(20)[1], "label": [0] * 20})
    datasets.load_dataset(folder)
    shutil.copytree(tmp_path / "cache" / "pictures", tmp_path / "cache" / "owner___pictures")
    monkeypatch.setattr(hub, "_trouble_with_hub", lambda name: OSError("no network"))
    assert describe_images("owner/pictures", Split.TRAIN).size == 14
    assert not datasets.config.HF_HUB_OFFLINE
