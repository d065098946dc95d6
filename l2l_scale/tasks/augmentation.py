"""Random changes of training images that leave their label as it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from l2l_scale.checks import check_count


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crops and flips of training images [He et al. 2016, "Deep residual learning", section 4.2].

    Args:
        padding: pixels of black that are added on every side; then a window of the image's own size is cut
            out anywhere, each place as likely as any other. 4 is customary for CIFAR-10; 0 crops nothing.
        flip: mirror every other image, left for right, by chance.

    Raises:
        ValueError: if ``padding`` is not a whole number, or negative, or ``flip`` not a boolean.
    """

    padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        check_count("padding", self.padding, least=0)
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip ({self.flip!r}) must be True or False")

    def __call__(self, rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
        """Change each image of (B, C, H, W) uint8 for itself; what is given stays as it is.

        Draws the places of the windows first, if any, and then the flips.
        """
        if self.padding > 0:
            pixels = self._crop(rng, pixels)
        if self.flip:
            mirrored = rng.random(len(pixels)) < 0.5
            pixels = np.where(mirrored[:, None, None, None], pixels[..., ::-1], pixels)
        return pixels

    def _crop(self, rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
        pad, size = self.padding, pixels.shape[2:]
        padded = np.pad(pixels, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        top, left = rng.integers(0, 2 * pad + 1, (2, len(pixels)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=(2, 3))
        cropped: np.ndarray = windows[np.arange(len(pixels)), :, top, left]
        return cropped
