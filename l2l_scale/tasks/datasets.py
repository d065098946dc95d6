"""Real images: scikit-learn's digits (shipped, offline), and whatever Hugging Face `datasets` reads.

Each data set is cut into four disjoint splits by one fixed rule (:func:`split_rows`). The pictures of a split
are decoded once per process (:func:`load_images`), or a few at a time and not kept (:func:`decode_images`).
M images of shape (C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.tasks.hub import locate, open_dataset
from l2l_scale.tasks.pictures import EncodedPictures

if TYPE_CHECKING:
    import datasets

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMN = "label"


class ImageInfo(NamedTuple):
    """What is known of a split before any picture is decoded."""

    size: int
    """M, the number of images."""
    shape: tuple[int, int, int]
    """(C, H, W)."""
    classes: int
    """Labels are 0 … classes − 1."""
    white: int
    """The largest value that a pixel can have: 16 for digits, else 255."""


class Images(NamedTuple):
    """Decoded images of a split: all, or some."""

    pixels: np.ndarray
    """(M, C, H, W) uint8."""
    labels: np.ndarray
    """(M,) int64."""
    white: int
    """As in :class:`ImageInfo`."""


class _Part(NamedTuple):
    """The official training or test part of a data set."""

    labels: np.ndarray
    decode: Callable[[np.ndarray], np.ndarray]
    """From rows (M,) to their pixels, (M, C, H, W)."""


class _Selected(NamedTuple):
    """Some rows of a part."""

    decode: Callable[[np.ndarray], np.ndarray]
    """The part's."""
    rows: np.ndarray
    """(M,) in the part."""
    labels: np.ndarray
    """(M,) int64, theirs, numbered anew if only some labels were chosen."""


class _Source(NamedTuple):
    train: _Part
    test: _Part | None
    classes: int
    white: int


Labels: TypeAlias = "tuple[int, ...] | None"
"""The only labels whose images are taken, and which become 0, 1, … in this order; None takes all."""


def describe_images(name: str, split: Split, labels: Labels = None) -> ImageInfo:
    """Describe a split without decoding it. Arguments and errors as in :func:`load_images`."""
    return _describe(_locate(name), split, labels)


def load_images(name: str, split: Split, labels: Labels = None) -> Images:
    """Load the images of a split.

    Args:
        name: "digits"; "mnist", "cifar10" or another name on the Hugging Face Hub; or a local folder that
            `datasets.load_dataset` reads. A folder $L2L_SCALE_DATA/<last part of the name> goes before all.
        split: which images, see :func:`split_rows`.
        labels: which of them.

    Raises:
        ValueError: if there is no such folder, the Hub is out of reach, a column is missing, or a label has
            no images.
    """
    return _load(_locate(name), split, labels)


def decode_images(name: str, split: Split, index: np.ndarray, labels: Labels = None) -> Images:
    """Decode some images of a split, anew at every call: only labels are kept in memory, never pixels.

    From 30 µs per image of MNIST on an idle core, most of it in Pillow. Errors as in :func:`load_images`.

    Args:
        name: as there.
        split: as there.
        index: (M,) numbers of images in the split; they may repeat, and come in any order.
        labels: as there.
    """
    place = _locate(name)
    chosen = _select(place, split, labels)
    return Images(chosen.decode(chosen.rows[index]), chosen.labels[index], _open(place).white)


def split_rows(split: Split, train_size: int, has_test: bool) -> np.ndarray:
    """Which rows of the training part belong to a split, in rising order.

    TEST is the official test part, or a fifth of a data set that has none. Of the rest VALID and TUNE take a
    tenth each, and TRAIN eight tenths. Sizes (TRAIN, VALID, TUNE, TEST):

    - digits 1152, 143, 143, 359
    - MNIST 48000, 6000, 6000, 10000
    - CIFAR-10 40000, 5000, 5000, 10000
    """
    # A shuffle that never changes. Every n-th row would not do: the labels of digits are periodic.
    order = np.argsort(stream(_SHUFFLE_SEED, Split.TRAIN, Channel.DATA).random(train_size), kind="stable")
    rest = train_size if has_test else train_size - train_size // 5
    tenth = rest // 10
    parts = {
        Split.VALID: order[:tenth],
        Split.TUNE: order[tenth : 2 * tenth],
        Split.TRAIN: order[2 * tenth : rest],
        Split.TEST: order[rest:],
    }
    return np.sort(parts[split])


