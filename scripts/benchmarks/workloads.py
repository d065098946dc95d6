"""The problems of the workloads that :mod:`sizes` names."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from eager_peer import Loss, Tensors
from images import mnist_or_noise
from sizes import WINDOW
from torch import Tensor

from l2l_scale.flat import FlatSpec
from l2l_scale.rng import Split
from l2l_scale.sampling import Schedule, WindowSampler
from l2l_scale.tasks import Quadratic, TaskFamily
from l2l_scale.tasks.base import Arrays
from l2l_scale.tasks.datasets import load_images
from l2l_scale.tasks.image import ImageClassifier
from l2l_scale.unroll import WindowBatch

SCHEDULE = Schedule(window=WINDOW, horizon=5 * WINDOW)


@dataclass(frozen=True, kw_only=True)
class Sphere(TaskFamily):
    """½ ‖θ − center‖²."""

    dimension: int

    @cached_property
    def spec(self) -> FlatSpec:
        """One vector, theta."""
        return FlatSpec.single("theta", self.dimension)

    def sample_task(self, rng: np.random.Generator) -> Arrays:
        """Draw the center (D,)."""
        return {"center": rng.standard_normal(self.dimension, np.float32)}

    def sample_init(self, rng: np.random.Generator, task: Arrays) -> np.ndarray:
        """Draw the start point (D,)."""
        return rng.standard_normal(self.dimension, np.float32)

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        """½ ‖θ − center‖², over any leading axes."""
        return 0.5 * (params["theta"] - task["center"]).square().sum(-1)

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        """The same formula for all slots."""
        return self.loss({"theta": theta}, task, data)


class Workload(NamedTuple):
    """One window of tasks, drawn once and used by all backends."""

    description: str
    family: TaskFamily
    loss: Loss
    """The family's loss written plainly once more: what the peer minimises."""
    slots: int
    batch: WindowBatch


def make(name: str) -> Workload:
    """Draw the window of a workload."""
    axis, _, size = name.partition("=")
    if axis == "N":
        return draw(f"one sphere of {int(size):,} coordinates", Sphere(dimension=int(size)), sphere_loss, 1)
    if axis in ("W1", "S"):
        slots = int(size or 128)
        return draw(f"{slots} quadratics of 10 coordinates", Quadratic(dimension=10), quadratic_loss, slots)
    dataset, what = mnist_or_noise()
    family = ImageClassifier(dataset=dataset, hidden=(20,), activation="sigmoid", batch_size=128)
    slots = {"W2": 1, "W3": 16}[name]
    description = f"{slots} MLP(s) 784-20-10 on {what}"
    return draw(description, family.for_split(Split.TRAIN), mlp_loss(dataset), slots)


def draw(description: str, family: TaskFamily, loss: Loss, slots: int) -> Workload:
    """Draw the first window of a family."""
    family.prepare(torch.device("cpu"))
    return Workload(description, family, loss, slots, drawing(family, slots)())


def drawing(family: TaskFamily, slots: int) -> Callable[[], WindowBatch]:
    """Draw the next window as training does: each call is another one."""
    draw_window, indices = sampler(family), itertools.count()
    return lambda: draw_window(next(indices), range(slots)).to_batch()


def sampler(family: TaskFamily) -> WindowSampler:
    """What training draws its windows with."""
    return WindowSampler(family, SCHEDULE, seed=0, split=Split.TRAIN)


def sphere_loss(theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
    """½ ‖θ − center‖²."""
    return 0.5 * (theta - task["center"]).square().sum()


def quadratic_loss(theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
    """‖Wθ − y‖²."""
    return (task["w"] @ theta - task["y"]).square().sum()


def mlp_loss(dataset: str) -> Loss:
    """Mean cross-entropy of a sigmoid MLP on the images that ``data["index"]`` names."""

    def loss(theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        pixels, labels = pixels_and_labels(dataset)
        w1, b1, w2, b2 = theta.split([15_680, 20, 200, 10])
        hidden = (pixels[data["index"]] @ w1.view(20, 784).T + b1).sigmoid()
        return F.cross_entropy(hidden @ w2.view(10, 20).T + b2, labels[data["index"]])

    return loss


@cache  # only the peers need this second copy of the images
def pixels_and_labels(dataset: str) -> tuple[Tensor, Tensor]:
    """All training images (M, 784) in [0, 1], and their labels (M,)."""
    images = load_images(dataset, Split.TRAIN)
    pixels = torch.from_numpy(images.pixels).flatten(1).float() / images.white
    return pixels, torch.from_numpy(images.labels)
