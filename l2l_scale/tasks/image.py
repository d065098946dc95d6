"""Image classification by small fully connected networks.

S slots, B images of a minibatch, D = C·H·W pixels of an image, U units of a layer. Layers hold
(S, U, B), images last: with few units that is the faster order of a matrix product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from l2l_scale.checks import check_count
from l2l_scale.flat import FlatSpec, Segment
from l2l_scale.tasks.base import Tensors
from l2l_scale.tasks.image_family import ACTIVATIONS, ImageFamily


@dataclass(frozen=True, kw_only=True)
class ImageClassifier(ImageFamily):
    """Mean cross entropy of a fully connected network on minibatches of images.

    The defaults are the paper's network (Andrychowicz et al. 2016, section 3.2) with the start point of the
    authors' released code, on scikit-learn's digits; ``dataset="mnist"`` makes it the paper's 784-20-10.

    The other arguments are those of :class:`~l2l_scale.tasks.image_family.ImageFamily`.

    Args:
        hidden: units of each hidden layer; none for logistic regression.

    Raises:
        ValueError: if a layer has no units, and as said there.
    """

    hidden: tuple[int, ...] = (20,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))  # a list would not be hashable
        for layer, units in enumerate(self.hidden):
            check_count(f"hidden[{layer}]", units)
        super().__post_init__()

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
                delta = torch.bmm(weight.mT, delta) * ACTIVATIONS[self.activation].slope(below)
        return _cross_entropy(log_probability, labels), torch.cat(parts, 1)

    def class_scores(self, theta: Tensor, pixels: Tensor) -> Tensor:
        """What comes out of the last layer, (S, B, classes)."""
        return self._layers(self.spec.unflatten(theta), pixels.mT)[-1].mT

    def _images(self, data: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Pixels (S, D, B) and labels (S, 1, B) of the slots' minibatches."""
        pixels, labels = self.minibatch(data, dtype)
        return pixels.mT, labels.unsqueeze(1)

    def _layers(self, params: Tensors, pixels: Tensor) -> list[Tensor]:
        """What goes into each layer, and what comes out of the last one, (S, U, B)."""
        values, last = [pixels], len(self.layers) - 1
        for layer in range(last + 1):
            weight, bias = params[f"layers.{layer}.weight"], params[f"layers.{layer}.bias"]
            out = torch.baddbmm(bias.unsqueeze(-1), weight, values[-1])
            values.append(ACTIVATIONS[self.activation].value(out) if layer < last else out)
        return values


def _cross_entropy(log_probability: Tensor, labels: Tensor) -> Tensor:
    """Mean over a minibatch: from (S, classes, B) and (S, 1, B) to (S,)."""
    return -log_probability.gather(1, labels).mean((1, 2))
