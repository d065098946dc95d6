"""Image classification by small convolutional networks with batch norm.

S slots, B images of a minibatch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from l2l_scale.checks import check_count
from l2l_scale.flat import FlatSpec, Segment
from l2l_scale.tasks.base import Tensors
from l2l_scale.tasks.image_family import ACTIVATIONS, ActivationName, ImageFamily


@dataclass(frozen=True, kw_only=True)
class ConvClassifier(ImageFamily):
    """Mean cross entropy of a convolutional network on minibatches of images.

    Layer after layer: a convolution that keeps the size, batch norm, the activation, max-pooling of 2 × 2;
    then fully connected layers. With ``dataset="cifar10"`` the defaults are the network on CIFAR-10 of
    Andrychowicz et al. 2016 (section 3.3), its sizes those of the authors' released code.

    Batch norm takes the statistics of the very minibatch, of each slot by itself, and remembers none: a loss
    is a pure function. Convolutions have no bias, which batch norm would take away again.

    Parameters are named ``conv.0.weight``, ``norm.0.weight`` (the scale), ``norm.0.bias`` (the shift),
    ``linear.0.weight``, ``linear.0.bias``, and belong to the groups conv, norm, linear and bias. The other
    arguments are those of :class:`~l2l_scale.tasks.image_family.ImageFamily`.

    Args:
        channels: of each convolution; at least one.
        kernel: height and width of every kernel, odd.
        hidden: units of each fully connected hidden layer; none for a linear layer on the last convolution.

    Raises:
        ValueError: if a size is out of range, and as said there; when the images are looked at, if they are
            too small to be halved so often.
    """

    channels: tuple[int, ...] = (16, 16, 16)
    kernel: int = 5
    hidden: tuple[int, ...] = (32,)
    activation: ActivationName = "relu"

    def __post_init__(self) -> None:
        for name in ("channels", "hidden"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list would not be hashable
            for layer, units in enumerate(getattr(self, name)):
                check_count(f"{name}[{layer}]", units)
        if not self.channels:
            raise ValueError("channels (()) must name at least one convolution; ImageClassifier has none")
        check_count("kernel", self.kernel)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel ({self.kernel}) must be odd, so that a convolution can keep the size")
        super().__post_init__()

    @cached_property
    def spec(self) -> FlatSpec:
        """Every parameter in the shape that it has in nn.Conv2d, nn.BatchNorm2d and nn.Linear."""
        inputs, height, width = self._image_shape()
        segments: list[Segment] = []
        for layer, (below, above) in enumerate(pairwise((inputs, *self.channels))):
            segments.append(Segment(f"conv.{layer}.weight", (above, below, self.kernel, self.kernel), "conv"))
            segments.append(Segment(f"norm.{layer}.weight", (above,), "norm"))
            segments.append(Segment(f"norm.{layer}.bias", (above,), "norm"))
            height, width = height // 2, width // 2
        sizes = (self.channels[-1] * height * width, *self.hidden, self.images.classes)
        for layer, (below, above) in enumerate(pairwise(sizes)):
            segments.append(Segment(f"linear.{layer}.weight", (above, below), "linear"))
            segments.append(Segment(f"linear.{layer}.bias", (above,), "bias"))
        return FlatSpec(tuple(segments))

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        """Mean cross entropy of the minibatch, a scalar."""
        pixels, labels = self.minibatch(data, params["linear.0.weight"].dtype)
        return F.cross_entropy(self._outputs(params, pixels).to(pixels.dtype), labels)

    def class_scores(self, theta: Tensor, pixels: Tensor) -> Tensor:
        """What comes out of the last layer, (S, B, classes)."""
        pairs = zip(theta.unbind(), pixels.unbind(), strict=True)
        return torch.stack([self._outputs(self.spec.unflatten(flat), images) for flat, images in pairs])

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        """The losses of all slots: one after another, but mapped on a GPU.

        A GPU has to be given much at once. On a CPU the batched form, a convolution in groups, takes 1.2
        times the time with two slots and 1.7 times with four (measured, CIFAR-10).
        """
        if theta.device.type == "cuda":
            return super().losses(theta, task, data)
        slots = range(len(theta))
        one = [{name: leaf[slot] for name, leaf in data.items()} for slot in slots]
        params = [self.spec.unflatten(flat) for flat in theta.unbind()]
        return torch.stack([self.loss(params[slot], {}, one[slot]) for slot in slots])

    def _outputs(self, params: Tensors, pixels: Tensor) -> Tensor:
        """What ONE network says of images (B, D), (B, classes)."""
        activate = ACTIVATIONS[self.activation].value
        # With the channels innermost in memory the whole takes two thirds of the time on a CPU.
        values = pixels.reshape(-1, *self.images.shape).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        for layer in range(len(self.channels)):
            scale, shift = params[f"norm.{layer}.weight"], params[f"norm.{layer}.bias"]
            values = F.conv2d(values, params[f"conv.{layer}.weight"], padding=self.kernel // 2)
            values = F.batch_norm(values, None, None, scale, shift, training=True)
            # The activation rises, so it may as well come last: it is the same, of a quarter of the numbers.
            values = activate(F.max_pool2d(values, 2))
        values = values.flatten(1)
        for layer in range(len(self.hidden)):
            values = activate(self._linear(params, layer, values))
        return self._linear(params, len(self.hidden), values)

    @staticmethod
    def _linear(params: Tensors, layer: int, values: Tensor) -> Tensor:
        return F.linear(values, params[f"linear.{layer}.weight"], params[f"linear.{layer}.bias"])

    def _image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images.

        Raises:
            ValueError: if they cannot be halved after every convolution.
        """
        side = min(self.images.shape[1:])
        most = int(math.log2(side))
        if len(self.channels) > most:
            raise ValueError(
                f"channels ({self.channels}) must be at most {most} layers for images of {side} pixels: "
                f"each halves them; leave out {len(self.channels) - most}, or take larger images"
            )
        return self.images.shape
