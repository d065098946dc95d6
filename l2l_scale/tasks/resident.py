"""Whole data sets of images on a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_scale.rng import Split
from l2l_scale.tasks.datasets import Labels, describe_images, load_images


class ResidentImages(NamedTuple):
    """A split's images on a device."""

    pixels: Tensor
    """(M, D) float32 in [0, 1]: four times the memory of bytes, and no conversion in every inner step."""
    labels: Tensor
    """(M,) int64."""


@lru_cache(maxsize=8)
def resident_images(
    dataset: str, split: Split, device: torch.device, labels: Labels = None
) -> ResidentImages:
    """The images of a split with these labels on the device, put there at the first call.

    Kept here and not in the family: tasks hold no mutable attributes, and families with the same images
    share them.
    """
    if device.type == "meta":  # a rehearsal asks for sizes only: nothing is decoded
        info = describe_images(dataset, split, labels)
        pixels = torch.empty(info.size, math.prod(info.shape), device=device)
        return ResidentImages(pixels, torch.empty(info.size, dtype=torch.int64, device=device))
    images = load_images(dataset, split, labels)
    pixels = unit_pixels(torch.from_numpy(images.pixels).flatten(1).to(device), images.white)
    return ResidentImages(pixels, torch.from_numpy(images.labels).to(device))


# torch.compile would look through the cache, into the code that reads the data sets.
look_up: Callable[[str, Split, torch.device, Labels], ResidentImages] = torch.compiler.disable(
    resident_images
)  # type: ignore[no-untyped-call]


def unit_pixels(pixels: Tensor, white: int) -> Tensor:
    """From bytes to float32 in [0, 1], any shape. One formula for all, so that results agree in every bit."""
    return pixels.float().div_(white)
