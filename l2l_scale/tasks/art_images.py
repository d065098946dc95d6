"""Where neural art has its contents and styles from. All pictures are (3, size, size) uint8."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from l2l_scale.rng import Split
from l2l_scale.tasks.datasets import decode_images, describe_images, split_rows
from l2l_scale.tasks.painting import STYLES, scene

GENERATED = "generated"
"""The name of painted scenes, of which there are as many as anyone draws."""

_SUFFIXES = (".png", ".jpg", ".jpeg")
_LEAST = 12  # pictures of a folder: below that a split would be empty


def check_content(content: str) -> None:
    """Raise ``ValueError`` if a folder of contents holds too few pictures to be split."""
    if content != GENERATED and (pictures := _pictures_in(content)) and len(pictures) < _LEAST:
        raise ValueError(
            f"content ({content}) must hold {_LEAST} pictures at least, which are split over training, "
            f"validation, tuning and test, but there are {len(pictures)}; add some, or take {GENERATED!r}"
        )


def check_style(style: str) -> None:
    """Raise ``ValueError`` for a style that is neither painted nor a picture nor a folder of them."""
    if style not in STYLES and not _style_pictures(style):
        raise ValueError(
            f"styles ({style!r}) must be {', '.join(STYLES)}, or the path of a picture "
            f"({', '.join(_SUFFIXES)}) or of a folder of them"
        )


def draw_content(content: str, split: Split, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a content.

    Args:
        content: "generated"; a folder of pictures, of which each split has its own; or a data set, see
            :func:`~l2l_scale.tasks.datasets.load_images`.
        split: which pictures of a folder or data set. Painted scenes are as different as the generators are.
        size: height and width.
        rng: draws.
    """
    if content == GENERATED:
        return scene(rng, size).transpose(2, 0, 1)
    if pictures := _pictures_in(content):
        rows = split_rows(split, len(pictures), has_test=False)
        return _open(pictures[rng.choice(rows)], size)
    index = rng.integers(0, describe_images(content, split).size, 1)
    pixels, _, white = decode_images(content, split, index)
    coloured = np.broadcast_to(pixels[0], (3, *pixels.shape[2:]))  # grey images have one channel
    return _resize(np.rint(coloured * (255 / white)).astype(np.uint8).transpose(1, 2, 0), size)


def draw_style(styles: tuple[str, ...], size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one of some styles, and a picture in it: a painting of its own, or one of the pictures."""
    style = styles[rng.integers(len(styles))]
    if style in STYLES:
        return STYLES[style](rng, size).transpose(2, 0, 1)
    pictures = _style_pictures(style)
    return _open(pictures[rng.integers(len(pictures))], size)


@lru_cache(maxsize=8)
def _pictures_in(folder: str) -> tuple[Path, ...]:
    """The pictures in a folder, by name; none if it is no folder."""
    if not Path(folder).is_dir():
        return ()
    return tuple(sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in _SUFFIXES))


def _style_pictures(style: str) -> tuple[Path, ...]:
    """The picture of this path, or those in this folder."""
    path = Path(style)
    return (path,) if path.is_file() and path.suffix.lower() in _SUFFIXES else _pictures_in(style)


@lru_cache(maxsize=256)
def _open(path: Path, size: int) -> np.ndarray:
    from PIL import Image  # here, not above: only who has pictures needs it

    with Image.open(path) as image:
        return _resize(np.asarray(image.convert("RGB")), size)


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """The middle square of a picture (H, W, 3), resized."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(
        Image.fromarray(np.ascontiguousarray(pixels)), (size, size), Image.Resampling.BICUBIC
    )
    return np.asarray(fitted).transpose(2, 0, 1)
