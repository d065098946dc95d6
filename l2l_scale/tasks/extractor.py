"""A fixed network like VGG, whose activations say what is in a picture and how it is painted.

S pictures (S, 3, H, W) in ImageNet's normalised units. 3×3 convolutions, each with a ReLU; between blocks of
them pooling halves height and width [Simonyan and Zisserman 2015, "Very deep convolutional networks"].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from l2l_scale.checks import check_count
from l2l_scale.cores import one_thread
from l2l_scale.rng import Channel, Split, stream
from l2l_scale.tasks.painting import scene
from l2l_scale.tasks.vgg_files import Convolution, read_stack, read_weights

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, by channel: what torchvision's networks expect pixels in [0, 1] to be normalised with."""

_DEFAULT_CHANNELS = (16, 32, 64)


class Parameters(NamedTuple):
    """Of one convolution, on a device."""

    weight: Tensor
    bias: Tensor
    scale: Tensor
    """(), root mean square of what comes out of its ReLU, on some pictures."""


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A stack of convolutions, with weights from a file or, without one, random weights.

    Even random filters tell textures apart [Ustyuzhaninov, Brendel, Gatys and Bethge 2017, "What does it take
    to generate natural textures?"].

    Args:
        weights: a safetensors file with torchvision's names: ``features.0.weight``, ``features.0.bias``, … of
            a VGG without batch norm. The stack is read off it: a step of 2 from one number to the next is a
            ReLU, a step of 3 is a ReLU and a pooling. Other tensors in the file are left alone.
        channels: outputs of the convolutions of random weights, one convolution a block; (16, 32, 64) if not
            given. A file has its own.
        seed: of random weights: normal with variance 2 / inputs, biases 0; filters behind the first layer
            sum to zero, else they would all see little but the mean of what comes in.
        pooling: "average", as Gatys et al. recommend for pictures, or "max", which VGG was trained with.

    Raises:
        ValueError: if the file is missing or holds no such stack, a number is out of range or a choice
            unknown.
    """

    weights: str | None = None
    channels: tuple[int, ...] | None = None
    seed: int = 0
    pooling: Literal["average", "max"] = "average"

    def __post_init__(self) -> None:
        if self.channels is not None:
            object.__setattr__(self, "channels", tuple(self.channels))  # a list would not be hashable
            if self.weights is not None:
                raise ValueError(f"channels ({self.channels}) must be left out where weights has its own")
            if not self.channels:
                raise ValueError("channels () must name the outputs of one convolution at least")
            for layer, outputs in enumerate(self.channels):
                check_count(f"channels[{layer}]", outputs)
        check_count("seed", self.seed, least=0)
        if self.pooling not in ("average", "max"):
            raise ValueError(f"pooling ({self.pooling!r}) must be 'average' or 'max'")
        _ = self.convolutions  # raises if the file does not hold a stack

    @cached_property
    def convolutions(self) -> tuple[Convolution, ...]:
        """The stack, from the first convolution to the last."""
        if self.weights is not None:
            return read_stack(self.weights)
        sizes = (3, *(self.channels or _DEFAULT_CHANNELS))
        pairs = enumerate(pairwise(sizes))
        return tuple(Convolution(f"features.{3 * i}", *pair, pooled=i > 0) for i, pair in pairs)

    @property
    def block_starts(self) -> tuple[int, ...]:
        """Numbers of the first convolutions of the blocks."""
        return tuple(i for i, conv in enumerate(self.convolutions) if i == 0 or conv.pooled)

    def least_size(self, layer: int) -> int:
        """Height and width of the smallest picture of which something is left at a convolution."""
        return 1 << sum(conv.pooled for conv in self.convolutions[: layer + 1])

    def activations(self, pictures: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
        """What comes out of some convolutions' ReLUs, (S, C, h, w) by the convolution's number.

        They are divided by their root mean square on a few painted scenes, so that no layer outweighs
        another.
        """
        wanted = frozenset(layers)
        parameters = look_up(self, pictures.device, pictures.dtype)[: max(wanted) + 1]
        values, x = {}, pictures
        for layer, (conv, (weight, bias, scale)) in enumerate(
            zip(self.convolutions, parameters, strict=False)
        ):
            x = _convolve(_pool(x, self.pooling) if conv.pooled else x, weight, bias)
            if layer in wanted:
                values[layer] = x / scale
        return values


def _pool(x: Tensor, pooling: str) -> Tensor:
    return F.avg_pool2d(x, 2) if pooling == "average" else F.max_pool2d(x, 2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1).relu()


def normalised(pixels: Tensor) -> Tensor:
    """From bytes (*, 3, H, W) to the units of the network, float32."""
    mean, deviation = (
        torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, DEVIATION)
    )
    return (pixels.float() / 255 - mean) / deviation


@lru_cache(maxsize=8)
def resident_parameters(
    extractor: Extractor, device: torch.device, dtype: torch.dtype
) -> tuple[Parameters, ...]:
    """The extractor's parameters on a device, put there at the first call."""
    if device.type == "meta":  # a rehearsal asks for sizes only: nothing is read or drawn
        stack = extractor.convolutions
        shapes = [((conv.outputs, conv.inputs, 3, 3), (conv.outputs,), ()) for conv in stack]
        return tuple(
            Parameters(*(torch.empty(s, dtype=dtype, device=device) for s in three)) for three in shapes
        )
    with torch.inference_mode(False), torch.no_grad():  # whoever comes first, the next one may want gradients
        return tuple(
            Parameters(*(tensor.to(device, dtype) for tensor in parameters))
            for parameters in _calibrated(extractor)
        )


# torch.compile would look through the cache, into the code that reads the file.
look_up: Callable[[Extractor, torch.device, torch.dtype], tuple[Parameters, ...]] = torch.compiler.disable(
    resident_parameters  # type: ignore[no-untyped-call]
)


@lru_cache(maxsize=8)
def _calibrated(extractor: Extractor) -> tuple[Parameters, ...]:
    """Parameters in float32 on the CPU, with the scales of their activations on four scenes."""
    rng = stream(0, Split.TRAIN, Channel.ARCHITECTURE, len(extractor.convolutions))
    scenes = np.stack([scene(rng, 64) for _ in range(4)]).transpose(0, 3, 1, 2)
    parameters = []
    with one_thread(), torch.autocast("cpu", enabled=False):
        x = normalised(torch.from_numpy(scenes))
        drawn = zip(extractor.convolutions, _weights(extractor), strict=True)
        for conv, (weight, bias) in drawn:
            x = _convolve(_pool(x, extractor.pooling) if conv.pooled else x, weight, bias)
            parameters.append(Parameters(weight, bias, x.square().mean().sqrt().clamp(min=1e-6)))
    return tuple(parameters)


def _weights(extractor: Extractor) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of the convolutions, read or drawn, float32."""
    if extractor.weights is None:
        drawn = [_draw(conv, layer, extractor.seed) for layer, conv in enumerate(extractor.convolutions)]
        return [(weight, torch.zeros(len(weight))) for weight in drawn]
    return read_weights(extractor.weights, extractor.convolutions)


def _draw(conv: Convolution, layer: int, seed: int) -> Tensor:
    """Random filters (outputs, inputs, 3, 3)."""
    fan_in = 9 * conv.inputs
    rng = stream(seed, Split.TRAIN, Channel.ARCHITECTURE, layer)
    filters = math.sqrt(2 / fan_in) * rng.standard_normal((conv.outputs, conv.inputs, 3, 3))
    if layer > 0:
        filters -= filters.mean((1, 2, 3), keepdims=True)
    return torch.from_numpy(filters).float()
