"""quadratics: 128 of 10 coordinates. digits: 10 MLPs, whose minibatches are indices. teacher: the quadratics,
and Adam's inner steps on each of them, which are expensive. pixels: 38 MNIST MLPs, whose minibatches are
decoded where they are drawn, 80 MB a window. blank: as many bytes that need no drawing, which leaves what it
costs to bring them. tiny: next to nothing, which leaves what it costs to ask. All but tiny: windows of 20
inner steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from images import mnist_or_noise
from torch import Tensor

from l2l_scale.flat import FlatSpec
from l2l_scale.optimizers import Adam
from l2l_scale.tasks import Quadratic, TaskFamily
from l2l_scale.tasks.base import Arrays, Tensors
from l2l_scale.tasks.image import ImageClassifier
from l2l_scale.training.data import WindowData

_BATCH, _PIXELS, _SLOTS = 128, 784, 38
"""38 slots · 21 minibatches · 128 images · 784 bytes are 80 MB."""


@dataclass(frozen=True, kw_only=True)
class Blank(TaskFamily):
    """One coordinate, and minibatches of black images that nobody looks at."""

    @cached_property
    def spec(self) -> FlatSpec:
        """One number, theta."""
        return FlatSpec.single("theta", 1)

    def sample_task(self, rng: np.random.Generator) -> Arrays:
        """Nothing."""
        return {}

    def sample_init(self, rng: np.random.Generator, task: Arrays) -> np.ndarray:
        """Zero."""
        return np.zeros(1, np.float32)

    def sample_data(self, rng: np.random.Generator, task: Arrays) -> Arrays:
        """Black images (B, D)."""
        return {"pixels": np.zeros((_BATCH, _PIXELS), np.uint8)}

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        """θ²."""
        return params["theta"].square().sum()


def streamed_images() -> ImageClassifier:
    """The paper's MNIST MLP, on pixels that are decoded where windows are drawn."""
    dataset, _ = mnist_or_noise()
    return ImageClassifier(dataset=dataset, hidden=(20,), batch_size=_BATCH, source="streamed")


WORKLOADS: dict[str, Callable[[], WindowData]] = {
    "tiny": lambda: WindowData(Quadratic(dimension=1), slots=1, window=1),
    "quadratics": lambda: WindowData(Quadratic(dimension=10), slots=128),
    "digits": lambda: WindowData(ImageClassifier(), slots=10),
    "teacher": lambda: WindowData(Quadratic(dimension=10), slots=128, teacher=Adam(0.1)),
    "pixels": lambda: WindowData(streamed_images(), slots=_SLOTS),
    "blank": lambda: WindowData(Blank(), slots=_SLOTS),
}