_SHUFFLE_SEED = 1606_04474  # the paper's number on arXiv; any other would do as well


@lru_cache(maxsize=32)
def _describe(place: str, split: Split, labels: Labels) -> ImageInfo:
    source, chosen = _open(place), _select(place, split, labels)
    channels, height, width = chosen.decode(chosen.rows[:1]).shape[1:]
    classes = source.classes if labels is None else len(labels)
    return ImageInfo(len(chosen.rows), (channels, height, width), classes, source.white)


@lru_cache(maxsize=8)
def _load(place: str, split: Split, labels: Labels) -> Images:
    chosen = _select(place, split, labels)
    return Images(chosen.decode(chosen.rows), chosen.labels, _open(place).white)


@lru_cache(maxsize=32)
def _select(place: str, split: Split, labels: Labels) -> _Selected:
    """The images of a split with these labels: those rows of an official part."""
    source = _open(place)
    if split is Split.TEST and source.test is not None:
        part, rows = source.test, np.arange(len(source.test.labels))
    else:
        part = source.train
        rows = split_rows(split, len(source.train.labels), source.test is not None)
    numbers = part.labels[rows]
    if labels is not None:
        new = np.full(source.classes, -1)
        for number, label in enumerate(labels):
            if label >= source.classes or not (numbers == label).any():
                raise ValueError(
                    f"labels ({list(labels)}) must be labels of dataset {place}, 0 … {source.classes - 1}, "
                    f"but {label} has no images in its split {split.name}"
                )
            new[label] = number
        rows = rows[new[numbers] >= 0]
        numbers = new[part.labels[rows]]
    return _Selected(part.decode, rows, numbers)


def _locate(name: str) -> str:
    return name if name == "digits" else locate(name)


@lru_cache(maxsize=8)
def _open(place: str) -> _Source:
    return _open_digits() if place == "digits" else _open_hugging_face(place)


def _open_digits() -> _Source:
    from sklearn.datasets import load_digits  # here, not above: it takes a second to import

    digits = load_digits()
    pixels = digits.images.astype(np.uint8)[:, None]
    return _Source(_Part(digits.target.astype(np.int64), pixels.__getitem__), None, classes=10, white=16)


def _open_hugging_face(place: str) -> _Source:
    table = open_dataset(place)
    if "train" not in table:
        raise ValueError(f"dataset ({place}) must have a split named train; it has {', '.join(table)}")
    train = _part(place, table["train"])
    test = _part(place, table["test"]) if "test" in table else None
    classes = 1 + max(int(part.labels.max()) for part in (train, test) if part is not None)
    return _Source(train, test, classes, white=255)


def _part(place: str, rows: datasets.Dataset) -> _Part:
    import datasets

    column = next((name for name in _IMAGE_COLUMNS if name in rows.column_names), None)
    if column is None or _LABEL_COLUMN not in rows.column_names:
        raise ValueError(
            f"dataset ({place}) must have a column {_LABEL_COLUMN!r} and one named "
            f"{' or '.join(map(repr, _IMAGE_COLUMNS))}; it has {', '.join(rows.column_names)}"
        )
    encoded = EncodedPictures(place, rows.cast_column(column, datasets.Image(decode=False)), column)
    labels = np.asarray(rows.with_format("numpy")[_LABEL_COLUMN][:], np.int64)
    return _Part(labels, encoded.decode)
