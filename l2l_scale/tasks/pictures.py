"""Encoded pictures (PNG, JPEG, …) of a table on disk, and their pixels. M pictures of shape (C, H, W)."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, eq=False)
class EncodedPictures:
    """A column of pictures that stay encoded; the table is mapped into memory, not read.

    Args:
        place: of the data set, for messages.
        rows: the table, all of it and in the order of its file.
        column: the pictures, of the type `datasets.Image(decode=False)`.
    """

    place: str
    rows: datasets.Dataset
    column: str

    def __post_init__(self) -> None:
        assert self.rows._indices is None, "rows that were selected or shuffled lie elsewhere in the table"

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Decode the pictures of these rows (M,), in their order, into (M, C, H, W) uint8.

        Raises:
            ValueError: if they are not of one size and mode, or have more than 8 bits per channel.
        """
        pictures = list(_pictures(self._contents(rows)))
        if len({image.shape for image in pictures}) > 1:
            raise ValueError(
                f"dataset ({self.place}) must have images of one size and mode; resize them first"
            )
        pixels = np.stack(pictures)
        if pixels.dtype != np.uint8:
            raise ValueError(
                f"dataset ({self.place}) must have images of 8 bits per channel, not {pixels.dtype}"
            )
        return np.ascontiguousarray(pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2))

    def _contents(self, rows: np.ndarray) -> Iterator[Any]:
        """What each picture can be opened from: its bytes in a file, or a path."""
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        for chunk, row in zip(chunks.tolist(), (rows - self._starts[chunks]).tolist(), strict=True):
            contents, paths = self._chunks[chunk]
            content = contents[row].as_buffer()  # a view of the table on disk
            yield paths[row].as_py() if content is None else io.BytesIO(content)

    @cached_property
    def _chunks(self) -> list[tuple[Any, Any]]:
        """Arrow's arrays of bytes and of paths. `datasets` takes ten times as long to find scattered rows."""
        chunks = self.rows.data.column(self.column).chunks
        return [(chunk.field("bytes"), chunk.field("path")) for chunk in chunks]

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first row of each chunk."""
        sizes = [len(contents) for contents, _ in self._chunks]
        return np.cumsum([0, *sizes[:-1]])


def _pictures(contents: Iterable[Any]) -> Iterator[np.ndarray]:
    """Decode one picture after the other, (H, W) or (H, W, C)."""
    from PIL import Image  # here, not above: only processes that read data sets need it

    for content in contents:
        with Image.open(content) as image:
            yield np.asarray(image)
