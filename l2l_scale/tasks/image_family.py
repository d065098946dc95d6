"""What image classifiers have in common: their images, minibatches, start points and activations.

S slots, B images of a minibatch, D = C·H·W pixels of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from l2l_scale.checks import check_count, check_positive
from l2l_scale.rng import Split
from l2l_scale.tasks.augmentation import Augmentation
from l2l_scale.tasks.base import Arrays, TaskFamily, Tensors
from l2l_scale.tasks.datasets import ImageInfo, decode_images, describe_images
from l2l_scale.tasks.resident import look_up, resident_images, unit_pixels
from l2l_scale.tasks.start_points import Initialisation, check_initialisation, draw_start

Self = TypeVar("Self", bound="ImageFamily")

ActivationName: TypeAlias = Literal["sigmoid", "tanh", "relu", "elu"]


class Activation(NamedTuple):
    """A function of every unit; all of them rise."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    """The derivative, as a function of the value."""


ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": Activation(torch.sigmoid, lambda h: h * (1 - h)),
    "tanh": Activation(torch.tanh, lambda h: 1 - h.square()),
    "relu": Activation(torch.relu, lambda h: (h > 0).to(h.dtype)),
    "elu": Activation(F.elu, lambda h: 1 + h.clamp(max=0)),
}


_PORTION = 500
"""Images that are classified at once; batch norm takes the statistics of so many."""


@dataclass(frozen=True, kw_only=True)
class ImageFamily(TaskFamily, ABC):
    """Classification of real images. Subclasses add a network: its ``spec`` and ``losses``.

    Args:
        dataset: "digits", "mnist", "cifar10", a name on the Hugging Face Hub or a folder; see
            :func:`~l2l_scale.tasks.datasets.load_images`.
        labels: only images with these labels, which become the classes 0, 1, … in this order; all if not
            given.
        activation: after every hidden layer.
        batch_size: B, images per inner step, drawn with replacement.
        initialisation: of the start point. "normal": every coordinate N(0, theta0_scale²). "torch": U(−a, a)
            with a = 1/√inputs, as nn.Linear and nn.Conv2d do. "xavier": weights U(−a, a) with
            a = √(6 / (inputs + outputs)), biases 0. "he": weights N(0, 2 / inputs), biases 0. Deep networks
            want one of the last three. Batch norm always starts with scales 1 and shifts 0.
        theta0_scale: used by "normal" only.
        split: which images.
        source: where the pixels of minibatches come from. "resident": all images of the split lie on the
            device, and only indices are drawn. "streamed": whoever draws a minibatch decodes its images, for
            data sets that do not fit and for augmentation. A window then carries (K + 1)·S·B·D bytes. Losses
            are equal in every bit.
        augmentation: random changes of the images of Split.TRAIN; all other splits are left as they are. For
            streamed images only.

    Raises:
        ValueError: if a number is out of range or a choice unknown, labels repeat, or resident images are to
            be augmented.
    """

    dataset: str = "digits"
    labels: tuple[int, ...] | None = None
    activation: ActivationName = "sigmoid"
    batch_size: int = 128
    initialisation: Initialisation = "normal"
    theta0_scale: float = 0.01
    split: Split = Split.TRAIN
    source: Literal["resident", "streamed"] = "resident"
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(self.labels))  # a list would not be hashable
            _check_labels(self.labels)
        check_count("batch_size", self.batch_size)
        check_positive("theta0_scale", self.theta0_scale, zero=True)
        check_initialisation(self.initialisation)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation ({self.activation!r}) must be one of {', '.join(ACTIVATIONS)}")
        if self.source not in ("resident", "streamed"):
            raise ValueError(f"source ({self.source!r}) must be 'resident' or 'streamed'")
        if self.augmentation is not None and self.source != "streamed":
            raise ValueError(
                f"augmentation ({self.augmentation}) must be None with source 'resident', where images are "
                "not touched after they are loaded; set source to 'streamed'"
            )

    @cached_property
    def images(self) -> ImageInfo:
        """Number, shape and classes of the images."""
        return describe_images(self.dataset, self.split, self.labels)

    def sample_task(self, rng: np.random.Generator) -> Arrays:
        """Nothing: tasks differ in start point and minibatches only."""
        return {}

    def sample_init(self, rng: np.random.Generator, task: Arrays) -> np.ndarray:
        """Draw θ0 as ``initialisation`` says."""
        return draw_start(rng, self.spec, self.initialisation, self.theta0_scale)

    def sample_data(self, rng: np.random.Generator, task: Arrays) -> Arrays:
        """Draw the images of one minibatch, by their indices in the split.

        Resident: index (B,). Streamed: pixels (B, D) uint8 and label (B,) int64 of the same images; the
        augmentation is drawn after the indices.
        """
        index = rng.integers(0, self.images.size, self.batch_size)
        if self.source == "resident":
            return {"index": index}
        pixels, labels, _ = decode_images(self.dataset, self.split, index, self.labels)
        if self.augmentation is not None and self.split is Split.TRAIN:
            pixels = self.augmentation(rng, pixels)
        return {"pixels": pixels.reshape(len(index), -1), "label": labels}

    def minibatch(self, data: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Pixels (*, B, D) in [0, 1] and labels (*, B) of what :meth:`sample_data` drew."""
        if self.source == "streamed":
            return unit_pixels(data["pixels"], self.images.white).to(dtype), data["label"]
        index = data["index"]
        pixels, labels = look_up(self.dataset, self.split, index.device, self.labels)
        # An embedding is a lookup of whole rows, and four times as fast as pixels[index].
        return F.embedding(index, pixels).to(dtype), labels[index]

    @abstractmethod
    def class_scores(self, theta: Tensor, pixels: Tensor) -> Tensor:
        """What the networks θ (S, N) say of images (S, B, D): logits (S, B, classes)."""

    def scores(self, theta: Tensor, task: Tensors) -> Tensors:
        """The accuracy on all images of the split, which are classified in portions, in their order."""
        correct = torch.zeros(len(theta), dtype=torch.int64, device=theta.device)
        for start in range(0, self.images.size, _PORTION):
            index = np.arange(start, min(start + _PORTION, self.images.size))
            if self.source == "resident":
                one: Tensors = {"index": torch.from_numpy(index).to(theta.device)}
            else:
                images = decode_images(self.dataset, self.split, index, self.labels)
                pixels = torch.from_numpy(images.pixels).flatten(1)
                one = {"pixels": pixels.to(theta.device), "label": torch.from_numpy(images.labels)}
            pixels, labels = self.minibatch(one, theta.dtype)
            found = self.class_scores(theta, pixels.expand(len(theta), *pixels.shape)).argmax(-1)
            correct += (found == labels.to(theta.device)).sum(-1)
        return {"accuracy": correct / self.images.size}

    def for_split(self: Self, split: Split) -> Self:
        """The same family on the images of another split."""
        return replace(self, split=split)

    def prepare(self, device: torch.device) -> None:
        """Put the split's images on the device, if they are to be resident."""
        if self.source == "streamed":
            return
        exact = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as losses will ask for it
        resident_images(self.dataset, self.split, exact, self.labels)


def _check_labels(labels: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless these are two or more different labels."""
    for place, label in enumerate(labels):
        check_count(f"labels[{place}]", label, least=0)
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(
            f"labels ({list(labels)}) must be two or more different labels; leave them out to take all"
        )
