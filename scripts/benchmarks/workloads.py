"""Workloads. W1: 128 quadratics of 10 coordinates. W2: one MNIST MLP 784-20-10 (15,910 coordinates),
minibatches of 128 images. W3: 16 such MLPs at once (half a minute per meta-step, 8 GB). All: windows of 20
inner steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from eager_peer import Loss, Tensors
from images import mnist_or_noise
from torch import Tensor

from l2l_scale.rng import Split
from l2l_scale.sampling import Schedule, WindowSampler
from l2l_scale.tasks import Quadratic, TaskFamily
from l2l_scale.tasks.datasets import load_images
from l2l_scale.tasks.image import ImageClassifier
from l2l_scale.unroll import WindowBatch

NAMES = ("W1", "W2", "W3")
SCHEDULE = Schedule(window=20, horizon=100)


class Workload(NamedTuple):
    """One window of tasks, drawn once and used by all methods."""

    description: str
    family: TaskFamily
    loss: Loss
    """The family's loss written plainly once more: what the peer minimises."""
    slots: int
    batch: WindowBatch

    @property
    def coordinate_steps(self) -> int:
        """Coordinates × tasks × inner steps of the window."""
        return self.batch.theta0.numel() * self.batch.window_length


def make(name: str) -> Workload:
    """Draw the window of a workload."""
    if name == "W1":
        return draw(
            "W1: 128 quadratics of 10 coordinates", Quadratic(dimension=10), quadratic_loss, slots=128
        )
    dataset, what = mnist_or_noise()
    family = ImageClassifier(dataset=dataset, hidden=(20,), activation="sigmoid", batch_size=128)
    slots = {"W2": 1, "W3": 16}[name]
    description = f"{name}: {slots} MLP(s) 784-20-10 on {what}"
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


def quadratic_loss(theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
    """‖Wθ − y‖²."""
    return (task["w"] @ theta - task["y"]).square().sum()


def mlp_loss(dataset: str) -> Loss:
    """Mean cross-entropy of a sigmoid MLP on the images that ``data["index"]`` names."""
    images = load_images(dataset, Split.TRAIN)
    pixels = torch.from_numpy(images.pixels).flatten(1).float() / images.white
    labels = torch.from_numpy(images.labels)

    def loss(theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        w1, b1, w2, b2 = theta.split([15_680, 20, 200, 10])
        hidden = (pixels[data["index"]] @ w1.view(20, 784).T + b1).sigmoid()
        return F.cross_entropy(hidden @ w2.view(10, 20).T + b2, labels[data["index"]])

    return loss
