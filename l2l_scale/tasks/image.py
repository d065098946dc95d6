"""Image classification by small networks, on real images that live on the device or are streamed to it.

S slots, B images of a minibatch, D = C·H·W pixels of an image, U units of a layer. Layers hold
(S, U, B), images last: with few units that is the faster order of a matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from l2l_scale.checks import check_count, check_positive
from l2l_scale.flat import FlatSpec, Segment
from l2l_scale.rng import Split
from l2l_scale.tasks.augmentation import Augmentation
from l2l_scale.tasks.base import Arrays, TaskFamily, Tensors
from l2l_scale.tasks.datasets import ImageInfo, decode_images, describe_images
from l2l_scale.tasks.resident import look_up, resident_images, unit_pixels


class _Activation(NamedTuple):
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    """The derivative, as a function of the value."""


_ACTIVATIONS = {
    "sigmoid": _Activation(torch.sigmoid, lambda h: h * (1 - h)),
    "tanh": _Activation(torch.tanh, lambda h: 1 - h.square()),
    "relu": _Activation(torch.relu, lambda h: (h > 0).to(h.dtype)),
    "elu": _Activation(F.elu, lambda h: 1 + h.clamp(max=0)),
}
_INITIALISATIONS = ("normal", "torch", "xavier", "he")


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
        source: where the pixels of minibatches come from. "resident": all images of the split lie on the
            device, and only indices are drawn. "streamed": whoever draws a minibatch decodes its images, for
            data sets that do not fit and for augmentation. A window then carries (K + 1)·S·B·D bytes. Losses
            are equal in every bit.
        augmentation: random changes of the images of Split.TRAIN; all other splits are left as they are. For
            streamed images only.

    Raises:
        ValueError: if a number is out of range or a choice unknown, or resident images are to be augmented.
    """

    dataset: str = "digits"
    hidden: tuple[int, ...] = (20,)
    activation: Literal["sigmoid", "tanh", "relu", "elu"] = "sigmoid"
    batch_size: int = 128
    initialisation: Literal["normal", "torch", "xavier", "he"] = "normal"
    theta0_scale: float = 0.01
    split: Split = Split.TRAIN
    source: Literal["resident", "streamed"] = "resident"
    augmentation: Augmentation | None = None

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
        """Draw the images of one minibatch, by their indices in the split.

        Resident: index (B,). Streamed: pixels (B, D) uint8 and label (B,) int64 of the same images; the
        augmentation is drawn after the indices.
        """
        index = rng.integers(0, self.images.size, self.batch_size)
        if self.source == "resident":
            return {"index": index}
        pixels, labels, _ = decode_images(self.dataset, self.split, index)
        if self.augmentation is not None and self.split is Split.TRAIN:
            pixels = self.augmentation(rng, pixels)
        return {"pixels": pixels.reshape(len(index), -1), "label": labels}

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        """Mean cross entropy of the minibatch, a scalar."""
        one = {name: leaf.unsqueeze(0) for name, leaf in data.items()}
        return self.losses(self.spec.flatten(params).unsqueeze(0), task, one).squeeze(0)

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        """The losses of all slots, as batched products: nothing is mapped."""
        pixels, labels = self._images(data, theta.dtype)
        out = self._layers(self.spec.unflatten(theta), pixels)[-1]
        return _cross_entropy(out.log_softmax(1, dtype=theta.dtype), labels)

    def losses_and_gradients(
        self, theta: Tensor, task: Tensors, data: Tensors, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """The same losses, and backpropagation written out: two thirds of the time.

        Under autocast the products have 16 bits; what is summed over images is θ's precision again.
        """
        params = self.spec.unflatten(theta)
        pixels, labels = self._images(data, theta.dtype)
        values = self._layers(params, pixels)
        log_probability = values.pop().log_softmax(1, dtype=theta.dtype)
        minus_one = theta.new_full((), -1.0).expand_as(labels)
        # The derivative of the losses in what comes out of a layer, before the activation: (S, U, B).
        delta = log_probability.exp().scatter_add(1, labels, minus_one) / labels.shape[-1]
        parts: list[Tensor] = []
        for layer, below in reversed(list(enumerate(values))):
            parts = [torch.bmm(delta, below.mT).flatten(1), delta.sum(-1, dtype=theta.dtype), *parts]
            if layer > 0:
                weight = params[f"layers.{layer}.weight"]
                delta = torch.bmm(weight.mT, delta) * _ACTIVATIONS[self.activation].slope(below)
        return _cross_entropy(log_probability, labels), torch.cat(parts, 1)

    def _images(self, data: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Pixels (S, D, B) and labels (S, 1, B) of the slots' minibatches."""
        if self.source == "streamed":
            return unit_pixels(data["pixels"], self.images.white).to(dtype).mT, data["label"].unsqueeze(1)
        index = data["index"]
        pixels, labels = look_up(self.dataset, self.split, index.device)
        # An embedding is a lookup of whole rows, and four times as fast as pixels[index].
        return F.embedding(index, pixels).to(dtype).mT, labels[index].unsqueeze(1)

    def _layers(self, params: Tensors, pixels: Tensor) -> list[Tensor]:
        """What goes into each layer, and what comes out of the last one, (S, U, B)."""
        values, last = [pixels], len(self.layers) - 1
        for layer in range(last + 1):
            weight, bias = params[f"layers.{layer}.weight"], params[f"layers.{layer}.bias"]
            out = torch.baddbmm(bias.unsqueeze(-1), weight, values[-1])
            values.append(_ACTIVATIONS[self.activation].value(out) if layer < last else out)
        return values

    def for_split(self, split: Split) -> ImageClassifier:
        """The same family on the images of another split."""
        return replace(self, split=split)

    def prepare(self, device: torch.device) -> None:
        """Put the split's images on the device, if they are to be resident."""
        if self.source == "streamed":
            return
        exact = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as losses will ask for it
        resident_images(self.dataset, self.split, exact)


def _cross_entropy(log_probability: Tensor, labels: Tensor) -> Tensor:
    """Mean over a minibatch: from (S, classes, B) and (S, 1, B) to (S,)."""
    return -log_probability.gather(1, labels).mean((1, 2))
