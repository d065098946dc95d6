"""Image classification by small networks, on real images that live on the device.

S slots, B images of a minibatch, D = C·H·W pixels of an image. ``...`` are leading axes: none, or S.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from l2l_scale.checks import check_count, check_positive
from l2l_scale.flat import FlatSpec, Segment
from l2l_scale.rng import Split
from l2l_scale.tasks.base import Arrays, TaskFamily, Tensors
from l2l_scale.tasks.datasets import ImageInfo, describe_images, load_images

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": F.elu,
}
_INITIALISATIONS = ("normal", "torch", "xavier", "he")


class ResidentImages(NamedTuple):
    """A split's images on a device."""

    pixels: Tensor
    """(M, D) float32 in [0, 1]: four times the memory of bytes, and no conversion in every inner step."""
    labels: Tensor
    """(M,) int64."""


@lru_cache(maxsize=8)
def resident_images(dataset: str, split: Split, device: torch.device) -> ResidentImages:
    """The images of a split on the device, put there at the first call.

    Kept here and not in the family: tasks hold no mutable attributes, and families with the same images
    share them.
    """
    images = load_images(dataset, split)
    pixels = torch.from_numpy(images.pixels).flatten(1).to(device).float().div_(images.white)
    return ResidentImages(pixels, torch.from_numpy(images.labels).to(device))


@dataclass(frozen=True, kw_only=True)
class ImageClassifier(TaskFamily):
    """Mean cross entropy of a fully connected network on minibatches of images.

    The defaults are the paper's network (Andrychowicz et al. 2016, section 3.2) with the start point of the
    authors' released code, on scikit-learn's digits; ``dataset="mnist"`` makes it the paper's 784-20-10.

    Args:
        dataset: "digits", "mnist", "cifar10", a name on the Hugging Face Hub or a folder; see
            :func:`~l2l_scale.tasks.datasets.load_images`.
        hidden: units of each hidden layer; none for logistic regression.
        activation: after every hidden layer.
        batch_size: B, images per inner step, drawn with replacement.
        initialisation: of the start point. "normal": every coordinate N(0, theta0_scale²). "torch": U(−a, a)
            with a = 1/√inputs, as nn.Linear does. "xavier": weights U(−a, a) with
            a = √(6 / (inputs + outputs)), biases 0. "he": weights N(0, 2 / inputs), biases 0. Deep networks
            want one of the last three.
        theta0_scale: used by "normal" only.
        split: which images.

    Raises:
        ValueError: if a number is out of range or a choice unknown.
    """

    dataset: str = "digits"
    hidden: tuple[int, ...] = (20,)
    activation: Literal["sigmoid", "tanh", "relu", "elu"] = "sigmoid"
    batch_size: int = 128
    initialisation: Literal["normal", "torch", "xavier", "he"] = "normal"
    theta0_scale: float = 0.01
    split: Split = Split.TRAIN

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))  # a list would not be hashable
        for layer, units in enumerate(self.hidden):
            check_count(f"hidden[{layer}]", units)
        check_count("batch_size", self.batch_size)
        check_positive("theta0_scale", self.theta0_scale, zero=True)
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation ({self.activation!r}) must be one of {', '.join(_ACTIVATIONS)}")
        if self.initialisation not in _INITIALISATIONS:
            raise ValueError(
                f"initialisation ({self.initialisation!r}) must be one of {', '.join(_INITIALISATIONS)}"
            )

    @cached_property
    def images(self) -> ImageInfo:
        """Number, shape and classes of the images."""
        return describe_images(self.dataset, self.split)

    @cached_property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of every layer."""
        sizes = (math.prod(self.images.shape), *self.hidden, self.images.classes)
        return tuple(pairwise(sizes))

    @cached_property
    def spec(self) -> FlatSpec:
        """Weights (outputs, inputs) and biases (outputs,) of every layer, laid out as in nn.Linear."""
        segments: list[Segment] = []
        for layer, (inputs, outputs) in enumerate(self.layers):
            segments.append(Segment(f"layers.{layer}.weight", (outputs, inputs), "linear"))
            segments.append(Segment(f"layers.{layer}.bias", (outputs,), "bias"))
        return FlatSpec(tuple(segments))

    def sample_task(self, rng: np.random.Generator) -> Arrays:
        """Nothing: tasks differ in start point and minibatches only."""
        return {}

    def sample_init(self, rng: np.random.Generator, task: Arrays) -> np.ndarray:
        """Draw θ0 as ``initialisation`` says."""
        if self.initialisation == "normal":
            return self.theta0_scale * rng.standard_normal(self.spec.size)
        return np.concatenate([self._init_layer(rng, *sizes) for sizes in self.layers])

    def _init_layer(self, rng: np.random.Generator, inputs: int, outputs: int) -> np.ndarray:
        """Start values of one layer, weights and then biases, (outputs · inputs + outputs,)."""
        count = inputs * outputs
        if self.initialisation == "torch":
            bound = 1 / math.sqrt(inputs)
            return rng.uniform(-bound, bound, count + outputs)
        if self.initialisation == "xavier":
            bound = math.sqrt(6 / (inputs + outputs))
            weight = rng.uniform(-bound, bound, count)
        else:
            weight = math.sqrt(2 / inputs) * rng.standard_normal(count)
        return np.concatenate([weight, np.zeros(outputs)])

    def sample_data(self, rng: np.random.Generator, task: Arrays) -> Arrays:
        """Draw the images of one minibatch, by their indices in the split: index (B,)."""
        return {"index": rng.integers(0, self.images.size, self.batch_size)}

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        """Mean cross entropy of the minibatch, over any leading axes: index (..., B), result (...)."""
        index = data["index"]
        pixels, labels = resident_images(self.dataset, self.split, index.device)
        weight = params["layers.0.weight"]
        # An embedding is a lookup of whole rows, and four times as fast as pixels[index].
        hidden = F.embedding(index, pixels).to(weight.dtype)
        for layer in range(len(self.layers)):
            if layer > 0:
                hidden = _ACTIVATIONS[self.activation](hidden)
            weight, bias = params[f"layers.{layer}.weight"], params[f"layers.{layer}.bias"]
            hidden = hidden @ weight.mT + bias.unsqueeze(-2)
        each = F.cross_entropy(hidden.flatten(0, -2), labels[index].flatten(), reduction="none")
        return each.view(index.shape).mean(-1)

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        """The same formula for all slots, as batched products, without the cost of mapping."""
        return self.loss(self.spec.unflatten(theta), task, data)

    def for_split(self, split: Split) -> ImageClassifier:
        """The same family on the images of another split."""
        return replace(self, split=split)

    def prepare(self, device: torch.device) -> None:
        """Put the split's images on the device."""
        exact = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as losses will ask for it
        resident_images(self.dataset, self.split, exact)
